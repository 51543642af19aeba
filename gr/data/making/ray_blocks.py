"""BlocksReader: the blocks of a Ray Data dataset as an action log; whatever Ray reads is checked as files are."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

import gr
from gr.data.cluster import import_ray
from gr.data.making import convert
from gr.data.making.files import DataFile, require_column
from gr.data.making.log import PART_ROWS, SAMPLED_ROWS, Located, LogReader, in_group
from gr.data.making.log_types import check_type, go_together, lay_out_typed
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import LogSchema
from gr.errors import UserError

LOOKED_THROUGH = 2**28
"""Bytes of blocks that are looked through for the types of columns, before any is read."""


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

    Types are those of the first block in which a column has values.  A bad row is named by the number of its block and
    its row in it.
    """

    GROUP = "block"

    def __init__(self, name: str, dataset: Any, schema: LogSchema):
        """``name``: what messages call it; ``dataset``: a ray.data.Dataset of a cluster that is joined."""
        self._map(schema)
        self.files = [DataFile(LocalFileSystem(), name, "block")]
        dataset.context.execution_options.preserve_order = True
        self._stream = _blocks(name, dataset)
        self._waiting: list[BlockPiece] = []
        self.first, types, read = self._looked_through(name)
        self._lay_out(
            lay_out_typed(
                [(self.files[0], types, [len(self.first)], None)], schema, self.columns, self.fields
            )
        )
        self.kinds = {role: convert.plain_type(types.field(name).type) for role, name in self.columns.items()}
        if unknown := self._unknown(types):
            self._notes.append(
                f"no value of column '{unknown[0]}' is in the first {read:,} rows of '{name}', so nothing says its "
                "type: it is taken as text where the schema doesn't say another"
            )
        self.estimated_rows = 0  # not known before all of them are made

    def _looked_through(self, name: str) -> tuple[pa.Table, pa.Schema, int]:
        """The first block with rows, its types, and how many rows were looked through for them: Ray gives a column
        without a value in a block no type there, and later blocks may say one."""
        first, types = pa.table({}), pa.schema([])
        rows = bytes = 0
        for piece in self._ahead():
            if not (table := _arrow(name, piece)).num_rows:
                continue
            if not rows:
                first, types = table, table.schema
            rows, bytes = rows + table.num_rows, bytes + table.nbytes
            for column in self._unknown(types):
                if table.column_names.count(column) == 1:
                    types = types.set(types.get_field_index(column), table.schema.field(column))
            if not self._unknown(types) or bytes > LOOKED_THROUGH:
                break
        if not rows:
            raise UserError(f"the dataset of '{name}' has no rows: check what it reads")
        return first, types, rows

    def _unknown(self, types: pa.Schema) -> list[str]:
        """Mapped columns, but values, without a type.  (One that isn't there, or is twice, is refused later.)"""
        columns = [name for role, name in self.columns.items() if role != "value"]
        once = [name for name in dict.fromkeys(columns) if types.names.count(name) == 1]
        return [name for name in once if pa.types.is_null(types.field(name).type)]

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
        start, table = 0, _arrow(self.files[0].path, piece)
        if not table.num_rows:
            return
        name = f"block {piece.block} of {self.files[0].name}"
        self._check_types(name, table.schema)
        for batch in self._of_table(table, chunk_rows):
            yield batch, partial(in_group, piece.block, start)
            start += batch.num_rows

    def _check_types(self, name: str, block: pa.Schema) -> None:
        """Refuse a block that isn't read as the types of the first one say."""
        for role, column in self.columns.items():
            require_column(name, column, block.names)
            kind, first = convert.plain_type(block.field(column).type), self.kinds[role]
            if pa.types.is_null(kind):
                continue
            check_type(name, role, column, kind, self.fields)
            if not go_together(role, kind, first):
                raise UserError(
                    f"'{name}', column '{column}': type {kind}, where the first block has {first}; cast it to one type "
                    "in the dataset"
                )

    def _of_table(self, table: pa.Table, chunk_rows: int) -> list[pa.RecordBatch]:
        return table.select(list(dict.fromkeys(self.columns.values()))).to_batches(max_chunksize=chunk_rows)


def _blocks(name: str, dataset: Any) -> Iterator[BlockPiece]:
    number = 0
    with making(name):
        for bundle in dataset.iter_internal_ref_bundles():
            for entry, part in zip(bundle.blocks, bundle.slices or [None] * len(bundle.blocks)):
                start, stop = (part.start_offset, part.end_offset) if part else (0, entry.metadata.num_rows)
                yield BlockPiece(number, entry.ref, start, stop)
                number += 1


def _arrow(name: str, piece: BlockPiece) -> pa.Table:
    ray = import_ray()
    from ray.data.block import BlockAccessor

    with making(name):
        table = BlockAccessor.for_block(ray.get(piece.reference)).to_arrow()
        return table.slice(piece.start, None if piece.stop is None else piece.stop - piece.start)


@contextmanager
def making(name: str) -> Iterator[None]:
    """Whatever goes wrong while the function ``name``, or what it has Ray do, makes rows is one sentence."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"'{name}' failed ({_said(error)}): correct it, or see to the cluster") from None


def _said(error: BaseException) -> str:
    """What an error says, and where it was raised.  Ray's own are whole tracebacks, of other processes."""
    lines = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines()
    raised = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception|Interrupt)\b", line)]
    if raised and len(lines) > 1:
        places = [(found[1], found[2]) for found in map(_PLACE.match, lines) if found]
        said = raised[0]
    else:
        places = [(frame.filename, f"{frame.lineno}") for frame in traceback.extract_tb(error.__traceback__)]
        said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    ours = os.path.dirname(gr.__file__)
    own = [(file, line) for file, line in places if os.path.exists(file) and not _NOT_OWN.search(file)]
    own = [(file, line) for file, line in own if not file.startswith(f"{ours}{os.sep}")]
    return f"{said}, line {own[-1][1]} of '{own[-1][0]}'" if own else said


_PLACE = re.compile(r'\s*File "(.*)", line (\d+)')
_NOT_OWN = re.compile(r"[/\\](site-packages|lib[/\\]python[\d.]+)[/\\]")
