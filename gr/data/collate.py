"""Rows of a dataset -> SequenceBatch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from gr.batch import Jagged, SequenceBatch
from gr.data.sequences import ITEM, Column, Sequences
from gr.errors import UserError


def collate(rows: Sequences, columns: Iterable[str] | None = None) -> SequenceBatch:
    """The rows as they are, as CPU tensors (see :class:`gr.batch.SequenceBatch` for shapes and dtypes).

    columns: the names of those that the batch carries, beside ``item``; every column of numbers without it.  Whole
    numbers become int64, others float32.
    """
    wanted = None if columns is None else {ITEM, *columns}

    def chosen(named: Iterable[tuple[str, Column]]) -> dict:
        return {
            name: tensor(name, column)
            for name, column in named
            if (_is_numeric(column) if wanted is None else name in wanted)
        }

    user_columns = rows.user_columns.items() if columns is not None else ()
    return SequenceBatch(
        offsets_B1=torch.from_numpy(rows.offsets_R1.astype(np.int64)),
        ordinals_B=torch.from_numpy(rows.ordinals_R.astype(np.int64)),
        lengths=tuple(rows.lengths_R.tolist()),
        columns=chosen(rows.columns.items()),
        user_columns=chosen(user_columns),
    )


def tensor(name: str, column: Column) -> torch.Tensor | Jagged:
    """The column as CPU tensors, int64 or float32; ``name`` is what a refusal calls it."""
    if isinstance(column, Jagged):
        return Jagged(torch.from_numpy(column.offsets.astype(np.int64)), tensor(name, column.values))
    if not _is_numeric(column):
        raise UserError(
            f"column '{name}' is text and a model reads numbers: give it type integer or float in the schema, or "
            "leave it out of the columns that are needed"
        )
    whole = np.issubdtype(column.dtype, np.integer)
    return torch.from_numpy(column.astype(np.int64 if whole else np.float32))


def _is_numeric(column: Column) -> bool:
    values = column.values if isinstance(column, Jagged) else column
    return bool(np.issubdtype(values.dtype, np.number))
