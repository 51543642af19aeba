"""Views: the rows of a table that a step needs on one process.

Shapes: U rows of a view, D width, I rows of the table, N lists of V rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SPARSE = 64
"""Where a table has more than so many rows for each one asked for, vectors of I numbers cost more than sorting."""


MARKED_AT_ONCE = 1 << 16
"""Wanted rows that are marked between two looks at whether all rows are."""


@dataclass(frozen=True)
class Numbering:
    """The distinct rows of a step, numbered 0 .. U-1 in ascending order.

    rows_U: int64.  position_I: int32, each row's number (anything for rows that aren't there); None where the table is
    so large beside the step that numbers are found by search, or where ``every`` row is there and is its own number.
    """

    rows_U: Tensor
    position_I: Tensor | None
    every: bool = False

    @staticmethod
    def of(wanted: Sequence[Tensor], rows: int, device: torch.device) -> Numbering:
        """The numbering of all row numbers in ``wanted`` (tensors of any shape, on ``device``) of a table of ``rows``
        rows."""
        asked = sum(part.numel() for part in wanted)
        if rows > SPARSE * asked:
            flat = [part.reshape(-1).long() for part in wanted]
            return Numbering(
                torch.cat([torch.empty(0, dtype=torch.int64, device=device), *flat]).unique(), None
            )
        # a mark for every row is many times faster than sorting the wanted ones
        mark_I = torch.zeros(rows, dtype=torch.bool, device=device)
        # where a step asks for many times the table's rows, the first of them have every mark set; a GPU would have to
        # be waited for to see that
        looking = device.type == "cpu" and asked >= rows
        for part in wanted:
            for some in part.reshape(-1).split(max(MARKED_AT_ONCE, rows)) if looking else [part.reshape(-1)]:
                mark_I.index_fill_(0, some.long(), True)
                if looking and bool(mark_I.all()):
                    return Numbering(torch.arange(rows), None, every=True)
        return Numbering(mark_I.nonzero().squeeze(1), mark_I.cumsum(0, dtype=torch.int32) - 1)

    def place(self, rows: Tensor) -> Tensor:
        """Numbers of ``rows`` (any shape, in the numbering), in their dtype."""
        if self.every:
            return rows
        if self.position_I is None:
            return torch.searchsorted(self.rows_U, rows.long()).to(rows.dtype)
        # index_select: indexing by int32 is not to be had, and this is the faster one
        return self.position_I.index_select(0, rows.reshape(-1)).view(rows.shape).to(rows.dtype)


@dataclass(frozen=True)
class View:
    """A local matrix that stands for the table during a step, so that every operator works on it unchanged.

    weight_UD: float32, a leaf whose gradient the table takes back.  bias_U: the same of the table's bias column, or
    None.  numbering: which rows these are; None when the view is the whole table in order.
    """

    weight_UD: Tensor
    bias_U: Tensor | None = None
    numbering: Numbering | None = None

    def place(self, rows: Tensor) -> Tensor:
        """The view's row numbers of the table's ``rows`` (any shape), in their dtype; they must be in the view."""
        return rows if self.numbering is None else self.numbering.place(rows)

    def lookup(self, rows: Tensor) -> Tensor:
        """Vectors of the table's ``rows``, shape ``(*rows.shape, D)``; differentiable (a dense gradient)."""
        # not weight[rows]: the backward of indexing adds repeated rows in no fixed order
        return F.embedding(self.place(rows), self.weight_UD)

    def pooled(self, rows_V: Tensor, offsets_N1: Tensor, how: str) -> Tensor:
        """(N, D) the ``sum`` or the ``mean`` of the vectors of each list of the table's rows, rows_V cut at offsets_N1
        (both int64); zeros for an empty list.  Differentiable, as :meth:`lookup` is."""
        return F.embedding_bag(
            self.place(rows_V), self.weight_UD, offsets_N1, mode=how, include_last_offset=True
        )

    def part_of(self, vector_I: Tensor) -> Tensor:
        """The numbers (U,) of the view's rows in a vector that has one for every row of the table."""
        if self.numbering is None or self.numbering.every:
            return vector_I
        return vector_I.index_select(0, self.numbering.rows_U)


def gradient_of(leaf: Tensor) -> Tensor:
    """What backward left at a leaf; zeros where it took no part in the loss."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
