"""LogReader: an action log (Parquet or CSV files) as a stream of checked tables.

A checked table has the columns ``user`` and ``item`` (int64 or string), and where mapped ``time`` (int64 ticks),
``action_type`` (int64 or string), ``value`` (float32) and ``field.NAME`` (int64, float64 or string); no nulls.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr.data.making import convert, doubts
from gr.data.making.convert import MISSING, Converted
from gr.data.making.csv_files import CsvStream, Malformed, line_of, read_csv
from gr.data.making.doubts import Doubts
from gr.data.making.files import DataFile, find_files
from gr.data.making.log_types import IDS, Layout, csv_sample, lay_out_csv, lay_out_parquet, plain_size
from gr.data.making.quarantine import BadRow, Quarantine, refuse
from gr.data.making.schema import FieldColumn, FieldOfDataset, LogSchema
from gr.data.making.times import FileTimes, Times, when
from gr.data.stores import remedy
from gr.errors import UserError, first_line

Locate = Callable[[int], tuple[int | None, int]]
"""Row of a batch -> (row group, row in it), or (None, record of the file) for CSV."""
Located = tuple[pa.RecordBatch, Locate]

SAMPLED_FILES, SAMPLED_ROWS = 8, 4096
SAMPLED_BYTES = 2**24  # of a row group in a store that is fetched at once for that
PART_ROWS, PARTS = 2**21, 1024
"""Rows of a part that one process reads at a time, or more where these would be more parts."""
SHOWN = 200  # characters of a bad value that a sentence repeats
FIXES = {
    "user": "set user_ids: string if ids are text",
    "item": "set item_ids: string if ids are text",
    "action_type": "set action_types: string if they are text",
}


class Piece(NamedTuple):
    """Number of a file, and those of its row groups that are read; a CSV file is read whole."""

    file: int
    first: int = 0
    stop: int | None = None


class LogReader:
    """Opens the log: finds the files, checks that each has the columns, fixes the types."""

    GROUP = "row group"
    lists = False
    """Whether a row is a user's, with lists of its actions."""

    def __init__(self, source: str, schema: LogSchema):
        self._map(schema)
        self.files = find_files(source, schema.format, note=self._notes.append)
        if self.files[0].format == "parquet":
            layout = lay_out_parquet(self.files, schema, self.columns, self.fields, self.lists)
        elif self.lists:
            raise UserError(
                f"'{self.files[0].name}' is text, and lists are read from Parquet: name other files"
            )
        else:
            layout = lay_out_csv(self.files, schema, self.columns, self.fields)
        self._lay_out(layout)
        self._pieces = [Piece(n) for n in range(len(self.files))]

    def _map(self, schema: LogSchema) -> None:
        self.schema = schema
        self._notes: list[str] = []
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

    def _lay_out(self, layout: Layout) -> None:
        self.layout = layout
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
        for piece in self._to_read():
            file = self.files[piece.file]
            for batch, locate in self._batches(piece, chunk_rows, quarantine):
                self.rows_read += batch.num_rows
                table = self._check(batch, file, locate, quarantine)
                if table.num_rows:
                    yield table

    @property
    def table_schema(self) -> pa.Schema:
        kinds = {"integer": pa.int64(), "float": pa.float64(), "string": pa.string()}
        types: dict[str, pa.DataType] = {"time": pa.int64(), "value": pa.float32()}
        types |= {role: pa.int64() if role in self.types.integers else pa.string() for role in IDS}
        types |= {f"field.{name}": kinds[kind] for name, kind in self.types.fields.items()}
        return pa.schema([(role, types[role]) for role in self.columns])

    # -- to be read by several processes ---------------------------------------------------------------------------

    def identity(self) -> Any:
        """The schema, and the files with what changes when they do."""
        schema = self.schema.model_dump(mode="json", include=set(LogSchema.model_fields))
        return [schema, *([file.name, file.version] for file in self.files)]

    def parts(self) -> Iterator[Any]:
        """Consecutive pieces of about equal sizes."""
        most = max(PART_ROWS, -(-self.estimated_rows // PARTS))
        bytes = sum(plain_size(f) for f in self.files if f.format == "csv") or 1
        part: list[Piece] = []
        rows = 0
        for number, file in enumerate(self.files):
            if file.format == "csv":
                sizes = [plain_size(file) * self.estimated_rows // bytes]
            else:
                sizes = self.layout.groups[file.path]
            for group, size in enumerate(sizes):
                if part and rows + size > most:
                    yield part
                    part, rows = [], 0
                if part and part[-1].file == number:
                    part[-1] = part[-1]._replace(stop=group + 1)
                else:
                    part.append(Piece(number, group, group + 1))
                rows += size
        if part:
            yield part

    def only(self, part: Any) -> LogReader:
        reader = copy.copy(self)
        reader.rows_read = reader.rounded_values = 0
        reader._take(part)
        reader.times = Times(self.types.clock, self._first_zoned) if self.types.clock else None
        reader.__dict__.pop("_converters", None)
        return reader

    def seen(self) -> dict[str, Any]:
        times = {name: asdict(seen) for name, seen in self.times.seen.items()} if self.times else {}
        for seen in times.values():
            seen["sentinels"] = list(seen["sentinels"].items())  # JSON's keys are text
        return {"rows": self.rows_read, "rounded": self.rounded_values, "times": times}

    def add_seen(self, seen: dict[str, Any]) -> None:
        self.rows_read += seen["rows"]
        self.rounded_values += seen["rounded"]
        for name, times in seen["times"].items():
            assert self.times is not None
            found = FileTimes(**{**times, "sentinels": {int(k): n for k, n in times["sentinels"]}})
            self.times.seen.setdefault(name, FileTimes()).merge(found)

    @cached_property
    def _first_zoned(self) -> bool | None:
        """Whether the log's first time names its zone, where all must do as it does; None where that isn't asked.
        Reads as far as the first time, in general one batch; what is wrong before it is told when it is read again."""
        clock = self.types.clock
        if clock is None or clock.unit != "iso" or clock.typed or clock.zone is not None:
            return None
        times, read = Times(clock), self.rows_read
        try:
            for piece in self._ahead():
                for batch, _ in self._batches(piece, SAMPLED_ROWS, _Nowhere()):
                    times.read(batch.column(self.columns["time"]), "")
                    if times.zoned is not None:
                        return times.zoned
        except UserError:
            pass
        finally:
            self.rows_read = read  # malformed records count
        return None

    def _to_read(self) -> Iterable[Any]:
        """The pieces, to be read now."""
        return self._pieces

    def _take(self, part: Any) -> None:
        """Read these alone."""
        self._pieces = part

    def _ahead(self) -> Iterable[Any]:
        """The pieces, which are read again later."""
        return self._pieces

    def __getstate__(self) -> dict[str, Any]:
        """Without what can't be sent to another process and is made again."""
        _ = self._first_zoned
        return {name: value for name, value in self.__dict__.items() if name != "_converters"}

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

    def _batches(self, piece: Any, chunk_rows: int, quarantine: Quarantine) -> Iterator[Located]:
        file = self.files[piece.file]
        if file.format == "csv":
            return self._csv_batches(file, chunk_rows, quarantine)
        return self._parquet_batches(file, piece, chunk_rows, quarantine)

    def _parquet_batches(
        self, file: DataFile, piece: Piece, chunk_rows: int, quarantine: Quarantine
    ) -> Iterator[Located]:
        names = self.layout.in_file(file)
        with file.parquet() as parquet:
            groups = range(piece.first, parquet.num_row_groups if piece.stop is None else piece.stop)
            with closing(file.row_groups(parquet, names, groups)) as sources:
                yield from self._row_groups(file, parquet, groups, sources, chunk_rows, quarantine)

    def _row_groups(
        self,
        file: DataFile,
        parquet: pq.ParquetFile,
        groups: range,
        sources: Iterator[pq.ParquetFile],
        chunk_rows: int,
        quarantine: Quarantine,
    ) -> Iterator[Located]:
        names = self.layout.in_file(file)
        for group in groups:  # one by one, so that an error can name it
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
        yield self.layout.whole(file, batch), partial(in_group, group, start)

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
        self, file: DataFile, records: list[Malformed], handled: int, quarantine: Quarantine
    ) -> int:
        """Deal with the malformed records after the first ``handled`` ones; returns how many there are."""
        for bad in records[handled:]:
            self.rows_read += 1
            if quarantine.failing:
                where = f"'{file.name}', line {line_of(file, self.schema.csv, bad.record)}"
                raise refuse(where, f"{bad.text!r} {bad.problem}", bad.fix)
            quarantine.add(BadRow(file.name, None, bad.record, None, bad.problem, bad.text), bad.kind)
        return len(records)

    # -- checking --------------------------------------------------------------------------------------------------

    @cached_property
    def _converters(self) -> dict[str, Callable[[pa.Array], Converted]]:
        """Of all roles but time, which remembers what it has seen."""
        types = self.types

        def ids(role: str) -> Callable[[pa.Array], Converted]:
            return lambda c: convert.to_ids(c, role in types.integers, FIXES[role])

        def field(name: str, kind: str) -> Callable[[pa.Array], Converted]:
            spec = self.fields[name]
            asked = spec.type != "auto" and not isinstance(spec, FieldOfDataset)
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
            place = f"{self.GROUP} {group}, row {number}"
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


class _Nowhere(Quarantine):
    """Bad rows that are dealt with another time."""

    failing = False  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(None)

    def add(self, row: BadRow, kind: str) -> None:
        pass


def in_group(group: int, start: int, row: int) -> tuple[int | None, int]:
    """Where a row of a batch is that begins at row ``start`` of a row group: a :data:`Locate`."""
    return group, start + row


def _in_stream(stream: CsvStream, start: int, row: int) -> tuple[int | None, int]:
    return None, stream.record(start + row)


def _readable(column: pa.Array, row: int) -> Any:
    """The value as text, number or None; times as text, since Python's reach from the year 1 to 9999 only."""
    one = convert.plain(column.slice(row, 1))
    if pa.types.is_temporal(one.type):
        one = pc.cast(one, pa.string())
    found = (convert.as_bytes(one) if convert.is_text(one.type) else one)[0].as_py()
    return found.decode("utf-8", errors="backslashreplace") if isinstance(found, bytes) else found


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]}...{text[-1]}"
