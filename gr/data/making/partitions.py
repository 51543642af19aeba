"""PartitionStore: the log cut by user hash, on disk; and grouping: a partition's actions by user, in time order.

Shapes: R users of a partition, A their actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.hashing import hash_ids
from gr.errors import UserError

MAX_BITS = 9
"""At most 512 partitions: so many files are open at once."""
PIECE_ROWS = 2**16
MOST_TEXT = 2**31 - 1
"""Bytes of a column in one piece: its offsets have 32 bits."""
# working bytes of a partition's action while it is sorted and written, measured (benchmarks/data/prepare.py)
ROW_BYTES, TEXT_BYTES, FIELD_BYTES = 120, 80, 32


class Store(Protocol):
    """Partitions as the passes over them see them."""

    @property
    def rows(self) -> np.ndarray:
        """Actions of each partition."""

    def read(self, partition: int) -> pa.Table | None:
        """A partition's actions, None if it has none."""

    def pieces(self, partition: int) -> Iterable[pa.Table]:
        """A partition's actions in parts of a bounded size, in their order."""

    def replace(self, partition: int, table: pa.Table) -> None:
        """Put ``table`` in the place of a partition's actions."""


class PartitionStore:
    """Partition p holds the actions of the users whose hash64 has the high bits p, in the log's order.

    One partition (``bits`` 0) stays in memory, more are Arrow files in ``folder``.
    """

    def __init__(self, folder: Path, bits: int):
        self.bits, self.folder = bits, folder
        self.rows = np.zeros(1 << bits, dtype=np.int64)
        """Actions of each partition."""
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._files: list[pa.OSFile] = []
        self._memory: list[pa.Table] = []
        if bits:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def partitions(self) -> int:
        return 1 << self.bits

    def add(self, table: pa.Table) -> None:
        """Append actions (column ``user`` holds raw ids) in the log's order."""
        if not self.bits:
            self._memory.append(table)
            self.rows[0] += table.num_rows
            return
        table, counts = partitioned(table, self.bits)
        self.rows += counts
        stops = np.cumsum(counts).tolist()
        for p, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            if stop > start:
                self._writer(p, table.schema).write_table(table.slice(start, stop - start))

    def close(self) -> None:
        """No more actions will come."""
        for writer in self._writers.values():
            writer.close()
        for file in self._files:
            file.close()
        self._writers, self._files = {}, []

    def read(self, partition: int) -> pa.Table | None:
        """A partition's actions, None if it has none."""
        if not self.bits:
            if len(self._memory) > 1:
                self._memory = [whole(pa.concat_tables(self._memory))]
            return self._memory[0] if self._memory else None
        path = self._path(partition)
        if not path.exists():
            return None
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            return whole(stream.read_all())

    def pieces(self, partition: int) -> Iterator[pa.Table]:
        """A partition's actions in parts of a bounded size, in their order."""
        if not self.bits:
            yield from self._memory
        elif (path := self._path(partition)).exists():
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield pa.Table.from_batches([batch])

    def replace(self, partition: int, table: pa.Table) -> None:
        """Put ``table`` in the place of a partition's actions."""
        self.rows[partition] = table.num_rows
        if not self.bits:
            self._memory = [table]
            return
        with (
            pa.OSFile(str(self._path(partition)), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=PIECE_ROWS)

    def _path(self, partition: int) -> Path:
        return self.folder / f"{partition:04d}.arrow"

    def _writer(self, partition: int, schema: pa.Schema) -> pa.ipc.RecordBatchStreamWriter:
        if partition not in self._writers:
            file = pa.OSFile(str(self._path(partition)), "wb")
            self._files.append(file)
            self._writers[partition] = pa.ipc.new_stream(file, schema)
        return self._writers[partition]


def partitioned(table: pa.Table, bits: int) -> tuple[pa.Table, np.ndarray]:
    """The actions by partition (the high ``bits`` of their user's hash64), each in the table's order; and how many
    each partition has (2^bits)."""
    if not bits:
        return whole(table), np.array([table.num_rows])
    part = (hash_column(table["user"]) >> np.uint64(64 - bits)).astype(np.uint16)
    order = np.argsort(part, kind="stable")
    return whole(table.take(pa.array(order))), np.bincount(part, minlength=1 << bits)


def busiest(pieces: Iterable[pa.Table]) -> tuple[Any, int]:
    """A partition's user with most actions, and how many these are; needs memory for its users only."""
    counts: Counter[Any] = Counter()
    for piece in pieces:
        for found in pc.value_counts(piece["user"].combine_chunks()).to_pylist():
            counts[found["values"]] += found["counts"]
    return counts.most_common(1)[0] if counts else (None, 0)


def whole(table: pa.Table) -> pa.Table:
    """The table with each column in one piece; a UserError where that is more text than one piece holds."""
    for name in table.column_names:
        column = table[name]
        if pa.types.is_string(column.type) and column.num_chunks > 1 and _text_bytes(column) > MOST_TEXT:
            raise UserError(
                f"{table.num_rows:,} actions have more than {MOST_TEXT:,} bytes of text in '{name}', which is what is "
                "worked on at a time: set memory_mb and chunk_rows to less, or partitions to more"
            )
    return table.combine_chunks()


def _text_bytes(column: pa.ChunkedArray) -> int:
    return sum(pc.sum(pc.binary_length(chunk)).as_py() or 0 for chunk in column.chunks)


def row_bytes(schema: pa.Schema) -> int:
    """Working bytes of an action of checked tables."""
    text = sum(pa.types.is_string(field.type) for field in schema)
    return (
        ROW_BYTES + TEXT_BYTES * text + FIELD_BYTES * sum(name.startswith("field.") for name in schema.names)
    )


def choose_bits(rows: int, row_bytes: int, memory_mb: int, partitions: int | None) -> int:
    """log2 of the number of partitions: each is to be worked on in ``memory_mb`` MiB."""
    if partitions is not None:
        bits = partitions.bit_length() - 1
        if partitions != 1 << bits or bits > MAX_BITS:
            raise UserError(f"partitions is {partitions}: give a power of two up to {1 << MAX_BITS}")
        return bits
    needed = -(-rows * row_bytes // (memory_mb << 20))
    bits = max(needed - 1, 0).bit_length()
    if bits > MAX_BITS:
        least = -(-rows * row_bytes // (1 << MAX_BITS)) >> 20
        raise UserError(
            f"memory_mb {memory_mb} is too little for about {rows:,} actions: set it to {least + 1} or more"
        )
    return bits


def hash_column(users: pa.ChunkedArray) -> np.ndarray:
    """hash64 (n, uint64) of a column of raw ids; text is hashed once for each distinct id."""
    if pa.types.is_integer(users.type):
        return hash_ids(users.to_numpy())
    encoded = users.combine_chunks().dictionary_encode()
    return hash_ids(encoded.dictionary.to_numpy(zero_copy_only=False))[encoded.indices.to_numpy()]


@dataclass(frozen=True)
class Grouped:
    """R users in the order of (hash64, id), their A actions in time order.

    users_R: raw ids.  offsets_R1: int64.  columns: the other columns (A) by name.
    """

    users_R: pa.Array
    offsets_R1: np.ndarray
    columns: dict[str, pa.Array]

    @property
    def lengths_R(self) -> np.ndarray:
        return np.diff(self.offsets_R1)

    @property
    def items_A(self) -> np.ndarray:
        return self.columns["item"].to_numpy()

    def table(self) -> pa.Table:
        repeated = np.repeat(np.arange(len(self.users_R)), self.lengths_R)
        return pa.table({"user": self.users_R.take(pa.array(repeated)), **self.columns})

    def filter(self, keep_A: np.ndarray) -> Grouped:
        """The kept actions (A, bool); users stay, perhaps with none."""
        kept = np.concatenate([[0], np.cumsum(keep_A)])
        mask = pa.array(keep_A)
        return Grouped(
            self.users_R, kept[self.offsets_R1], {k: v.filter(mask) for k, v in self.columns.items()}
        )

    def filter_users(self, keep_R: np.ndarray) -> Grouped:
        """The kept users (R, bool) and their actions."""
        lengths = self.lengths_R
        mask = pa.array(np.repeat(keep_R, lengths))
        offsets = np.concatenate([[0], np.cumsum(lengths[keep_R])])
        return Grouped(
            self.users_R.filter(pa.array(keep_R)),
            offsets,
            {k: v.filter(mask) for k, v in self.columns.items()},
        )


def group(table: pa.Table) -> Grouped:
    """Sort a partition's actions by (hash64(user), user, time, order in the table)."""
    encoded = table["user"].combine_chunks().dictionary_encode()
    users = encoded.dictionary
    hashes = hash_ids(users.to_numpy(zero_copy_only=False))
    by_hash = pc.sort_indices(
        pa.table({"hash": hashes, "id": users}), sort_keys=[("hash", "ascending"), ("id", "ascending")]
    ).to_numpy()
    rank = np.empty(len(users), dtype=np.int64)
    rank[by_hash] = np.arange(len(users))
    rank_A = rank[encoded.indices.to_numpy()]
    order = pa.array(
        time_order(rank_A, table["time"].to_numpy() if "time" in table.column_names else None, len(users))
    )
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rank_A, minlength=len(users)))])
    columns = {n: table[n].combine_chunks().take(order) for n in table.column_names if n != "user"}
    return Grouped(users.take(pa.array(by_hash)), offsets, columns)


def grouped_before(table: pa.Table) -> Grouped:
    """What :func:`group` gave, from its ``table()``."""
    user = table["user"].combine_chunks()
    changes = pc.not_equal(user[1:], user[:-1]).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    columns = {n: table[n].combine_chunks() for n in table.column_names if n != "user"}
    return Grouped(user.take(pa.array(starts)), np.concatenate([starts, [len(user)]]), columns)


def duplicates(grouped: Grouped) -> np.ndarray:
    """(A, bool) actions that repeat an earlier one of the same user, item and time."""
    times, items = grouped.columns["time"].to_numpy(), grouped.items_A
    user = np.repeat(np.arange(len(grouped.users_R)), grouped.lengths_R)
    tied = np.zeros(len(times), dtype=bool)
    tied[1:] = (times[1:] == times[:-1]) & (user[1:] == user[:-1])
    tied[:-1] |= tied[1:]
    rows = np.flatnonzero(tied)  # only these can repeat: sorting them is cheap
    order = rows[np.lexsort((items[rows], times[rows], user[rows]))]  # stable: repeats stay in original order
    again = np.zeros(len(times), dtype=bool)
    a, b = order[1:], order[:-1]
    again[a[(items[a] == items[b]) & (times[a] == times[b]) & (user[a] == user[b])]] = True
    return again


def time_order(rank_A: np.ndarray, time_A: np.ndarray | None, users: int) -> np.ndarray:
    """Stable order by (rank, time): by time, then by rank.  rank_A: below ``users``."""
    if time_A is None or not len(time_A):
        return _by_rank(np.arange(len(rank_A)), rank_A, users)
    first, row_bits = int(time_A.min()), len(time_A).bit_length()
    if (int(time_A.max()) - first).bit_length() + row_bits > 63:
        return _by_rank(np.argsort(time_A, kind="stable"), rank_A, users)
    # with the rows' own numbers in them keys need not be sorted stably, which is slow
    keys = ((time_A - first) << row_bits) | np.arange(len(time_A))
    keys.sort()
    return _by_rank(keys & ((1 << row_bits) - 1), rank_A, users)


def _by_rank(order: np.ndarray, rank_A: np.ndarray, users: int) -> np.ndarray:
    """``order``, sorted stably by rank: 16 bits at a time, the lowest first, which numpy does without comparing."""
    for shift in range(0, users.bit_length(), 16):
        digits = (rank_A >> shift).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order
