"""What a sharded table holds here, and its ways: rows come from the processes that have them, gradients go there.

Shapes: U rows of a view, R rows and C columns of a shard, W width as stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gr.embeddings.fused import look_up
from gr.embeddings.torchrec_plan import FEATURE


@dataclass(frozen=True)
class Shard:
    """Rows row0 ... and columns col0 ... of the table; values_RC is TorchRec's memory, leaf a parameter over it."""

    row0: int
    col0: int
    values_RC: Tensor
    leaf: nn.Parameter


class Exchange:
    """module: TorchRec's, sharded.  width: W.  alone: whether this process is the only one.  cached: whether FBGEMM's
    kernels keep some of a shard's rows elsewhere.  rounded: whether rows and gradients lose bits on their way."""

    def __init__(
        self,
        module: Any,
        width: int,
        device: torch.device,
        *,
        alone: bool,
        cached: bool,
        rounded: bool,
    ) -> None:
        self.module, self.width, self.device = module, width, device
        self.alone, self.cached, self.rounded = alone, cached, rounded
        self.kernels = [kernel for lookup in module._lookups for kernel in lookup._emb_modules]
        self.shards = [
            Shard(row0, col0, weight.detach(), nn.Parameter(weight.detach()))
            for kernel in self.kernels
            for config, weight in zip(
                kernel.config.embedding_tables, kernel.split_embedding_weights(), strict=True
            )
            for row0, col0 in [config.local_metadata.shard_offsets]
        ]

    # -- the shards' memory ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Before shards are read: what a cache has of them goes back into their memory."""
        if self.cached:
            for kernel in self.kernels:
                kernel.flush()

    def refilled(self) -> None:
        """After they were written: a cache holds what was there before."""
        if self.cached:
            for kernel in self.kernels:
                kernel.purge()

    # -- there and back -------------------------------------------------------------------------------------------

    def fetch(self, rows_U: Tensor) -> Tensor:
        """(U, W) the rows, wherever they are, with the way back of their gradients; all processes call this together.
        The only process copies its own, and there is no way back."""
        if self.alone:
            return self._rows_of(0, rows_U)
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        table = self.module
        asked = KeyedJaggedTensor(
            keys=[FEATURE], values=rows_U, lengths=torch.tensor([len(rows_U)], device=rows_U.device)
        )
        context = table.create_context()
        arrived = table.input_dist(context, asked).wait().wait()
        outs = self._look_up(arrived, context)
        with self._rounding():
            return table.output_dist(context, outs).wait()[FEATURE].values()  # type: ignore[no-any-return]

    def bring(self, block_UW: Tensor, gradient_UW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The gradients of fetched rows go back; of each shard, the rows that anybody had fetched, counted in the
        shard, each once and ascending, and the sums of their gradients."""
        block_UW.backward(gradient_UW)
        brought = []
        for held in self.shards:
            found, held.leaf.grad = held.leaf.grad, None
            if found is None:
                nothing = held.values_RC.new_zeros(0, held.values_RC.shape[1])
                brought.append((torch.empty(0, dtype=torch.int64, device=nothing.device), nothing))
            else:
                found = found.coalesce()
                brought.append((found.indices()[0], found.values()))
        return brought

    def _look_up(self, arrived: Any, context: Any) -> list[Tensor]:
        """The rows that were asked of this process, a tensor a kind of sharding; differentiable in shards' leaves."""
        outs = []
        for ids, its_context in zip(arrived, context.sharding_contexts, strict=True):
            its_context.lengths_after_input_dist = ids.lengths().view(-1, ids.stride())
            if not self.shards:  # takes part in the exchange all the same, backward too
                outs.append(torch.empty(0, self.width, device=self.device, requires_grad=True))
                continue
            parts = ids.values().chunk(len(self.shards)) if len(self.shards) > 1 else [ids.values()]
            found = [
                _Rows.apply(held.leaf, ids, self._rows_of(number, ids))
                for number, (ids, held) in enumerate(zip(parts, self.shards, strict=True))
            ]
            outs.append(found[0] if len(found) == 1 else torch.cat(found))
        return outs

    @torch.no_grad()
    def _rows_of(self, number: int, rows_N: Tensor) -> Tensor:
        """(N, C) rows of this process's shard of that number."""
        if self.cached:
            return look_up(self.kernels[number].emb_module, rows_N)
        return self.shards[number].values_RC.index_select(0, rows_N)

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        """Nothing is rounded where no gradient comes back: evaluation reads the rows as they are."""
        ways = [out._dist for out in self.module._output_dists] if self.rounded else []
        codecs = [way._codecs for way in ways]
        try:
            if not torch.is_grad_enabled():
                for way in ways:
                    way._codecs = None
            yield
        finally:
            for way, given in zip(ways, codecs, strict=True):
                way._codecs = given


class _Rows(torch.autograd.Function):
    """Rows that were looked up in a leaf: their gradients become its sparse one."""

    @staticmethod
    def forward(ctx: Any, leaf_RC: Tensor, rows_N: Tensor, values_NC: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.size = leaf_RC.shape
        return values_NC

    @staticmethod
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (rows_N,) = ctx.saved_tensors
        return (
            torch.sparse_coo_tensor(rows_N[None], gradient_NC, ctx.size, check_invariants=False),
            None,
            None,
        )
