"""Rows that FBGEMM's own kernels move, where its optimiser has exactly the named maths.

A fused optimiser moves rows in the backward pass of their look-up, once a look-up: each row that has a gradient is
looked up once more when rows move, with everybody's gradients added, which is one update.

Shapes: U rows with a gradient, N rows, R rows and C columns of a piece.
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
        return "a full softmax gives every row a gradient, and FBGEMM moves those that are looked up"
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

    def step(self, gradients: Sequence[Gradient]) -> None:
        """Move the pieces by their gradients, in the same order: each kernel looks the rows up and goes back once."""
        parts = zip(self.pieces, gradients, self.kernels, strict=True)
        for number, (piece, gradient, kernel) in enumerate(parts):
            rows = gradient.rows()
            assert rows is not None  # the spec said that only rows that are looked up have gradients
            rows_U, gradient_UC = rows
            if not len(rows_U):
                continue
            if self.moving is not None:
                self.moving(number, rows_U)
            # FBGEMM counts look-ups as steps, evaluation's too; and it takes the rate as it is at the look-up
            kernel.iter_cpu.fill_(self.steps)
            kernel.iter.fill_(self.steps)
            kernel.set_learning_rate(self._settings(piece)[1])
            look_up(kernel, rows_U).backward(gradient_UC)
        self.steps += 1


def look_up(kernel: Any, rows_N: Tensor) -> Tensor:
    """(N, C) rows of the one table of a kernel."""
    return kernel(rows_N.long(), torch.tensor([0, len(rows_N)], device=rows_N.device))  # type: ignore[no-any-return]
