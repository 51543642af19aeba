"""SequenceDataset: the prepared form of an action log on disk.

    DIR/sequences/part-00000.parquet   a row a user, list columns; one row group a block of ``block_rows`` users
    DIR/catalogue.parquet              a row an item, in row order: item_id, count, then whatever is known of it
    DIR/manifest.json                  schema version, counts, columns, digests, fingerprint, provenance
    DIR/counts/                        what was counted for a split (gr.data.catalogue); made again when it's gone
    DIR/sequences-1/, catalogue-1...   of the generation made by the first append; the one before is kept, with its
    DIR/manifest-0.json                manifest, until the next append, for those who read it

The layout is canonical: the same actions give the same blocks, digests and fingerprint, whoever wrote them.
Rows are users sorted by (hash64(id), id), or in the log's own order for a stream (``row_order: stream``).
DIR may be a URL of anything that fsspec reads and writes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.catalogue import Catalogue
from gr.data.columns import ColumnInfo, checksum, from_table, whole
from gr.data.folder import Folder
from gr.data.manifest import (
    Block,
    Manifest,
    read_manifest,
)
from gr.data.sequences import ITEM, TIME, USER_ID, Sequences
from gr.data.stores import AHEAD, Unreachable, in_order, remedy
from gr.errors import UserError, first_line

if TYPE_CHECKING:
    from gr.data.transforms.transform import Filter

FOOTERS, FOOTERS_OF_A_STORE = 8, 256
"""Parquet footers kept: one of a file of 256 blocks takes some 0.3 MiB, and two requests."""
COLUMN_OF_LOG = {"time": "columns.time", "type": "columns.action_type", "value": "columns.value"}


class SequenceDataset:
    """A sequence dataset opened for reading; blocks are read when asked for.

    Opening checks the manifest, and that all files are there.  What is read is checked against the checksums that the
    manifest keeps: a column of a block the first time that this object reads it, or reads it from a file that was
    replaced.
    """

    def __init__(self, path: str | os.PathLike, generation: str | None = None):
        """``generation``: the one to open, if the dataset has grown from it; else the newest."""
        self.folder = Folder(path)
        self.path: Path | str = self.folder.path
        self.manifest = read_manifest(self.folder)
        if generation in self.manifest.earlier:
            self.manifest = self._earlier(self.manifest.earlier.index(generation))
        self._columns = {info.name: info for info in self.manifest.columns}
        self._checked: set[tuple[int, str]] = set()
        self._footers: dict[str, pq.FileMetaData] = {}
        self._marks: dict[str, tuple[int, ...] | None] = {}
        self._reading_footer = threading.Lock()
        self.filters: tuple[Filter, ...] = ()
        self._check_files()

    users = property(lambda self: self.manifest.users)
    items = property(lambda self: self.manifest.items)
    actions = property(lambda self: self.manifest.actions)

    @property
    def has_timestamps(self) -> bool:
        return TIME in self._columns

    def filtered(self, filters: tuple[Filter, ...]) -> SequenceDataset:
        """The same users with those of their actions alone that all ``filters`` keep, whoever reads them; the
        manifest's counts stay those of all."""
        if filters == self.filters:
            return self
        other = copy(self)
        other.__dict__.pop("catalogue", None)
        other.filters = filters
        return other

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
        names = set(self._columns if columns is None else {ITEM, *columns})
        read = names.union(*(f.needs for f in self.filters))
        infos = [info for info in self.manifest.columns if info.name in read]
        if len(infos) < len(read):
            self.require(read, "what reads it")
        rows = from_table(self._read(block, infos), infos, self.first_ordinal(block))
        for one in self.filters:
            rows = rows.keep(one.kept(rows, self.manifest))
        return rows.select(names) if read > names else rows

    @property
    def ahead(self) -> int:
        """Blocks that are best read at the same time: one waits for a store, not for a disk."""
        return 0 if self.folder.local is not None else AHEAD

    def read_blocks(self, blocks: Iterable[int], columns: Iterable[str] | None = None) -> Iterator[Sequences]:
        """:meth:`read_block` of each, in order, ``ahead`` of them at the same time."""
        names = None if columns is None else frozenset(columns)
        return in_order(lambda block: self.read_block(block, names), blocks, self.ahead)

    def read_user_ids(self, block: int) -> np.ndarray:
        """(rows,) raw ids of a block's users: int64 or str objects."""
        return self._read(block, [self._columns[USER_ID]]).column(USER_ID).to_numpy()

    def read_rows(self, start: int, stop: int) -> Sequences:
        """Users ``start`` to ``stop`` (exclusive) of the dataset's order."""
        rows = self.manifest.block_rows
        parts = []
        for block in range(start // rows, -(-stop // rows)):
            base = self.first_ordinal(block)
            whole = self.read_block(block)
            parts.append(whole.slice(max(start - base, 0), min(stop - base, len(whole))))
        return Sequences.concatenate(parts)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items."""
        return Catalogue(self)

    def _earlier(self, number: int) -> Manifest:
        name = f"manifest-{number}.json"
        try:
            self.folder.read(name)
        except OSError:
            raise _outgrown(self.path, self.manifest, number) from None
        return read_manifest(self.folder, name)

    def _check_outgrown(self) -> None:
        """Refuse a dataset from which files went because it has grown twice since it was opened."""
        newest = read_manifest(self.folder)
        if self.manifest.generation in newest.earlier[:-1]:
            raise _outgrown(self.path, newest, newest.earlier.index(self.manifest.generation))

    def _check_files(self) -> None:
        """All that the manifest names is there, and the catalogue has its rows."""
        self.catalogue.check_footer()
        try:
            there = self.folder.files(self.manifest.sequences_folder)
        except Unreachable as error:
            where = self.folder.of(self.manifest.sequences_folder)
            raise UserError(f"cannot list '{where}' ({first_line(error)}): {remedy(error, '')}") from error
        except OSError:
            there = set()
        for file in dict.fromkeys(block.file for block in self.manifest.blocks):
            if file.rpartition("/")[2] not in there:
                raise UserError(f"'{self.folder.of(file)}' is missing: prepare the dataset again")

    def _read(self, block: int, infos: list[ColumnInfo]) -> pa.Table:
        """Columns of a block, as stored, checked."""
        entry = self.manifest.blocks[block]
        where = f"row group {entry.row_group} of '{self.folder.of(entry.file)}'"
        stored = [info.stored for info in infos]
        try:
            footer = self._footer(entry.file)
            with self.folder.parquet(entry.file, footer, [entry.row_group], stored) as parquet:
                # with one thread, Arrow's pool of threads is only a detour
                table = parquet.read_row_group(
                    entry.row_group, columns=stored, use_threads=pa.cpu_count() > 1
                )
        except (OSError, pa.ArrowException, IndexError) as error:
            if isinstance(error, FileNotFoundError):
                self._check_outgrown()
            raise UserError(
                f"cannot read {', '.join(info.name for info in infos)} in {where} ({first_line(error)}): "
                f"{remedy(error, 'prepare the dataset again')}"
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
        with self._reading_footer:
            mark = self.folder.mark(file)
            if self._marks.setdefault(file, mark) != mark:  # replaced: nothing is known of it
                self._marks[file] = mark
                self._footers.pop(file, None)
                known = list(self._checked)  # other threads add to it meanwhile
                self._checked = {each for each in known if self.manifest.blocks[each[0]].file != file}
            footer = self._footers.get(file)
            if footer is None:
                with self.folder.parquet(file) as parquet:
                    footer = parquet.metadata
                kept = FOOTERS if self.folder.local is not None else FOOTERS_OF_A_STORE
                for oldest in list(self._footers)[: len(self._footers) - kept + 1]:
                    self._footers.pop(oldest, None)
                self._footers[file] = footer
            return footer


def _outgrown(path: Path | str, newest: Manifest, number: int) -> UserError:
    """``number``: of the generation, among the earlier ones of the ``newest``."""
    return UserError(
        f"'{path}' has grown by {len(newest.earlier) - number} appends since the generation "
        f"{newest.earlier[number]}, whose files are gone: append keeps one earlier generation, so use a "
        "checkpoint at the end of an epoch to go on with the newest"
    )


def same_type(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether two types are the same but for the names of list elements."""
    while pa.types.is_list(one) and pa.types.is_list(other):
        one, other = one.value_type, other.value_type
    return one == other
