"""Preparing in one process: one partition after the other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from gr.data.folder import Folder
from gr.data.making import huge
from gr.data.making.executor import Actions, name_of, workplace
from gr.data.making.ids import IdCodes
from gr.data.making.partitions import PartitionStore, choose_bits, row_bytes, whole
from gr.data.making.passes import Counting, Found, Sorting, Writing
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import Preparation
from gr.data.sequences import Sequences
from gr.data.writing import BLOCK_ROWS, DatasetWriter
from gr.errors import UserError
from gr.progress import Progress, Stage


class InProcess:
    """The partitions lie in a folder that is removed at the end, whatever that is."""

    def __init__(self, actions: Actions, out: str, options: Preparation, progress: Progress):
        self.actions, self.out, self.options, self.progress = actions, out, options, progress
        self.row_bytes = row_bytes(actions.table_schema)
        bits = choose_bits(actions.estimated_rows, self.row_bytes, options.memory_mb, options.partitions)
        prefix = f".{name_of(out)}.preparing-"
        self.scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=workplace(out, options)))
        self.dataset = self.scratch / "dataset" if Folder(out).local is None else None
        self.quarantine = Quarantine(
            self.scratch / "quarantine" if options.on_bad_rows == "quarantine" else None
        )
        self.store = PartitionStore(self.scratch / "partitions", bits)
        self.items = IdCodes("item")  # an append has some beforehand
        self.partition: int | None = None  # the last one that was begun

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the disk may be full
            self.store.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def out_of_memory(self) -> UserError:
        if self.partition is None:
            return huge.out_of_memory_reading(self.out, self.options.chunk_rows)
        return huge.out_of_memory(
            self.out, self.store, self.partition, self.row_bytes, self.options.memory_mb
        )

    def read(self, stage: Stage) -> tuple[IdCodes, IdCodes]:
        types = IdCodes("action type")
        read_into(
            self.store.add, self.actions, self.options, self.quarantine, self.items, types, stage.advance
        )
        self.quarantine.close()
        self.store.close()
        return self.items, types

    def go(self, name: str, step: Sorting | Counting, found: Found) -> Found:
        for partition in self._partitions(name):
            step(self.store, partition, found)
        return found

    def write(self, step: Writing, found: Found, writer: DatasetWriter) -> Found:
        for partition in self._partitions("writing"):
            for block in blocks(step(self.store, partition, found)):
                writer.add(block)
        return found

    def _partitions(self, name: str) -> Iterator[int]:
        with self.progress.stage(name, int(self.store.rows.sum())) as stage:
            for partition, rows in enumerate(self.store.rows.tolist()):
                self.partition = partition
                yield partition
                stage.advance(rows)


def read_into(
    add: Callable[[pa.Table], None],
    actions: Actions,
    options: Preparation,
    quarantine: Quarantine,
    items: IdCodes,
    types: IdCodes,
    advance: Callable[[int], None],
) -> None:
    """``add`` the log's checked actions, chunk by chunk, items and action types as codes."""
    for table in _chunks(actions.tables(options.chunk_rows, quarantine), options.chunk_rows):
        coded = {"user": table["user"], "item": items.codes(table["item"].combine_chunks())}
        for column in table.column_names:
            if column == "action_type":
                coded[column] = types.codes(table[column].combine_chunks())
            elif column not in coded:
                coded[column] = table[column]
        add(pa.table(coded))
        advance(table.num_rows)


def blocks(rows: Sequences | None) -> Iterator[Sequences]:
    """Consecutive parts of at most a block's rows, without copies: the writer joins only what it needs."""
    size = 0 if rows is None else len(rows)
    for first in range(0, size, BLOCK_ROWS):
        assert rows is not None
        yield rows.slice(first, min(first + BLOCK_ROWS, size))


def _chunks(tables: Iterator[pa.Table], chunk_rows: int) -> Iterator[pa.Table]:
    """Small tables joined to about ``chunk_rows`` rows: the cost of a chunk is not paid for every small file."""
    pending: list[pa.Table] = []
    rows = 0
    for table in tables:
        pending.append(table)
        rows += table.num_rows
        if rows >= chunk_rows:
            yield whole(pa.concat_tables(pending))
            pending, rows = [], 0
    if pending:
        yield whole(pa.concat_tables(pending))
