"""What an impression's loss needs of the others of its global batch, wherever they are: sums and rows over processes,
with gradients.

Every process takes part in the same exchanges in the same order, in both passes, with no row of its own if need be.

Shapes: S rows of this process, G rows of all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gr.processes import Axis


def summed(tensor: Tensor, axis: Axis) -> Tensor:
    """The sum of all processes' ``tensor``; differentiable: everybody's losses hang on everybody's tensor."""
    return tensor if axis.size == 1 else _Sum.apply(tensor, axis)  # type: ignore[no-any-return]


def gathered(rows_S: Tensor, axis: Axis) -> Tensor:
    """(G, ...) all processes' rows, rank after rank; differentiable likewise."""
    return rows_S if axis.size == 1 else _Gather.apply(rows_S, axis)  # type: ignore[no-any-return]


def first_row(rows: int, axis: Axis) -> int:
    """Where this process's rows begin among the gathered ones."""
    counts = axis.sum([rows if rank == axis.rank else 0 for rank in range(axis.size)])
    return int(sum(counts[: axis.rank]))


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:  # type: ignore[override]
        ctx.axis = axis
        return axis.add_up(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.axis.add_up(gradient.clone()), None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows_S: Tensor, axis: Axis) -> Tensor:  # type: ignore[override]
        ctx.axis, ctx.first, ctx.rows = axis, first_row(len(rows_S), axis), len(rows_S)
        return axis.gather(rows_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = ctx.axis.add_up(gradient.clone())
        return total[ctx.first : ctx.first + ctx.rows], None
