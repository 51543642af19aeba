"""LogReader: an action log (Parquet or CSV files) as a stream of checked tables.

A checked table has the columns ``user`` and ``item`` (int64 or string), and where mapped ``time`` (int64 ticks),
``action_type`` (int64 or string), ``value`` (float32) and ``field.NAME`` (int64, float64 or string); no nulls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr.data.making import convert, doubts
from gr.data.making.convert import MISSING, Converted
from gr.data.making.csv_files import CsvStream, line_of, read_csv
from gr.data.making.doubts import Doubts
from gr.data.making.files import DataFile, find_files
from gr.data.making.log_types import IDS, csv_sample, lay_out_csv, lay_out_parquet
from gr.data.making.quarantine import BadRow, Quarantine, refuse
from gr.data.making.schema import FieldColumn, LogSchema
from gr.data.making.times import FileTimes, Times, when
from gr.data.stores import first_line, remedy
from gr.errors import UserError

Locate = Callable[[int], tuple[int | None, int]]
"""Row of a batch -> (row group, row in it), or (None, record of the file) for CSV."""
Located = tuple[pa.RecordBatch, Locate]

SAMPLED_FILES, SAMPLED_ROWS = 8, 4096
SAMPLED_BYTES = 2**24  # of a row group in a store that is fetched at once for that
SHOWN = 200  # characters of a bad value that a sentence repeats
FIXES = {
    "user": "set user_ids: string if ids are text",
    "item": "set item_ids: string if ids are text",
    "action_type": "set action_types: string if they are text",
}


class LogReader:
    """Opens the log: finds the files, checks that each has the columns, fixes the types."""

    lists = False
    """Whether a row is a user's, with lists of its actions."""

    def __init__(self, source: str, schema: LogSchema):
        self.schema = schema
        self._notes: list[str] = []
        self.files = find_files(source, schema.format, note=self._notes.append)
        columns = schema.columns
        self.fields = {
            n: FieldColumn(column=f) if isinstance(f, str) else f for n, f in columns.fields.items()
        }
        self.columns = {
            "user": columns.user,
            "item": columns.item,
            **({"time": columns.time} if columns.time else {}),
            **({"action_type": columns.action_type} if columns.action_type else {}),
            **({"value": columns.value} if columns.value else {}),
            **{f"field.{name}": spec.column for name, spec in self.fields.items()},
        }
        self.rows_read = 0
        self.rounded_values = 0
        if self.files[0].format == "parquet":
            self.layout = lay_out_parquet(self.files, schema, self.columns, self.fields, self.lists)
        elif self.lists:
            raise UserError(
                f"'{self.files[0].name}' is text, and lists are read from Parquet: name other files"
            )
        else:
            self.layout = lay_out_csv(self.files, schema, self.columns, self.fields)
        self._notes += self.layout.notes
        self.types, self.estimated_rows = self.layout.types, self.layout.rows
        self.times = Times(self.types.clock) if self.types.clock else None
        self._doubts: Doubts | None = None
        self._said: set[str] = set()

    @property
    def has_times(self) -> bool:
        return self.times is not None

    @property
    def ticks_per_second(self) -> int:
        return self.types.ticks_per_second

    def tables(self, chunk_rows: int, quarantine: Quarantine) -> Iterator[pa.Table]:
        """Checked tables of at most ``chunk_rows`` rows, in the order of the files and of the rows in them."""
        for file in self.files:
            read = self._parquet_batches if file.format == "parquet" else self._csv_batches
            for batch, locate in read(file, chunk_rows, quarantine):
                self.rows_read += batch.num_rows
                table = self._check(batch, file, locate, quarantine)
                if table.num_rows:
                    yield table

    # -- what is noticed -------------------------------------------------------------------------------------------

    def remarks(self) -> list[str]:
        """What to tell the user and was not told before: asked for before the log is read, and after it."""
        if self._doubts is None:
            self._notes += [*self._assumptions(), *self._of_sample().values()]
        elif self.rows_read:
            before = set(self._doubts)
            self._notes += [text for name, text in self._of_all().items() if name not in before]
        new = [n for n in dict.fromkeys(self._notes) if n not in self._said]
        self._said.update(new)
        return new

    def facts(self) -> dict[str, Any]:
        """How the log was read, for the manifest: asked for when it has been."""
        facts: dict[str, Any] = {"files": len(self.files), "assumptions": self._assumptions()}
        facts["doubts"] = list(self._of_all().values())
        if self.times is not None:
            clock, seen = self.times.clock, self.times.seen
            spans = [(f.first, f.last) for f in seen.values() if f.first is not None and f.last is not None]
            without = [name for name, f in seen.items() if f.naive]
            mixed = without and any(f.zoned for f in seen.values())
            facts["times"] = {
                "unit": clock.unit,
                "first": when(min(s[0] for s in spans) // clock.per_second) if spans else None,
                "last": when(max(s[1] for s in spans) // clock.per_second) if spans else None,
                "zone_of_times_without": clock.zone or "UTC",
                "files_with_zones": sum(f.zoned > 0 for f in seen.values()),
                "files_without_zones": without if mixed else len(without),
            }
        return facts

    def _assumptions(self) -> list[str]:
        if self.times is None:
            if len(self.files) == 1:
                return []
            first, last = self.files[0].name, self.files[-1].name
            return [
                f"no times: a user's order is that of the {len(self.files):,} files by the numbers in their names, "
                f"from '{first}' to '{last}', and of the rows in them"
            ]
        naive = any(f.naive for f in self.times.seen.values()) if self.rows_read else self.layout.naive
        return [f"times without a zone are taken as {self.times.clock.zone or 'UTC'}"] if naive else []

    def _of_sample(self) -> Doubts:
        """Doubts about the first rows of a few files, and about what their statistics say of all."""
        times = Times(self.types.clock) if self.types.clock else None
        raw: dict[str, list[pa.Array]] = {role: [] for role in self.columns}
        good: dict[str, list[pa.Array]] = {role: [] for role in self.columns}
        for n in np.unique(np.linspace(0, len(self.files) - 1, SAMPLED_FILES).astype(int)).tolist():
            file = self.files[n]
            batch = self.layout.whole(file, self._sample(file)).slice(0, SAMPLED_ROWS)
            for role in [r for r in (*IDS, "time") if r in self.columns and batch.num_rows]:
                column = batch.column(self.columns[role])
                if role == "time" and times is not None:
                    good[role].append(times.read(column, file.name).values.drop_null())
                else:
                    raw[role].append(convert.readable(column, "")[0])
                    good[role].append(self._converters[role](column).values)
        found: Doubts = {}
        if self.types.clock and times is not None:
            seen: dict[str, FileTimes] = {**times.seen, **self.layout.early_files()}
            found |= doubts.of_times(self.columns["time"], self.types.clock, seen, sampled=True)
            if good["time"]:
                ticks = pa.concat_arrays(good["time"])
                found |= doubts.of_time_sample(self.columns["time"], self.types.clock, ticks)
        for role in IDS:
            if role in self.columns and raw[role]:
                text = all(convert.is_text(r.type) for r in raw[role])
                ids = pa.concat_arrays(good[role])
                found |= doubts.of_ids(self.columns[role], ids, text)
        self._doubts = found
        return found

    def _of_all(self) -> Doubts:
        """Doubts when all rows have been read, those about the sample included."""
        found = dict(self._doubts if self._doubts is not None else self._of_sample())
        if self.times is not None:
            column = self.columns["time"]
            for name in [n for n in found if n in doubts.COUNTED or n.startswith("unknown")]:
                del found[name]
            found |= doubts.of_times(column, self.times.clock, self.times.seen, sampled=False)
        if self.rounded_values:
            found["rounded"] = (
                f"column '{self.columns['value']}': {self.rounded_values:,} integers have more digits than a value of "
                "32 bits and were rounded: keep them as a field to have them exact"
            )
        return found

    def _sample(self, file: DataFile) -> pa.RecordBatch:
        """The first rows of a file, as far as they can be read: reading all of it says what is wrong with them."""
        if file.format == "csv":
            return csv_sample(file, self.schema, self.layout)
        names = self.layout.in_file(file)
        empty = pa.record_batch([pa.array([], pa.null()) for _ in names], names=names)
        with file.parquet() as parquet:
            if not parquet.num_row_groups:
                return empty
            try:
                source = file.row_group(parquet, 0, names, SAMPLED_BYTES)
                batches = source.iter_batches(SAMPLED_ROWS, row_groups=[0], columns=names, use_threads=False)
                return next(batches, empty)
            except (OSError, pa.ArrowInvalid):
                return empty

    # -- batches ---------------------------------------------------------------------------------------------------

    def _parquet_batches(self, file: DataFile, chunk_rows: int, quarantine: Quarantine) -> Iterator[Located]:
        names = self.layout.in_file(file)
        with file.parquet() as parquet, closing(file.row_groups(parquet, names)) as sources:
            for group in range(parquet.num_row_groups):  # one by one, so that an error can name it
                start = 0
                rows = self._rows_at_once(parquet, group, chunk_rows)
                try:
                    for batch in next(sources).iter_batches(
                        rows, row_groups=[group], columns=names, use_threads=False
                    ):
                        yield from self._actions(file, batch, group, start, chunk_rows, quarantine)
                        start += batch.num_rows
                except (OSError, pa.ArrowInvalid) as error:
                    raise _unreadable(file, group, names, error) from None

    def _rows_at_once(self, parquet: pq.ParquetFile, group: int, chunk_rows: int) -> int:
        """Rows of a row group that hold about ``chunk_rows`` actions."""
        return chunk_rows

    def _actions(
        self,
        file: DataFile,
        batch: pa.RecordBatch,
        group: int,
        start: int,
        chunk_rows: int,
        quarantine: Quarantine,
    ) -> Iterator[Located]:
        """Rows of a row group from ``start`` on, as actions."""
        yield self.layout.whole(file, batch), partial(_in_row_group, group, start)

    def _csv_batches(self, file: DataFile, chunk_rows: int, quarantine: Quarantine) -> Iterator[Located]:
        stream = read_csv(file, self.schema.csv, self.layout.in_file(file))
        start = handled = 0
        for batch in stream.batches:
            handled = self._malformed(file, stream.malformed, handled, quarantine)
            for first in range(0, batch.num_rows, chunk_rows):
                part = self.layout.whole(file, batch.slice(first, chunk_rows))
                yield part, partial(_in_stream, stream, start + first)
            start += batch.num_rows
        self._malformed(file, stream.malformed, handled, quarantine)

    def _malformed(
        self, file: DataFile, records: list[tuple[int, str, str]], handled: int, quarantine: Quarantine
    ) -> int:
        """Deal with the malformed records after the first ``handled`` ones; returns how many there are."""
        for record, text, problem in records[handled:]:
            self.rows_read += 1
            if quarantine.failing:
                where = f"'{file.name}', line {line_of(file, self.schema.csv, record)}"
                raise refuse(where, f"{text!r} {problem}", "")
            quarantine.add(BadRow(file.name, None, record, None, problem, text), "wrong number of columns")
        return len(records)

    # -- checking --------------------------------------------------------------------------------------------------

    @cached_property
    def _converters(self) -> dict[str, Callable[[pa.Array], Converted]]:
        """Of all roles but time, which remembers what it has seen."""
        types = self.types

        def ids(role: str) -> Callable[[pa.Array], Converted]:
            return lambda c: convert.to_ids(c, role in types.integers, FIXES[role])

        def field(name: str, kind: str) -> Callable[[pa.Array], Converted]:
            asked = self.fields[name].type != "auto"
            return lambda c: convert.to_field(c, kind, asked)

        return {
            **{role: ids(role) for role in IDS},
            "value": self._values,
            **{f"field.{name}": field(name, kind) for name, kind in types.fields.items()},
        }

    def _values(self, column: pa.Array) -> Converted:
        values, rounded = convert.to_numbers(column)
        self.rounded_values += rounded
        return values

    def _convert(self, role: str, column: pa.Array, file: DataFile) -> Converted:
        if role == "time":
            assert self.times is not None
            return self.times.read(column, file.name)
        return self._converters[role](column)

    def _check(
        self, batch: pa.RecordBatch, file: DataFile, locate: Locate, quarantine: Quarantine
    ) -> pa.Table:
        """The batch's good rows, converted; bad ones go to the quarantine or end the work."""
        checked: dict[str, Converted] = {
            role: self._convert(role, batch.column(column), file) for role, column in self.columns.items()
        }
        bad = np.zeros(batch.num_rows, dtype=bool)
        for result in checked.values():
            if result.bad is not None:
                bad |= result.bad
        table = pa.table({role: result.values for role, result in checked.items()})
        if not bad.any():
            return table
        for row in np.flatnonzero(bad).tolist():
            self._bad_row(batch, row, file, locate, checked, quarantine)
        return table.filter(pa.array(~bad))

    def _bad_row(
        self,
        batch: pa.RecordBatch,
        row: int,
        file: DataFile,
        locate: Locate,
        checked: dict[str, Converted],
        quarantine: Quarantine,
    ) -> None:
        role = next(r for r, result in checked.items() if result.bad is not None and result.bad[row])
        column, problem = self.columns[role], checked[role].problem(row)
        value = _readable(batch.column(column), row)
        absent = problem.what == MISSING
        sentence = "the value is missing" if absent else f"{_quoted(value)} {problem.what}"
        group, number = locate(row)
        if quarantine.failing:
            place = f"row group {group}, row {number}"
            if group is None:
                place = f"line {line_of(file, self.schema.csv, number)}"
            raise refuse(f"'{file.name}', {place}, column '{column}'", sentence, problem.fix)
        record = {c: _readable(batch.column(c), row) for c in dict.fromkeys(self.columns.values())}
        text = json.dumps(record, default=str, ensure_ascii=False)
        quarantine.add(BadRow(file.name, group, number, column, sentence, text), f"{column}: {problem.what}")


def _unreadable(file: DataFile, group: int, columns: list[str], error: Exception) -> UserError:
    fix = "the file is damaged; write it again or leave it out"
    if isinstance(error, FileNotFoundError):
        fix = "the file went away while the log was read; put it back or leave it out"
    which = ", ".join(f"'{name}'" for name in columns)
    return UserError(
        f"cannot read '{file.name}', row group {group}, column{'s' * (len(columns) > 1)} {which} "
        f"({first_line(error)}): {remedy(error, fix)}"
    )


def _in_row_group(group: int, start: int, row: int) -> tuple[int | None, int]:
    return group, start + row


def _in_stream(stream: CsvStream, start: int, row: int) -> tuple[int | None, int]:
    return None, stream.record(start + row)


def _readable(column: pa.Array, row: int) -> Any:
    """The value as text, number or None; times as text, since Python's reach from the year 1 to 9999 only."""
    if pa.types.is_temporal(column.type):
        return pc.cast(column.slice(row, 1), pa.string())[0].as_py()
    found = column[row].as_py()
    return found.decode("utf-8", errors="backslashreplace") if isinstance(found, bytes) else found


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]}...{text[-1]}"
