"""Rows as they were at one moment, for a thread that reads them while training moves them.

Nothing is copied at that moment.  The thread reads tensors in parts; before rows move, those of parts that it hasn't
read yet are put aside, each once.  Where they would take more memory than they may, training waits for the thread.

Shapes: R rows of a piece of a table, U rows about to move.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Condition

import torch
from torch import Tensor


class Aside:
    """limit: bytes that may be put aside.  A thread calls :meth:`Watched.read`, another one :meth:`before`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken, self.waited = limit, 0, 0.0
        self.watched: dict[object, list[Watched]] = {}
        self.changed = Condition()
        self._kept_R: dict[object, Tensor] = {}

    def watch(self, owner: object, values: Tensor, part_rows: int) -> Watched:
        """``values`` (R, ...), whose rows move with those of all tensors of ``owner``, read ``part_rows`` at a time."""
        watched = Watched(self, values, part_rows)
        self.watched.setdefault(owner, []).append(watched)
        self._kept_R.setdefault(owner, torch.zeros(len(values), dtype=torch.bool, device=values.device))
        return watched

    def before(self, owner: object, rows: Tensor | slice) -> None:
        """``rows`` (U,) of an owner's tensors are about to move."""
        with self.changed:
            if owner not in self.watched:
                return
            tensors, kept_R = self.watched[owner], self._kept_R[owner]
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=kept_R.device)
            fresh_U = self._fresh(rows, tensors, kept_R)
            cost = len(fresh_U) * (8 + sum(w.values[:1].nbytes for w in tensors))
            if self.taken + cost > self.limit and len(fresh_U):
                started = time.perf_counter()
                self.changed.wait_for(lambda: not len(self._fresh(rows, tensors, kept_R)))
                self.waited += time.perf_counter() - started
                return
            for watched in tensors if len(fresh_U) else []:
                watched.aside.append((fresh_U, watched.values[fresh_U]))
            kept_R[fresh_U] = True
            self.taken += cost

    def end(self) -> None:
        """Nothing will be read any more."""
        with self.changed:
            self.watched = {}
            self._kept_R = {}
            self.changed.notify_all()

    def _fresh(self, rows_U: Tensor, tensors: Sequence[Watched], kept_R: Tensor) -> Tensor:
        """Those that will be read, and are not put aside; none when it is over."""
        if not self.watched:
            return rows_U[:0]
        unread_U = torch.zeros_like(rows_U, dtype=torch.bool)
        for watched in tensors:
            unread_U |= watched.unread_P[rows_U // watched.part_rows]
        return rows_U[unread_U & ~kept_R[rows_U]]


class Watched:
    """values: (R, ...), read in P parts.  aside: rows, and what they were."""

    def __init__(self, owner: Aside, values: Tensor, part_rows: int) -> None:
        self.owner, self.values, self.part_rows = owner, values, part_rows
        parts = -(-len(values) // part_rows)
        self.unread_P = torch.ones(parts, dtype=torch.bool, device=values.device)
        self.aside: list[tuple[Tensor, Tensor]] = []

    def read(self, part: int) -> Tensor:
        """A part's rows as they were, in the host's memory; once."""
        start = part * self.part_rows
        with self.owner.changed:
            values = self.values[start : start + self.part_rows].to("cpu", copy=True)
            for rows_U, were in self.aside:
                here_U = (rows_U >= start) & (rows_U < start + len(values))
                values[(rows_U[here_U] - start).to("cpu")] = were[here_U].to("cpu")
            self.unread_P[part] = False
            self.owner.changed.notify_all()
        return values
