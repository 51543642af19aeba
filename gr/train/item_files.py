"""Files of items that a catalogue doesn't have: Parquet with ``item_id`` and whatever columns a tower reads."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.stores import first_line
from gr.errors import UserError


def read_items(path: str | os.PathLike) -> pa.Table:
    """The items of the file at ``path``, one at least, with their ``item_id``."""
    try:
        items = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"'{path}' can't be read as a Parquet file of items ({first_line(error)}): write it again"
        ) from None
    if "item_id" not in items.column_names:
        raise UserError(f"'{path}' has no column item_id (it has {', '.join(items.column_names)}): rename it")
    if not len(items):
        raise UserError(f"'{path}' has no items: write some, or leave the option out")
    return items
