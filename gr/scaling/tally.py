"""What torch is asked to do: memory as it comes and goes, and of every operation its arithmetic and the bytes it moves.

Real tensors and fake ones (torch's FakeTensorMode) are watched alike, below autograd: what it keeps for the backward
pass is alive until then.  What an operator uses inside and gives back before it ends isn't seen, but for what
``_inside`` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gr.scaling.flops import ATTENTION_BACKWARD


@dataclass(frozen=True)
class Operation:
    """One call.  flops: of its products; bytes: of what it reads and writes, each once; dtype: of
    its narrowest floating numbers, which are those that are multiplied."""

    name: str
    flops: float
    bytes: int
    dtype: torch.dtype

    @property
    def attends(self) -> bool:
        """Whether it is attention."""
        return self.name.startswith("gr_kernels::hstu_attention")


class Tally(TorchDispatchMode):
    """Watches what runs inside of it.  squares: the sum of n^2 over the sequences at hand, that attention's work is
    counted from.  given: tensors that were there before, whose memory isn't counted.

    live, peak: bytes of the tensors that were made inside, now and at most.  operations: in order."""

    def __init__(self, squares: float = 0.0, given: Iterable[Tensor] = ()) -> None:
        from torch.utils.flop_counter import flop_registry  # which imports Triton

        super().__init__()
        self.counters, self.squares = flop_registry, squares
        self.live = self.peak = 0
        self.operations: list[Operation] = []
        self._known: set[int] = set()
        for tensor in given:
            self._enter(tensor, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        made = _tensors(out)
        sources = {_key(tensor) for tensor in given}
        new = [tensor for tensor in made if _key(tensor) not in sources]
        in_place = _sums_gradients(func, args)
        for tensor in new:
            self._enter(tensor, tensor.untyped_storage().nbytes(), in_place=in_place)
        if new or func._schema.is_mutable:  # else it was a view
            self._count(func, args, kwargs, out, given, made)
        return out

    def _enter(self, tensor: Tensor, size: int, *, in_place: bool = False) -> None:
        """in_place: it takes the memory of something that is about to go."""
        key = _key(tensor)
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live - (size if in_place else 0))
        weakref.finalize(tensor.untyped_storage(), self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _count(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        out: Any,
        given: list[Tensor],
        made: list[Tensor],
    ) -> None:
        name = func._schema.name
        flops, gathered = 0.0, 0
        if name.startswith("gr_kernels::"):
            arguments = dict(zip((argument.name for argument in func._schema.arguments), args)) | dict(kwargs)
            flops, gathered = _of_kernel(arguments, self.squares, "_backward" in name)
            self.peak = max(self.peak, self.live + _inside(name, arguments))
        elif name in OF_CPUS:
            flops = _of_flash_attention(given, "_backward" in name)
        elif (counted := self.counters.get(func._overloadpacket)) is not None:
            flops = float(counted(*args, **kwargs, out_val=out))
        moved = gathered + sum({_key(t): t.numel() * t.element_size() for t in (*given, *made)}.values())
        if name in GATHERS:  # reads what it returns, not all that it could
            moved = 2 * sum(t.numel() * t.element_size() for t in made)
        kinds = [t.dtype for t in (*given, *made) if t.is_floating_point()]
        dtype = min(kinds, key=lambda kind: kind.itemsize, default=torch.float32)
        self.operations.append(Operation(name, flops, moved, dtype))


def _sums_gradients(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is autograd's sum of two gradients of one tensor, which it forms in place where nobody watches."""
    if func._schema.name != "aten::add" or torch._C._current_graph_task_id() < 0 or len(args) < 2:
        return False
    one, other = args[:2]
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


def _of_kernel(named: Mapping[str, Any], squares: float, backward: bool) -> tuple[float, int]:
    """Of a call of one of gr_kernels' operators, by its arguments' names: operations, and bytes that it gathers."""
    if {"q", "k", "v"} <= named.keys():
        q, v = named["q"], named["v"]
        pairs = named["pairs"] if "pairs" in named else squares / (2 if named["causal"] else 1)
        flops = 2.0 * q.shape[1] * (q.shape[2] + v.shape[2]) * pairs
        return flops * (ATTENTION_BACKWARD if backward else 1), 0
    twice = 2 if backward else 1
    if (weight := named.get("weight")) is not None:
        rows = next(named[name] for name in ("mean", "attended", "x") if name in named).shape[0]
        again = 1 if backward and "normed" in named and named["recompute"] else 0
        return 2.0 * rows * weight.numel() * (twice + again), 0
    if (queries := named.get("queries")) is not None:
        table, rows = named["table"], named.get("negatives", named.get("rows"))
        own = rows is not None and rows.dim() == 2
        count = table.shape[0] if rows is None else rows.numel() // (len(queries) if own else 1)
        pairs = len(queries) * count
        if "want_queries" in named:  # values, and gradients formed beside them
            products = 1 + bool(named["want_queries"]) + bool(named["want_table"])
            return 2.0 * pairs * queries.shape[1] * products, 0
        return 2.0 * pairs * queries.shape[1] * twice, pairs * queries.shape[1] * 4 * twice if own else 0
    return 0.0, 0


OF_CPUS = frozenset(
    f"aten::_scaled_dot_product_flash_attention_for_cpu{which}" for which in ("", "_backward")
)
"""Attention that torch's counter doesn't know."""


def _of_flash_attention(given: list[Tensor], backward: bool) -> float:
    """given: q, k, v (B, H, rows, width) and others; backward with the gradient of the result in front."""
    q, k, v = given[1:4] if backward else given[:3]
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return 2.0 * pairs * (q.shape[3] + v.shape[3]) * (ATTENTION_BACKWARD if backward else 1)


def _inside(name: str, named: Mapping[str, Any]) -> int:
    """Bytes that the backward passes of gr_kernels.fused_layer make and give back: of norm_linear_silu the gradients of
    the linear layer's result (and, in plain PyTorch, its parts side by side) and of its input; of gated_output the
    gated rows and their gradient."""
    if "_backward" not in name or "weight" not in named:
        return 0
    rows, weight = named["mean"].shape[0], named["weight"]
    plain = name.endswith("_reference")
    outputs, inputs = weight.shape
    numbers = (2 * outputs + inputs) if "normed" in named else 2 * inputs
    if not plain:
        numbers = (outputs + inputs) if "normed" in named else inputs
    return int(rows * numbers * weight.element_size())


GATHERS = frozenset({"aten::embedding", "aten::index_select", "aten::gather", "aten::index"})


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
