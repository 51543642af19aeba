"""Rows of a dataset -> SequenceBatch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch

from gr.batch import TARGETS_FROM, Jagged, SequenceBatch, values_of
from gr.data.hashing import hash_ids
from gr.data.sequences import ITEM, Column, Sequences, batched_dtype


def collate(rows: Sequences, columns: Iterable[str] | None = None, lent: bool = True) -> SequenceBatch:
    """The rows as they are, as CPU tensors (see :class:`gr.batch.SequenceBatch` for shapes and dtypes).

    columns: the names of those that the batch carries, beside ``item``; every column of numbers without it.  Whole
    numbers become int64, others float32, and texts their 64-bit hashes.  lent: the rows' columns of actions are
    somebody else's memory; where they are not, those that are as they should be become the batch's.
    """
    wanted = None if columns is None else {ITEM, *columns}

    def chosen(named: Iterable[tuple[str, Column]], copy: bool = True) -> dict:
        return {
            name: tensor(column, copy)
            for name, column in named
            if (_is_numeric(column) if wanted is None else name in wanted)
        }

    user_columns = list(rows.user_columns.items()) if columns is not None else []
    told = (
        {TARGETS_FROM: tensor(rows.user_columns[TARGETS_FROM])} if TARGETS_FROM in rows.user_columns else {}
    )
    return SequenceBatch(
        offsets_B1=torch.from_numpy(rows.offsets_R1.astype(np.int64)),
        ordinals_B=torch.from_numpy(rows.ordinals_R.astype(np.int64)),
        lengths=tuple(rows.lengths_R.tolist()),
        columns=chosen(rows.columns.items(), copy=lent),
        user_columns=chosen(user_columns) | told,
    )


def tensor(column: Column, copy: bool = True) -> torch.Tensor | Jagged:
    """The column as CPU tensors, int64 or float32; ``copy``: in memory of their own in any case."""
    if isinstance(column, Jagged):
        return Jagged(torch.from_numpy(column.offsets.astype(np.int64)), tensor(column.values, copy))
    if not _is_numeric(column):
        distinct = pa.array(column.tolist(), pa.string()).dictionary_encode()  # each text is hashed once
        hashes = hash_ids(distinct.dictionary.to_numpy(zero_copy_only=False)).view(np.int64)
        return torch.from_numpy(hashes[distinct.indices.to_numpy(zero_copy_only=False)])
    return torch.from_numpy(column.astype(batched_dtype(column.dtype), copy=copy))


def _is_numeric(column: Column) -> bool:
    return values_of(column).dtype.kind in "iuf"
