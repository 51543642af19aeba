"""Rows that FBGEMM's own kernels look up and move, where its optimiser has exactly the named maths.

A fused optimiser moves rows in the backward pass of their look-up, once a look-up: one look-up and one backward pass a
step, as views have it, are one update.  The backward pass is therefore left to :meth:`FusedRows.step`.

Shapes: U rows of a view, R rows and C columns of a piece, W width as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gr.embeddings.row_updates import Gradient, RowOptimizer
from gr.embeddings.table import TableSpec


def why_not(spec: TableSpec, width: int, device: torch.device) -> str | None:
    """Why FBGEMM's kernels can't move the rows of a table exactly as its optimiser's name says; None where they can.
    width: as an own look-up would store it."""
    twin = None if spec.maths is None else spec.maths.twin
    if twin is None:
        return "FBGEMM has no optimizer of exactly the same maths"
    if device.type not in twin.on:
        return f"FBGEMM's {twin.name} is for GPUs alone"
    if not spec.apart:
        return "a clipped norm or a full softmax needs the rows' gradients before they move"
    if spec.bias:
        return "an item bias is a column of the row, and would be moved as one of the vector's numbers"
    if spec.dim % 4:
        return f"FBGEMM wants a width that divides by 4, and model.dim is {spec.dim} (next: {spec.dim + -spec.dim % 4})"
    if width != spec.dim:
        return (
            f"model.dim {spec.dim} doesn't fall into fours for every process, and would be padded to {width}"
        )
    return None


@dataclass
class Waiting(Gradient):
    """The gradient of a view's rows, on its way: the exchange and the update that its backward pass is."""

    block_UW: Tensor
    gradient_UW: Tensor

    @property
    def device(self) -> torch.device:
        return self.gradient_UW.device

    def rows(self) -> None:
        return None

    def dense(self, start: int, stop: int) -> Tensor:
        raise TypeError("FBGEMM moves these rows itself")

    def square_norm(self) -> Tensor:
        raise TypeError("FBGEMM moves these rows itself: nothing is clipped")


@dataclass
class FusedRows(RowOptimizer):
    """kernels: FBGEMM's table-batched embeddings on this process, one a piece, in the pieces' order."""

    kernels: Sequence[Any] = field(kw_only=True)

    def __post_init__(self) -> None:
        assert self.maths.twin is not None
        names = self.maths.twin.moments
        self.moments = [
            {
                name: state.view(len(piece.values_RC), -1)
                for name, state in zip(names, kernel.split_optimizer_states()[0], strict=True)
            }
            if names
            else {}
            for piece, kernel in zip(self.pieces, self.kernels, strict=True)
        ]

    def looking_up(self) -> None:
        """Before a look-up: FBGEMM counts each as a step, evaluation's too."""
        for kernel in self.kernels:
            kernel.iter_cpu.fill_(self.steps)
            kernel.iter.fill_(self.steps)

    def step(self, gradients: Sequence[Gradient]) -> None:
        """Move the rows: the backward exchange, and the kernels' update in it.  Every process calls this together."""
        (waiting,) = gradients
        assert isinstance(waiting, Waiting)
        (group,) = self.param_groups or [{"lr": 0.0}]
        for kernel in self.kernels:
            kernel.set_learning_rate(group["lr"])
        waiting.block_UW.backward(waiting.gradient_UW)
        self.steps += 1
