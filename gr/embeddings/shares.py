"""Rows that are dealt out evenly: each process holds a stretch of them, and fetches others from who has them.

What no optimiser moves needs no table: vectors of content, or the rows that a tower has formed for an evaluation.

Shapes: I rows, R of them on this process, U rows that are asked for, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr.processes import Axis


class Shares:
    """``own_RE``: this process's stretch of I ``rows``.  Every process calls each method together."""

    def __init__(self, rows: int, own_RE: Tensor, axis: Axis) -> None:
        self.rows, self.own_RE, self.axis = rows, own_RE, axis
        self.own = axis.own(rows)
        assert len(own_RE) == len(self.own)

    @staticmethod
    def by_row(rows: int, places_N: Tensor, values_NE: Tensor, axis: Axis) -> Shares:
        """From what each process has made of some rows, anywhere: ``places_N`` (int64) are their numbers.  Each row is
        made by one process."""
        order_N = torch.argsort(places_N)
        counts = _counts(places_N[order_N], rows, axis)
        places, _ = axis.exchange(places_N[order_N], counts)
        values, _ = axis.exchange(values_NE.index_select(0, order_N), counts)
        own_RE = torch.empty_like(values).index_copy_(0, places - axis.own(rows).start, values)
        return Shares(rows, own_RE, axis)

    @staticmethod
    def dealt(rows: int, whole_IE: Tensor, axis: Axis) -> Shares:
        """From the first process, which has all of them; ``whole_IE`` of the others is of no rows."""
        bounds = axis.bounds(rows)
        counts = [b - a for a, b in zip(bounds, bounds[1:])] if len(whole_IE) else [0] * axis.size
        return Shares(rows, axis.exchange(whole_IE, counts)[0], axis)

    def collected(self) -> Tensor:
        """(I, E) on the first process, and of no rows on the others."""
        return self.axis.exchange(self.own_RE, [len(self.own)] + [0] * (self.axis.size - 1))[0]

    def fetch(self, rows_U: Tensor) -> Tensor:
        """(U, E) of rows in ascending order (int64)."""
        asked, came = self.axis.exchange(rows_U, _counts(rows_U, self.rows, self.axis))
        return self.axis.exchange(self.own_RE.index_select(0, asked - self.own.start), came)[0]


def _counts(rows_U: Tensor, rows: int, axis: Axis) -> list[int]:
    """How many of ascending rows each process has."""
    bounds = torch.tensor(axis.bounds(rows), device=rows_U.device)
    return torch.searchsorted(rows_U, bounds).diff().tolist()
