"""Passes: what is done with one partition after the other, whoever does it.

A pass is called with a store, a partition's number and what it adds its findings to.  It is a value that can be sent to
another process, and what it does depends on its fields and the partition alone.

Shapes: R users of a partition, A their actions, C codes of items, I rows of the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from gr.data.making import huge
from gr.data.making.partitions import Grouped, Store, duplicates, group, grouped_before
from gr.data.making.schema import Filter, Preparation
from gr.data.making.stages import Counts
from gr.data.making.user_fields import UserFields
from gr.data.sequences import Sequences


@dataclass
class Found:
    """Sums over the partitions that a pass went through.

    items_C: actions of each item, by its code or row, that the pass counted.  capped: users with more actions than
    stay, and those of their actions that don't.  users, actions: what was written.
    """

    items_C: np.ndarray
    counts: Counts = field(default_factory=Counts)
    capped_users: int = 0
    capped_actions: int = 0
    users: int = 0
    actions: int = 0

    @staticmethod
    def nothing(items: int) -> Found:
        return Found(np.zeros(items, dtype=np.int64))

    def merge(self, other: Found) -> None:
        """Take in the sums over other partitions."""
        self.items_C += other.items_C
        self.counts.merge(other.counts.stages, other.counts.item_counts)
        self.capped_users += other.capped_users
        self.capped_actions += other.capped_actions
        self.users += other.users
        self.actions += other.actions

    def packed(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """As JSON and arrays; of items only those that have something."""
        dense = {"": self.items_C, **{f"/{name}": counts for name, counts in self.counts.item_counts.items()}}
        arrays = {}
        for name, counts in dense.items():
            arrays[f"at{name}"] = np.flatnonzero(counts)
            arrays[f"count{name}"] = counts[arrays[f"at{name}"]]
        plain = {
            "sizes": {name: len(counts) for name, counts in dense.items()},
            "stages": self.counts.stages,
            "sums": [self.capped_users, self.capped_actions, self.users, self.actions],
        }
        return plain, arrays

    @staticmethod
    def unpacked(plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> Found:
        dense = {}
        for name, size in plain["sizes"].items():
            dense[name] = np.zeros(size, dtype=np.int64)
            dense[name][arrays[f"at{name}"]] = arrays[f"count{name}"]
        items_C = dense.pop("")
        counts = Counts(plain["stages"], {name.removeprefix("/"): counts for name, counts in dense.items()})
        return Found(items_C, counts, *plain["sums"])


@dataclass(frozen=True)
class Pass:
    """``items``: C.  ``raw``: partitions are as they were read, neither capped nor sorted.  ``alive_C``: items that
    have their minimum count, where that is known."""

    options: Preparation
    items: int
    raw: bool
    alive_C: np.ndarray | None = None

    def opened(self, store: Store, partition: int, found: Found) -> Grouped | None:
        """The partition by user, in time order; None if it has no actions."""
        most = self.options.max_user_actions if self.raw else None
        table = store.read(partition) if most is None else self._capped(store, partition, most, found)
        if table is None or not table.num_rows:
            return None
        grouped = (group if self.raw else grouped_before)(table)
        if most is not None:  # what was read was counted before it was capped
            found.counts.add_users(len(grouped.users_R))
            found.counts.add("latest of each user", grouped, self.items)
        elif self.raw:
            found.counts.add("read", grouped, self.items)
        return grouped

    def _capped(self, store: Store, partition: int, most: int, found: Found) -> pa.Table | None:
        """The partition's actions without those before the last ``most`` of their user."""
        capped, read = huge.Capped(most), 0
        for piece in store.pieces(partition):
            found.counts.add_read(piece, self.items)
            read += piece.num_rows
            capped.add(piece)
        table = capped.table()
        found.capped_users += len(capped.users)
        found.capped_actions += read - (table.num_rows if table is not None else 0)
        return table

    def minimum_counts(self, grouped: Grouped) -> Grouped:
        """Drop rare items, and users with few actions: counted before that (once) or after it (core)."""
        filter, kept = self.options.filter, grouped
        if self.alive_C is not None and not self.alive_C.all():
            kept = grouped.filter(self.alive_C[grouped.items_A])
        counted = grouped if filter.mode == "once" else kept
        enough = (counted.lengths_R >= filter.min_user_count) & (kept.lengths_R > 0)
        return kept if enough.all() else kept.filter_users(enough)


@dataclass(frozen=True)
class Sorting(Pass):
    """Sorts, drops repeats, counts items, and puts the partition back."""

    def __call__(self, store: Store, partition: int, found: Found) -> None:
        grouped = self.opened(store, partition, found)
        if grouped is None:
            return
        if self.options.duplicates == "drop_exact":
            grouped = grouped.filter(~duplicates(grouped))
            found.counts.add("duplicates dropped", grouped, self.items)
        found.items_C += np.bincount(grouped.items_A, minlength=self.items)
        store.replace(partition, grouped.table())


@dataclass(frozen=True)
class Counting(Pass):
    """Counts items among what the minimum counts leave."""

    def __call__(self, store: Store, partition: int, found: Found) -> None:
        grouped = self.opened(store, partition, found)
        if grouped is not None:
            found.items_C += np.bincount(self.minimum_counts(grouped).items_A, minlength=self.items)


@dataclass(frozen=True, kw_only=True)
class Writing(Pass):
    """Makes the sequences.  rows_C: item code -> row, -1 for one that is left out.  types: code of an action type ->
    position among their names.  catalogue: I.  of_users: what else is known of users."""

    rows_C: np.ndarray
    types: np.ndarray
    catalogue: int
    ticks_per_second: int
    of_users: UserFields | None = None

    def __call__(self, store: Store, partition: int, found: Found) -> Sequences | None:
        grouped = self.opened(store, partition, found)
        if grouped is None:
            return None
        if self.options.filter != Filter():
            grouped = self.minimum_counts(grouped)
            found.counts.add("minimum counts", grouped, self.items)
            grouped = grouped.filter_users(grouped.lengths_R >= self.options.filter.min_length)
            found.counts.add("minimum length", grouped, self.items)
        items_A = self.rows_C[grouped.items_A]
        found.users += len(grouped.users_R)
        found.actions += len(items_A)
        found.items_C += np.bincount(items_A, minlength=self.catalogue)
        return self._sequences(grouped, items_A)

    def _sequences(self, grouped: Grouped, items_A: np.ndarray) -> Sequences:
        columns = {name.removeprefix("field."): _numpy(column) for name, column in grouped.columns.items()}
        times, types = columns.pop("time", None), columns.pop("action_type", None)
        columns["item"] = items_A
        rows = Sequences.of(
            _numpy(grouped.users_R),
            grouped.offsets_R1,
            time=None if times is None else times // self.ticks_per_second,
            type=None if types is None else self.types[types],
            **columns,
        )
        return rows if self.of_users is None else rows.with_users(**self.of_users.of(grouped.users_R))


def _numpy(column: pa.Array) -> np.ndarray:
    """int64 or float64 as they are, text as an array of str objects."""
    return column.to_numpy(zero_copy_only=False)
