"""SequenceDataset: the prepared form of an action log on disk.

    DIR/sequences/part-00000.parquet   a row a user, list columns; one row group a block of ``block_rows`` users
    DIR/catalogue.parquet              a row an item, in row order: item_id, count, then whatever is known of it
    DIR/manifest.json                  schema version, counts, columns, digests, fingerprint, provenance
    DIR/counts/                        what was counted for a split (gr.data.catalogue); made again when it's gone

The layout is canonical: the same actions give the same blocks, digests and fingerprint, whoever wrote them.
Rows are users sorted by (hash64(id), id), or in the log's own order for a stream (``row_order: stream``).
DIR may be a URL of anything that fsspec reads; datasets are written to a path of this machine.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.catalogue import CATALOGUE, Catalogue
from gr.data.columns import (
    ColumnInfo,
    block_digest,
    canonical,
    checksum,
    described,
    from_table,
    to_table,
    whole,
)
from gr.data.folder import Folder, first_line, is_url
from gr.data.hashing import hash_ids
from gr.data.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Block,
    Manifest,
    fingerprint,
    place,
    read_manifest,
    to_json,
)
from gr.data.sequences import ITEM, TIME, USER_ID, Sequences
from gr.errors import UserError

BLOCK_ROWS = 1024
FOOTERS = 8
"""Parquet footers kept: one of a file of 256 blocks takes some 0.3 MiB."""
COLUMN_OF_LOG = {"time": "columns.time", "type": "columns.action_type", "value": "columns.value"}


class SequenceDataset:
    """A sequence dataset opened for reading; blocks are read when asked for.

    Opening checks the manifest, and that all files are there.  What is read is checked against the checksums that the
    manifest keeps: a column of a block the first time that this object reads it.
    """

    def __init__(self, path: str | os.PathLike):
        self.folder = Folder(path)
        self.path: Path | str = self.folder.path
        self.manifest = read_manifest(self.folder)
        self._columns = {info.name: info for info in self.manifest.columns}
        self._checked: set[tuple[int, str]] = set()
        self._footers: dict[str, pq.FileMetaData] = {}
        self._check_files()

    users = property(lambda self: self.manifest.users)
    items = property(lambda self: self.manifest.items)
    actions = property(lambda self: self.manifest.actions)

    @property
    def has_timestamps(self) -> bool:
        return TIME in self._columns

    def column(self, name: str) -> ColumnInfo:
        """What the manifest says of a column."""
        return self._columns[name]

    def first_ordinal(self, block: int) -> int:
        return block * self.manifest.block_rows

    def require(self, columns: Iterable[str], who: str) -> None:
        """Refuse a dataset without one of the columns that ``who`` needs."""
        for name in columns:
            if name not in self._columns:
                key = COLUMN_OF_LOG.get(name, f"columns.fields.{name}")
                raise UserError(
                    f"{who} needs the column '{name}', and dataset '{self.path}' has {', '.join(self._columns)}: "
                    f"prepare it again with that column mapped ({key} in the schema of the log)"
                )

    def read_block(self, block: int, columns: Iterable[str] | None = None) -> Sequences:
        """The rows of a block.  ``columns``: those wanted, of actions or of users, beside ``item``; all without it.
        Nothing else is read."""
        names = self._columns if columns is None else {ITEM, *columns}
        infos = [info for info in self.manifest.columns if info.name in names]
        if len(infos) < len(names):
            self.require(names, "what reads it")
        return from_table(self._read(block, infos), infos, self.first_ordinal(block))

    def read_user_ids(self, block: int) -> np.ndarray:
        """(rows,) raw ids of a block's users: int64 or str objects."""
        return self._read(block, [self._columns[USER_ID]]).column(USER_ID).to_numpy()

    def read_rows(self, start: int, stop: int, columns: Iterable[str] | None = None) -> Sequences:
        """Users ``start`` to ``stop`` (exclusive) of the dataset's order."""
        rows = self.manifest.block_rows
        parts = []
        for block in range(start // rows, -(-stop // rows)):
            base = self.first_ordinal(block)
            whole = self.read_block(block, columns)
            parts.append(whole.slice(max(start - base, 0), min(stop - base, len(whole))))
        return Sequences.concatenate(parts)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items."""
        return Catalogue(self)

    def _check_files(self) -> None:
        """All that the manifest names is there, and the catalogue has its rows."""
        Catalogue(self).check_footer()
        try:
            there = self.folder.files("sequences")
        except OSError:
            there = set()
        for file in dict.fromkeys(block.file for block in self.manifest.blocks):
            if file.removeprefix("sequences/") not in there:
                raise UserError(f"'{self.folder.of(file)}' is missing: prepare the dataset again")

    def _read(self, block: int, infos: list[ColumnInfo]) -> pa.Table:
        """Columns of a block, as stored, checked."""
        entry = self.manifest.blocks[block]
        where = f"row group {entry.row_group} of '{self.folder.of(entry.file)}'"
        try:
            with (
                self.folder.opened(entry.file) as source,
                pq.ParquetFile(
                    source, metadata=self._footer(entry.file), pre_buffer=self.folder.local is None
                ) as parquet,
            ):
                table = parquet.read_row_group(entry.row_group, columns=[info.stored for info in infos])
        except (OSError, pa.ArrowException, IndexError) as error:
            raise UserError(
                f"cannot read {where} ({first_line(error)}): prepare the dataset again"
            ) from error
        changed = "the files were changed after preparing; prepare the dataset again"
        if table.num_rows != entry.rows:
            raise UserError(f"{where} has {table.num_rows} rows, the manifest says {entry.rows}: {changed}")
        for info in infos:
            if info.stored not in table.column_names:
                raise UserError(f"{where} has no column '{info.stored}', the manifest says it has: {changed}")
        table = table.select([info.stored for info in infos]).rename_columns([info.name for info in infos])
        for info in infos:
            if (block, info.name) not in self._checked:
                self._check(whole(table.column(info.name)), info, entry, where, changed)
                self._checked.add((block, info.name))
        return table

    @staticmethod
    def _check(column: pa.Array, info: ColumnInfo, entry: Block, where: str, changed: str) -> None:
        if not same_type(column.type, info.arrow):
            raise UserError(
                f"column '{info.name}' in {where} is of type {column.type}, the manifest says {info.arrow}: {changed}"
            )
        if checksum(column) != entry.columns[info.name]:
            raise UserError(
                f"column '{info.name}' in {where} does not hold what was written there (its checksum differs): "
                f"{changed}"
            )

    def _footer(self, file: str) -> pq.FileMetaData:
        footer = self._footers.get(file)
        if footer is None:
            with self.folder.opened(file) as source:
                footer = pq.read_metadata(source)
            for oldest in list(self._footers)[: len(self._footers) - FOOTERS + 1]:
                self._footers.pop(oldest, None)
            self._footers[file] = footer
        return footer


def same_type(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether two types are the same but for the names of list elements."""
    while pa.types.is_list(one) and pa.types.is_list(other):
        one, other = one.value_type, other.value_type
    return one == other


class DatasetWriter:
    """Writes a sequence dataset; nothing is visible at ``path`` until :meth:`finish`.

    Rows must arrive in the dataset's order, all with the same columns.  Memory: one block of pending rows.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        name: str,
        *,
        row_order: str = "hash",
        block_rows: int = BLOCK_ROWS,
        action_type_names: list[str] | None = None,
        overwrite: bool = False,
    ):
        if is_url(os.fspath(path)):
            raise UserError(
                f"'{path}' is a URL, and a dataset is written to a path of this machine: prepare it there, then copy it"
            )
        self.path = Path(path)
        if self.path.exists() and not overwrite:
            raise UserError(f"'{self.path}' exists: choose another --out, or say --overwrite")
        if self.path.exists() and not _replaceable(self.path):
            raise UserError(
                f"'{self.path}' is not a dataset that could be overwritten: choose another --out, or move it away"
            )
        self.name, self.row_order, self.block_rows = name, row_order, block_rows
        self.action_type_names = action_type_names or []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = self.path.with_name(f".{self.path.name}.writing-{os.getpid()}")
        shutil.rmtree(self._scratch, ignore_errors=True)
        (self._scratch / "sequences").mkdir(parents=True)
        self._pending: list[Sequences] = []
        self._pending_rows = 0
        self._blocks: list[Block] = []
        self._writer: pq.ParquetWriter | None = None
        self._columns: list[ColumnInfo] = []
        self._last_user: tuple[int, Any] | None = None
        self._sorted = row_order == "hash"
        self._times: list[int] = []
        self.users = self.actions = 0

    def add(self, rows: Sequences) -> None:
        """Append rows (their ``ordinals_R`` are ignored: the writer numbers them)."""
        self._pending.append(rows)
        self._pending_rows += len(rows)
        while self._pending_rows >= self.block_rows:
            joined = Sequences.concatenate(self._pending)
            self._write(joined.slice(0, self.block_rows))
            rest = joined.slice(self.block_rows, len(joined))
            self._pending, self._pending_rows = [rest], len(rest)

    def finish(self, catalogue: pa.Table, provenance: dict[str, Any] | None = None) -> SequenceDataset:
        """Write what is pending, the catalogue and the manifest, and make the dataset visible by one rename."""
        if self._pending_rows:
            self._write(Sequences.concatenate(self._pending))
        if self._writer is None:
            raise UserError(f"no sequence is left to write to '{self.path}': check the filters and the log")
        self._writer.close()
        pq.write_table(catalogue, self._scratch / CATALOGUE)
        stored = pq.read_table(self._scratch / CATALOGUE)  # Parquet doesn't keep every type as it is
        digests = [block.digest for block in self._blocks]
        identity = (self.row_order, self.block_rows, catalogue.num_rows, digests)
        manifest = Manifest(
            name=self.name,
            schema_version=SCHEMA_VERSION,
            row_order=self.row_order,
            block_rows=self.block_rows,
            users=self.users,
            items=catalogue.num_rows,
            actions=self.actions,
            columns=self._columns,
            first_time=min(self._times, default=None),
            last_time=max(self._times, default=None),
            action_type_names=self.action_type_names,
            catalogue={n: checksum(stored[n].combine_chunks()) for n in stored.column_names},
            fingerprint=fingerprint(*identity),
            generation=fingerprint(*identity, _some_at_a_time(catalogue["item_id"])),
            blocks=self._blocks if self._sorted else [replace(b, first_hash=None) for b in self._blocks],
            digest="",
            provenance=provenance or {},
        )
        (self._scratch / MANIFEST).write_text(to_json(manifest))
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self._scratch, self.path)
        return SequenceDataset(self.path)

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self._writer is not None:
            self._writer.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _write(self, rows: Sequences) -> None:
        rows = canonical(rows)
        infos, table = described(rows), to_table(rows)
        stored = table.rename_columns(
            [{i.name: i.stored for i in infos}[name] for name in table.column_names]
        )
        file, row_group = place(len(self._blocks))
        if not self._blocks:
            self._columns = infos
        elif infos != self._columns:
            raise ValueError(f"rows with the columns {infos} after rows with {self._columns}")
        if row_group == 0:
            if self._writer is not None:
                self._writer.close()
            self._writer = pq.ParquetWriter(self._scratch / file, stored.schema, compression="zstd")
        assert self._writer is not None
        self._writer.write_table(stored, row_group_size=len(rows))
        columns = {name: checksum(table[name].combine_chunks()) for name in table.column_names}
        first_hash = self._next_users(rows.users_R)
        actions = len(rows.items_A)
        self._blocks.append(
            Block(file, row_group, len(rows), actions, block_digest(rows), columns, first_hash)
        )
        self.users += len(rows)
        self.actions += actions
        if rows.timestamps_A is not None and actions:
            self._times += [int(rows.timestamps_A.min()), int(rows.timestamps_A.max())]
            self._times = [min(self._times), max(self._times)]

    def _next_users(self, users_R: np.ndarray) -> int:
        """The hash of the first one; notes whether users still come in the order of (hash64(id), id)."""
        if not self._sorted:
            return 0
        hashes_R = hash_ids(users_R)
        if self._last_user is not None:
            hash, user = self._last_user
            hashes, users = np.append(np.uint64(hash), hashes_R), [user, *users_R.tolist()]
        else:
            hashes, users = hashes_R, users_R.tolist()
        ties = np.flatnonzero(hashes[1:] == hashes[:-1]).tolist()
        self._sorted = bool((hashes[1:] >= hashes[:-1]).all()) and all(users[n] < users[n + 1] for n in ties)
        self._last_user = int(hashes_R[-1]), users[-1]
        return int(hashes_R[0])


def _some_at_a_time(column: pa.ChunkedArray, size: int = 1 << 16) -> Iterator[list]:
    """Its values: as Python's own they take many times the column's memory."""
    return (column.slice(start, size).to_pylist() for start in range(0, len(column), size))


def _replaceable(path: Path) -> bool:
    """Whether nothing but a dataset is lost with the folder."""
    if path.is_symlink() or not path.is_dir():
        return False
    ours = {"sequences", CATALOGUE, MANIFEST, "quarantine", "counts"}
    return {entry.name for entry in path.iterdir()} <= ours
