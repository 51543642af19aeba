"""Files of items that a catalogue doesn't have: Parquet with ``item_id`` and whatever columns a tower reads."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc

from gr.data.making.convert import can_be_ids, plain
from gr.data.stores import remedy
from gr.errors import UserError, first_line
from gr.train.place import parquet_file, place


def read_items(path: str | os.PathLike) -> pa.Table:
    """The items of the file at ``path``, one at least, each with an ``item_id`` of its own."""
    try:
        items = parquet_file(place(path)).read()
    except FileNotFoundError:
        raise UserError(f"no file '{path}' with items: write item_id and their columns as Parquet") from None
    except (OSError, pa.ArrowException) as error:
        fix = remedy(error, "write it again")
        raise UserError(
            f"'{path}' can't be read as a Parquet file of items ({first_line(error)}): {fix}"
        ) from None
    if "item_id" not in items.column_names:
        raise UserError(f"'{path}' has no column item_id (it has {', '.join(items.column_names)}): rename it")
    if again := [name for name in items.column_names if items.column_names.count(name) > 1]:
        raise UserError(f"'{path}' has several columns '{again[0]}': leave one of them")
    if not len(items):
        raise UserError(f"'{path}' has no items: write some, or leave the option out")
    _check_ids(items["item_id"], path)
    return items


def _check_ids(column: pa.ChunkedArray, path: str | os.PathLike) -> None:
    if not can_be_ids(column.type):
        raise UserError(f"column item_id of '{path}' is of type {column.type}: write ids, integers or text")
    if column.null_count:
        raise UserError(f"'{path}' has {column.null_count:,} items without an item_id: fill it in")
    counts = pc.value_counts(plain(column.combine_chunks()))
    again = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(again):
        raise UserError(
            f"'{path}' has {len(again):,} ids more than once ({again[0]['values'].as_py()!r} is the first): leave one "
            "of each"
        )
