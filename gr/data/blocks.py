"""BlockWriter: consecutive blocks of a sequence dataset, written as the Parquet files that they lie in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from gr.data.columns import ColumnInfo, block_digest, canonical, checksum, described, to_table
from gr.data.hashing import hash_ids
from gr.data.manifest import Block, place
from gr.data.sequences import Sequences


@dataclass
class Written:
    """What was written of consecutive blocks, for the manifest.

    times: of the first and the last action, seconds; empty without.  ends: the first and the last user, as
    [hash64, raw id]; empty where that is not looked at.  in_order: whether all users are in the order of these.
    """

    blocks: list[Block] = field(default_factory=list)
    columns: list[ColumnInfo] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    ends: list[list[Any]] = field(default_factory=list)
    in_order: bool = True

    @property
    def users(self) -> int:
        return sum(block.rows for block in self.blocks)

    @property
    def actions(self) -> int:
        return sum(block.actions for block in self.blocks)

    def append(self, other: Written) -> None:
        """Take in the blocks that come next."""
        if not other.blocks:
            return
        if self.blocks and other.columns != self.columns:
            raise ValueError(f"rows with the columns {other.columns} after rows with {self.columns}")
        in_order = self.in_order and other.in_order
        if self.ends and other.ends:
            in_order = in_order and self.ends[1] < other.ends[0]
        self.in_order = in_order
        self.ends = [*self.ends, *other.ends]
        self.ends = [self.ends[0], self.ends[-1]] if self.ends else []
        times = [*self.times, *other.times]
        self.times = [min(times), max(times)] if times else []
        self.columns = other.columns
        self.blocks += other.blocks

    def manifest_blocks(self) -> list[Block]:
        """The blocks; their first hashes only where all users are in that order."""
        return self.blocks if self.in_order else [replace(block, first_hash=None) for block in self.blocks]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> Written:
        blocks, columns = [Block(**b) for b in raw["blocks"]], [ColumnInfo(**c) for c in raw["columns"]]
        return Written(**{**raw, "blocks": blocks, "columns": columns})


class BlockWriter:
    """Writes blocks, the first of which is number ``first`` of the dataset (a multiple of those of a file), to the
    dataset's folder ``folder``.  ``earlier``: how many generations the dataset had before.

    Rows must arrive in the dataset's order, all with the same columns.  ``hashed``: they are meant to be in the order
    of (hash64(id), id), which is checked.  Memory: one block of pending rows.
    """

    def __init__(
        self, folder: Path, block_rows: int, *, first: int = 0, hashed: bool = True, earlier: int = 0
    ):
        self.folder, self.block_rows, self.first, self.earlier = folder, block_rows, first, earlier
        self.written = Written(in_order=hashed)
        self._pending: list[Sequences] = []
        self._pending_rows = 0
        self._writer: pq.ParquetWriter | None = None
        (folder / place(0, earlier)[0]).parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Sequences) -> None:
        """Append rows (their ``ordinals_R`` are ignored)."""
        self._pending.append(rows)
        self._pending_rows += len(rows)
        while self._pending_rows >= self.block_rows:
            joined = Sequences.concatenate(self._pending)
            self._write(joined.slice(0, self.block_rows))
            rest = joined.slice(self.block_rows, len(joined))
            self._pending, self._pending_rows = [rest], len(rest)

    def finish(self) -> Written:
        """Write what is pending; the last block may be short."""
        if self._pending_rows:
            self._write(Sequences.concatenate(self._pending))
        self._pending, self._pending_rows = [], 0
        self.close()
        return self.written

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, rows: Sequences) -> None:
        rows = canonical(rows)
        infos, table = described(rows), to_table(rows)
        stored = table.rename_columns(
            [{i.name: i.stored for i in infos}[name] for name in table.column_names]
        )
        file, row_group = place(self.first + len(self.written.blocks), self.earlier)
        if self.written.blocks and infos != self.written.columns:
            raise ValueError(f"rows with the columns {infos} after rows with {self.written.columns}")
        if row_group == 0:
            self.close()
            self._writer = pq.ParquetWriter(self.folder / file, stored.schema, compression="zstd")
        assert self._writer is not None
        self._writer.write_table(stored, row_group_size=len(rows))
        columns = {name: checksum(table[name].combine_chunks()) for name in table.column_names}
        one = Written(columns=infos, in_order=self.written.in_order)
        first_hash = self._order(rows.users_R, one) if one.in_order else 0
        if rows.timestamps_A is not None and len(rows.items_A):
            one.times = [int(rows.timestamps_A.min()), int(rows.timestamps_A.max())]
        one.blocks = [
            Block(file, row_group, len(rows), len(rows.items_A), block_digest(rows), columns, first_hash)
        ]
        self.written.append(one)

    @staticmethod
    def _order(users_R: np.ndarray, one: Written) -> int:
        """The hash of a block's first user; notes its ends, and whether its users are in order."""
        hashes, users = hash_ids(users_R), users_R.tolist()
        ties = np.flatnonzero(hashes[1:] == hashes[:-1]).tolist()
        one.in_order = bool((hashes[1:] >= hashes[:-1]).all()) and all(users[n] < users[n + 1] for n in ties)
        one.ends = [[int(hashes[0]), users[0]], [int(hashes[-1]), users[-1]]]
        return int(hashes[0])
