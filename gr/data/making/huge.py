"""Users with more actions than a partition's memory holds: the cap that keeps their latest, the sentences that name
them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from gr.data.making.partitions import PIECE_ROWS, Store, busiest, time_order, whole
from gr.errors import UserError

COPIES = 2
"""A user's actions lie in memory so often while their block is written."""


def latest(table: pa.Table, most: int) -> tuple[pa.Table, pa.Array]:
    """Each user's latest ``most`` actions, by time and then by order, in the table's order; and the users that had
    more."""
    encoded = table["user"].combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    if not (counts > most).any():
        return table, encoded.dictionary[:0]
    rows = np.flatnonzero(counts[codes] > most)
    times = table["time"].to_numpy()[rows] if "time" in table.column_names else None
    order = rows[time_order(codes[rows].astype(np.int64), times, len(counts))]
    many = np.flatnonzero(counts > most)
    stops = np.cumsum(counts[many])
    from_end = np.repeat(stops, counts[many]) - np.arange(len(order))  # 1 is a user's last
    kept = np.ones(table.num_rows, dtype=bool)
    kept[order[from_end > most]] = False
    return table.filter(pa.array(kept)), encoded.dictionary.take(pa.array(many))


class Capped:
    """A partition's actions added piece by piece, of which each user's latest ``most`` stay.  The latest of all are
    among the latest of each part, so memory is that of what stays, and as much again."""

    def __init__(self, most: int):
        self.most = most
        self.users: set[Any] = set()
        """Those that had more."""
        self._kept: list[pa.Table] = []
        self._rows = self._limit = 0

    def add(self, piece: pa.Table) -> None:
        self._kept.append(piece)
        self._rows += piece.num_rows
        if self._rows > self._limit + PIECE_ROWS:
            self.table()
            self._limit = 2 * self._rows

    def table(self) -> pa.Table | None:
        """What stays, None if nothing was added."""
        if not self._kept:
            return None
        table, users = latest(whole(pa.concat_tables(self._kept)), self.most)
        self.users.update(users.to_pylist())
        self._kept, self._rows = [table], table.num_rows
        return table.combine_chunks()


def who_is_huge(store: Store, row_bytes: int, memory_mb: int) -> list[str]:
    """Sentences about users whose actions alone take more than the memory meant for a partition."""
    said = []
    for partition in np.flatnonzero(store.rows * row_bytes > COPIES * (memory_mb << 20)).tolist():
        user, actions = busiest(store.pieces(partition))
        if actions * row_bytes > memory_mb << 20:
            needed = COPIES * actions * row_bytes >> 20
            said.append(
                f"user {user!r} has {actions:,} of the {store.rows.sum():,} actions, which take about {needed:,} MiB "
                f"of memory where memory_mb is {memory_mb}: set max_user_actions to keep only the latest of each user"
            )
    return said


def out_of_memory_reading(out: str, chunk_rows: int) -> UserError:
    """What to say where memory ran out before there were partitions."""
    return UserError(
        f"out of memory while reading the log for '{out}': set chunk_rows to less than {chunk_rows:,}, or give it more "
        "memory"
    )


def out_of_memory(out: str, store: Store, partition: int, row_bytes: int, memory_mb: int) -> UserError:
    """The sentence for it, at a partition: who needs the memory, and what to do."""
    user, actions = busiest(store.pieces(partition))
    rows = int(store.rows[partition])
    if 2 * actions > rows and COPIES * actions * row_bytes > memory_mb << 20:
        return UserError(
            f"out of memory for '{out}': user {user!r} has {actions:,} of the {store.rows.sum():,} actions, and a "
            "user's actions are not cut; set max_user_actions to keep only the latest of each user, or give it more "
            "memory"
        )
    return UserError(
        f"out of memory for '{out}' at a partition of {rows:,} actions: set memory_mb to less than {memory_mb}, or "
        "give it more memory"
    )
