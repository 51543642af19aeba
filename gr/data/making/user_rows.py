"""ListReader: a log with a row a user whose actions are lists (Spark's collect_list), read as a row an action.

Shapes: n rows of a batch, A their actions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr.data.making.convert import MISSING
from gr.data.making.files import DataFile
from gr.data.making.log import Located, LogReader
from gr.data.making.log_types import is_list, list_values
from gr.data.making.quarantine import BadRow, Quarantine, refuse


class ListReader(LogReader):
    """The user is a column of single values; item, time, action type and value are columns of lists; a field may be
    either.  The lists of a row are of one length, and that of the items isn't missing; a row with empty ones has no
    action, and is counted.  Rows of the same user, in one file or several, are joined."""

    lists = True
    without_actions = 0
    """Rows with empty lists."""

    def only(self, part: Any) -> LogReader:
        reader = super().only(part)
        assert isinstance(reader, ListReader)
        reader.without_actions = 0
        return reader

    def seen(self) -> dict[str, Any]:
        return {**super().seen(), "without_actions": self.without_actions}

    def add_seen(self, seen: dict[str, Any]) -> None:
        super().add_seen(seen)
        self.without_actions += seen["without_actions"]

    def _assumptions(self) -> list[str]:
        found = super()._assumptions()
        if self.without_actions:
            found.append(
                f"{self.without_actions:,} rows have empty lists, no actions: a user with no other row is not in the "
                "dataset"
            )
        return found

    def remarks(self) -> list[str]:
        if self._doubts is not None:
            self._notes += self._assumptions()
        return super().remarks()

    def _sample(self, file: DataFile) -> pa.RecordBatch:
        batch = super()._sample(file)
        return _exploded(batch, _uneven(batch) < 0)[0]

    def _rows_at_once(self, parquet: pq.ParquetFile, group: int, chunk_rows: int) -> int:
        rows = parquet.metadata.row_group(group).num_rows
        actions = list_values(parquet.metadata, self.columns["item"], [group])
        return max(chunk_rows * rows // max(actions, rows, 1), 1)

    def _actions(
        self,
        file: DataFile,
        batch: pa.RecordBatch,
        group: int,
        start: int,
        chunk_rows: int,
        quarantine: Quarantine,
    ) -> Iterator[Located]:
        uneven = _uneven(batch)
        for row in np.flatnonzero(uneven >= 0).tolist():
            self._bad_user(file, batch, int(uneven[row]), group, row, start, quarantine)
        actions, row_A = _exploded(batch, uneven < 0)
        self.without_actions += int((uneven < 0).sum()) - len(np.unique(row_A))
        for first in range(0, len(row_A), chunk_rows):
            part = self.layout.whole(file, actions.slice(first, chunk_rows))
            rows = start + row_A[first : first + chunk_rows]
            yield part, partial(_in_lists, group, rows)

    def _bad_user(
        self,
        file: DataFile,
        batch: pa.RecordBatch,
        column: int,
        group: int,
        row: int,
        start: int,
        quarantine: Quarantine,
    ) -> None:
        self.rows_read += 1
        first = next(n for n, field in enumerate(batch.schema) if is_list(field.type))
        name, other = batch.schema.names[column], batch.schema.names[first]
        problem, kind = "the value is missing", MISSING
        if batch.column(column)[row].is_valid:
            lengths = [_lengths(batch.column(n))[row] for n in (column, first)]
            problem = f"{lengths[0]} values, where '{other}' has {lengths[1]}"
            kind = f"has not as many values as '{other}'"
        where = f"'{file.name}', row group {group}, row {start + row}, column '{name}'"
        if quarantine.failing:
            raise refuse(where, problem, "")
        record = json.dumps(batch.slice(row, 1).to_pylist()[0], default=str, ensure_ascii=False)
        quarantine.add(BadRow(file.name, group, start + row, name, problem, record), f"{name}: {kind}")


def _in_lists(group: int, row_A: np.ndarray, action: int) -> tuple[int | None, int]:
    return group, int(row_A[action])


def _uneven(batch: pa.RecordBatch) -> np.ndarray:
    """(n,) the first column whose list has another length than the first list of the row, or that one where it is
    missing; -1 where there is none."""
    uneven = np.full(batch.num_rows, -1)
    lists = [n for n, field in enumerate(batch.schema) if is_list(field.type)]
    lengths = [_lengths(batch.column(n)) for n in lists]
    for column, length in reversed(list(zip(lists, lengths))):
        uneven[np.maximum(length, 0) != lengths[0]] = column
    return uneven


def _exploded(batch: pa.RecordBatch, good: np.ndarray) -> tuple[pa.RecordBatch, np.ndarray]:
    """The actions of the ``good`` rows (n, bool), and the row of each (A)."""
    kept = batch.filter(pa.array(good))
    lists = [column for column in kept.columns if is_list(column.type)]
    lengths = _lengths(lists[0]) if lists else np.zeros(len(kept), np.int64)
    of_kept = pa.array(np.repeat(np.arange(len(kept)), lengths))
    columns = [pc.list_flatten(c) if is_list(c.type) else c.take(of_kept) for c in kept.columns]
    return pa.record_batch(columns, names=batch.schema.names), np.repeat(np.flatnonzero(good), lengths)


def _lengths(column: pa.Array) -> np.ndarray:
    """(n,) of each list; -1 where it is missing."""
    length = pc.if_else(column.is_valid(), pc.list_value_length(column), None)
    return pc.fill_null(length, -1).to_numpy(zero_copy_only=False)
