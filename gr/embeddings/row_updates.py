"""How the rows of a table that keeps them to itself move: whose they are, their gradients, the optimisers' maths.

A process owns **pieces** of a table: some rows of some columns.  A name of an optimiser fixes which rows move: those of
``adamw`` all do in every step, those of ``lazy_adam`` where they were seen.  An optimiser of rows goes through its
pieces in chunks, so that nothing of a table's size is made beside the table and its moments.

Shapes: R rows and C columns of a piece, U its rows with a gradient, I rows of the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 22  # numbers that are touched at once: 16 MiB


@dataclass(frozen=True)
class Piece:
    """Rows ``row0`` ... of a table's ``column`` (weight or bias), and in them the columns ``col0`` ...: values_RC is
    the table's own memory."""

    column: str
    row0: int
    col0: int
    values_RC: Tensor

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Its rows, counted from 0, (start, stop) a chunk at a time."""
        rows, columns = self.values_RC.shape
        step = max(CHUNK_NUMBERS // max(columns, 1), 1)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def own(self, rows_N: Tensor) -> Tensor:
        """Those of the table's ``rows_N`` that are in the piece, counted in it."""
        places_N = rows_N - self.row0
        return places_N[(places_N >= 0) & (places_N < len(self.values_RC))]


class Gradient(ABC):
    """The gradient of a piece, summed over everybody."""

    factor: Tensor | None = None
    """Scales it (clipping)."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """(stop - start, C): of a range of the piece's rows, zeros included."""

    @abstractmethod
    def rows(self) -> tuple[Tensor, Tensor] | None:
        """(U,) int64 rows of the piece, ascending, and (U, C) their gradients; None where every row has one."""

    @abstractmethod
    def square_norm(self) -> Tensor:
        """The sum of the squares of all its numbers, unscaled: a float32 scalar."""


@dataclass
class SparseGradient(Gradient):
    """Each row once: rows_U, int64, ascending, counted in the piece; values_UC."""

    rows_U: Tensor
    values_UC: Tensor
    factor: Tensor | None = None

    @staticmethod
    def summed(rows: Tensor, values: Tensor) -> SparseGradient:
        """From what all processes sent, rank after rank: a row's gradients are added in the order of ranks, which
        gives the same bits at the same number of them."""
        rows_U, place = rows.unique(return_inverse=True)
        return SparseGradient(
            rows_U, values.new_zeros(len(rows_U), values.shape[1]).index_add_(0, place, values)
        )

    @property
    def device(self) -> torch.device:
        return self.values_UC.device

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.rows_U, self.values_UC if self.factor is None else self.values_UC * self.factor

    def dense(self, start: int, stop: int) -> Tensor:
        first, last = torch.searchsorted(self.rows_U, torch.tensor([start, stop], device=self.rows_U.device))
        values_UC = self.values_UC[first:last]
        out = values_UC.new_zeros(stop - start, values_UC.shape[1])
        out[self.rows_U[first:last] - start] = values_UC if self.factor is None else values_UC * self.factor
        return out

    def square_norm(self) -> Tensor:
        return self.values_UC.square().sum()


@dataclass(frozen=True)
class Twin:
    """FBGEMM's fused optimiser of exactly the same maths.  name: among its EmbOptimType.  arguments: its own names of
    what ours is given.  moments: our names of its states, in its order.  on: the devices that have it."""

    name: str
    arguments: dict[str, float] = field(default_factory=dict)
    moments: tuple[str, ...] = ()
    on: tuple[str, ...] = ("cuda", "cpu")


@dataclass(frozen=True)
class Maths:
    """An optimiser's update of rows.

    all_rows: whether rows without a gradient move too.  moments: names, each as large as the table; ``row_moments``:
    names of those that are one number a row.  step(values, gradient, moments, count, lr, weight_decay): moves values in
    place; all of one shape but row moments, which are (rows, 1).  counts: whether the number of steps matters.
    by_columns: whether columns may be cut.  twin: None where FBGEMM has none.
    """

    all_rows: bool
    step: Callable[[Tensor, Tensor, dict[str, Tensor], int, float, float], None]
    moments: tuple[str, ...] = ()
    row_moments: tuple[str, ...] = ()
    counts: bool = False
    twin: Twin | None = None

    @property
    def by_columns(self) -> bool:
        return not self.row_moments


@dataclass
class RowOptimizer:
    """One table's optimiser.  param_groups: rate and decay by columns' names, as torch's have them; zeros: makes the
    memory of a moment beside a piece: (piece, name, columns) -> (R, columns)."""

    table: str
    pieces: Sequence[Piece]
    maths: Maths
    param_groups: list[dict[str, Any]]
    zeros: Callable[[Piece, str, int], Tensor]
    steps: int = 0
    moving: Callable[[int, Tensor | slice], None] | None = None
    """Told before rows of the piece of that number, and of its moments, move."""
    moments: list[dict[str, Tensor]] = field(init=False)
    """Of each piece: name -> (R, C), or (R, 1) for one number a row."""

    def __post_init__(self) -> None:
        self.moments = [
            {
                name: self.zeros(
                    piece, name, 1 if name in self.maths.row_moments else piece.values_RC.shape[1]
                )
                for name in (*self.maths.moments, *self.maths.row_moments)
            }
            for piece in self.pieces
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[Gradient]) -> None:
        """Move the pieces by their gradients, in the same order."""
        self.steps += 1
        moving = self.moving or (lambda number, rows: None)
        parts = list(zip(range(len(self.pieces)), self.pieces, gradients, self.moments, strict=True))
        for _, beside in groupby(parts, key=lambda part: (part[1].row0, len(part[1].values_RC))):
            together = list(beside)  # columns of the same rows
            seen = [gradient.rows() for _, _, gradient, _ in together]
            if self.maths.all_rows or any(rows is None for rows in seen):
                for start, stop in together[0][1].chunks():
                    # all before any moves: one column's gradient may be formed from another's values
                    formed = [gradient.dense(start, stop) for _, _, gradient, _ in together]
                    for (number, piece, _, moments), gradient_RC in zip(together, formed, strict=True):
                        moving(number, slice(start, stop))
                        here = {name: moment[start:stop] for name, moment in moments.items()}
                        self.maths.step(
                            piece.values_RC[start:stop], gradient_RC, here, *self._settings(piece)
                        )
                continue
            for (number, piece, _, moments), rows in zip(together, seen, strict=True):
                assert rows is not None
                rows_U, gradient_UC = rows
                moving(number, rows_U)
                values_UC = piece.values_RC[rows_U]
                here = {name: moment[rows_U] for name, moment in moments.items()}
                self.maths.step(values_UC, gradient_UC, here, *self._settings(piece))
                piece.values_RC[rows_U] = values_UC
                for name, moment in moments.items():
                    moment[rows_U] = here[name]

    def restart(self, rows_N: Tensor) -> None:
        """``rows_N`` of the table have no moments, as if they had never moved, and may be filled anew when this
        returns; the steps are the table's and stay."""
        for number, (piece, moments) in enumerate(zip(self.pieces, self.moments, strict=True)):
            own_N = piece.own(rows_N).to(piece.values_RC.device)
            if self.moving is not None:
                self.moving(number, own_N)
            for moment in moments.values():
                moment[own_N] = 0

    def owned(self) -> Iterator[tuple[int, Tensor]]:
        """(a piece's number, its values or one of its moments): the tensors whose rows move together."""
        for number, (piece, moments) in enumerate(zip(self.pieces, self.moments, strict=True)):
            for values in (piece.values_RC, *moments.values()):
                yield number, values

    def _settings(self, piece: Piece) -> tuple[int, float, float]:
        """Steps, rate and decay."""
        name = f"tables.{self.table}.{piece.column}"
        group = next(group for group in self.param_groups if name in group["names"])
        return self.steps, group["lr"], group["weight_decay"]


def adam(betas: Sequence[float], eps: float, all_rows: bool, decays: bool = True) -> Maths:
    """AdamW (Loshchilov and Hutter, 2019) in the order of torch.optim's operations.  ``all_rows=False``: rows without a
    gradient keep their values and moments, and all rows count the steps of the table.  ``decays``: whether any weight
    decay isn't 0."""
    beta1, beta2 = betas

    def step(values, gradient, moments, count, lr, weight_decay):
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]
        values.mul_(1 - lr * weight_decay)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(eps)
        values.addcdiv_(mean, root, value=-lr / (1 - beta1**count))

    moments = ("exp_avg", "exp_avg_sq")
    # FBGEMM's moves the rows seen, counts the table's steps and adds eps to the corrected root, as this does
    arguments = {"beta1": beta1, "beta2": beta2, "eps": eps}
    twin = None if all_rows or decays else Twin("ADAM", arguments, moments, on=("cuda",))
    return Maths(all_rows, step, moments, counts=True, twin=twin)


def descent(momentum: float, decays: bool) -> Maths:
    """Gradient descent as torch.optim.SGD does it; plain, rows without a gradient stay."""

    def step(values, gradient, moments, count, lr, weight_decay):
        if weight_decay:
            gradient = gradient.add(values, alpha=weight_decay)
        if momentum:
            gradient = moments["momentum_buffer"].mul_(momentum).add_(gradient)
        values.add_(gradient, alpha=-lr)

    plain = not (momentum or decays)
    twin = Twin("EXACT_SGD") if plain else None
    return Maths(not plain, step, ("momentum_buffer",) if momentum else (), twin=twin)


def rowwise_adagrad(eps: float, decays: bool = True) -> Maths:
    """h_r <- h_r + mean_c g_rc^2;  w_r <- w_r - lr g_r / (sqrt(h_r) + eps): one number a row (FBGEMM's exact row-wise
    Adagrad)."""

    def step(values, gradient, moments, count, lr, weight_decay):
        if weight_decay:
            gradient = gradient.add(values, alpha=weight_decay)
        total = moments["sum"].add_(gradient.square().mean(1, keepdim=True))
        values.addcdiv_(gradient, (total.sqrt() + eps).expand_as(gradient), value=-lr)

    twin = None if decays else Twin("EXACT_ROWWISE_ADAGRAD", {"eps": eps}, ("sum",))
    return Maths(False, step, row_moments=("sum",), twin=twin)
