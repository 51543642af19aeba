"""BlocksReader: the blocks of a Ray Data dataset as an action log; whatever Ray reads is checked as files are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from gr.data.cluster import import_ray
from gr.data.making import convert
from gr.data.making.files import DataFile, require_column
from gr.data.making.log import PART_ROWS, SAMPLED_ROWS, Located, LogReader, in_group
from gr.data.making.log_types import lay_out_typed
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import LogSchema
from gr.errors import UserError


class BlockPiece(NamedTuple):
    """Number of a block in the dataset's order, where it is, and which of its rows count (all up to its end where
    ``stop`` is None)."""

    block: int
    reference: Any
    start: int
    stop: int | None
    file: int = 0

    @property
    def rows(self) -> int:
        return 1 if self.stop is None else self.stop - self.start


class BlocksReader(LogReader):
    """Reads a dataset's blocks in its own order, as they are made.

    Types are those of the first block with rows.  A bad row is named by the number of its block and its row in it.
    """

    GROUP = "block"

    def __init__(self, name: str, dataset: Any, schema: LogSchema):
        """``name``: what messages call it; ``dataset``: a ray.data.Dataset of a cluster that is joined."""
        self._map(schema)
        self.files = [DataFile(LocalFileSystem(), name, "block")]
        dataset.context.execution_options.preserve_order = True
        self._stream = _blocks(dataset)
        self._waiting: list[BlockPiece] = []
        tables = (_arrow(piece) for piece in self._ahead() if piece.rows)
        first = next((table for table in tables if table.num_rows), None)
        if first is None:
            raise UserError(f"the dataset of '{name}' has no rows: check what it reads")
        self.first = first
        only = (self.files[0], first.schema, [first.num_rows], None)
        self._lay_out(lay_out_typed([only], schema, self.columns, self.fields))
        self.estimated_rows = 0  # not known before all of them are made

    def _to_read(self) -> Iterator[BlockPiece]:
        """Each block once."""
        while self._waiting:
            yield self._waiting.pop(0)
        yield from self._stream

    def _take(self, part: list[BlockPiece]) -> None:
        self._waiting, self._stream = part, iter([])

    def _ahead(self) -> Iterator[BlockPiece]:
        yield from list(self._waiting)
        for piece in self._stream:
            self._waiting.append(piece)
            yield piece

    def identity(self) -> None:
        return None

    def parts(self) -> Iterator[list[BlockPiece]]:
        part: list[BlockPiece] = []
        for piece in self._to_read():
            if part and sum(p.rows for p in part) + piece.rows > PART_ROWS:
                yield part
                part = []
            part.append(piece)
        if part:
            yield part

    def __getstate__(self) -> dict[str, Any]:
        """Without the blocks: each goes to who reads it."""
        return {
            **super().__getstate__(),
            "_stream": iter([]),
            "_waiting": [],
            "first": self.first.schema.empty_table(),
        }

    def _sample(self, file: DataFile) -> pa.RecordBatch:
        return next(iter(self._of_table(self.first.slice(0, SAMPLED_ROWS), SAMPLED_ROWS)))

    def _batches(self, piece: BlockPiece, chunk_rows: int, quarantine: Quarantine) -> Iterator[Located]:
        start, table = 0, _arrow(piece)
        if not table.num_rows:
            return
        name = f"block {piece.block} of {self.files[0].name}"
        for column in dict.fromkeys(self.columns.values()):
            require_column(name, column, table.column_names)
        if "time" in self.columns:
            time = self.columns["time"]
            kinds = [convert.plain_type(t.schema.field(time).type) for t in (table, self.first)]
            if kinds[0] != kinds[1] and not pa.types.is_null(kinds[0]):
                raise UserError(
                    f"'{name}', column '{time}': type {kinds[0]}, where the first block has {kinds[1]}; cast it to one "
                    "type in the dataset"
                )
        for batch in self._of_table(table, chunk_rows):
            yield batch, partial(in_group, piece.block, start)
            start += batch.num_rows

    def _of_table(self, table: pa.Table, chunk_rows: int) -> list[pa.RecordBatch]:
        return table.select(list(dict.fromkeys(self.columns.values()))).to_batches(max_chunksize=chunk_rows)


def _blocks(dataset: Any) -> Iterator[BlockPiece]:
    number = 0
    for bundle in dataset.iter_internal_ref_bundles():
        for entry, part in zip(bundle.blocks, bundle.slices or [None] * len(bundle.blocks)):
            start, stop = (part.start_offset, part.end_offset) if part else (0, entry.metadata.num_rows)
            yield BlockPiece(number, entry.ref, start, stop)
            number += 1


def _arrow(piece: BlockPiece) -> pa.Table:
    ray = import_ray()
    from ray.data.block import BlockAccessor

    table = BlockAccessor.for_block(ray.get(piece.reference)).to_arrow()
    return table.slice(piece.start, None if piece.stop is None else piece.stop - piece.start)
