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
from torch.nn import functional as F

from gr.embeddings.fused import FusedRows
from gr.embeddings.row_updates import Maths, Piece
from gr.embeddings.torchrec_plan import FEATURE


@dataclass(frozen=True)
class Shard:
    """Rows row0 ... and columns col0 ... of the table; values_RC is TorchRec's memory, leaf a parameter over it."""

    row0: int
    col0: int
    values_RC: Tensor
    leaf: nn.Parameter


class Exchange:
    """module: TorchRec's, sharded.  width: W.  alone: whether this process is the only one.  fused: whether FBGEMM's
    kernels look rows up and move them.  cached: whether they keep some of a shard's rows elsewhere.  rounded: whether
    rows and gradients lose bits on their way."""

    def __init__(
        self,
        module: Any,
        width: int,
        device: torch.device,
        *,
        alone: bool,
        fused: bool,
        cached: bool,
        rounded: bool,
    ) -> None:
        self.module, self.width, self.device = module, width, device
        self.alone, self.fused, self.cached, self.rounded = alone, fused, cached, rounded
        self.kernels = [kernel for lookup in module._lookups for kernel in lookup._emb_modules]
        self.shards = [
            Shard(*config.local_metadata.shard_offsets, weight.detach(), nn.Parameter(weight.detach()))
            for kernel in self.kernels
            for config, weight in zip(
                kernel.config.embedding_tables, kernel.split_embedding_weights(), strict=True
            )
        ]
        self.mover: FusedRows | None = None

    def moved_by(
        self, table: str, pieces: list[Piece], maths: Maths, groups: list[dict[str, Any]]
    ) -> FusedRows:
        """FBGEMM's optimiser of the shards."""
        kernels = [kernel.emb_module for kernel in self.kernels]
        self.mover = FusedRows(table, pieces, maths, groups, no_zeros, kernels=kernels)
        return self.mover

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
        One process without FBGEMM's kernels copies its own, and there is no way back."""
        if self.alone and not self.fused:
            return self.shards[0].values_RC.index_select(0, rows_U)
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        table = self.module
        asked = KeyedJaggedTensor(
            keys=[FEATURE], values=rows_U, lengths=torch.tensor([len(rows_U)], device=rows_U.device)
        )
        if self.mover is not None:
            self.mover.looking_up()
        if self.alone:
            return table._lookups[0](asked).view(-1, self.width)  # type: ignore[no-any-return]
        context = table.create_context()
        arrived = table.input_dist(context, asked).wait().wait()
        outs = table.compute(context, arrived) if self.fused else self._look_up(arrived, context)
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
            found = [F.embedding(p, s.leaf, sparse=True) for p, s in zip(parts, self.shards, strict=True)]
            outs.append(found[0] if len(found) == 1 else torch.cat(found))
        return outs

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


def no_zeros(piece: Piece, moment: str, columns: int) -> Tensor:
    raise TypeError("FBGEMM makes the memory of its moments itself")
