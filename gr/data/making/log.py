"""LogReader: an action log (Parquet or CSV files) as a stream of checked tables.

A checked table has the columns ``user`` and ``item`` (int64 or string), and where mapped ``time`` (int64 ticks),
``action_type`` (int64 or string), ``value`` (float32) and ``field.NAME`` (int64, float64 or string); no nulls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from gr.data.making import convert
from gr.data.making.convert import Converted
from gr.data.making.csv_files import SAMPLE_BYTES, CsvStream, csv_columns, line_of, read_csv
from gr.data.making.files import COMPRESSED, DataFile, find_files, require_column
from gr.data.making.quarantine import BadRow, Quarantine, refuse
from gr.data.making.schema import TICKS_PER_SECOND, FieldColumn, IdType, LogSchema, TimeUnit
from gr.errors import UserError

Locate = Callable[[int], tuple[int | None, int]]
"""Row of a batch -> (row group, row in it), or (None, record of the file) for CSV."""
Located = tuple[pa.RecordBatch, Locate]

COMPRESSED_RATIO = 8  # a generous guess of how much smaller a compressed CSV is


@dataclass(frozen=True)
class LogTypes:
    """Types that hold for the whole log, fixed before any of it is read.

    ``unit``: of the ticks, one of TICKS_PER_SECOND; ``fractions``: times are seconds with decimals.
    """

    user_integer: bool
    item_integer: bool
    unit: str
    fractions: bool
    action_type_integer: bool
    fields: dict[str, str]
    """Name -> integer, float or string."""

    @property
    def ticks_per_second(self) -> int:
        return TICKS_PER_SECOND["us" if self.fractions else self.unit]


class LogReader:
    """Opens the log: finds the files, checks that each has the columns, fixes the types."""

    def __init__(self, source: str, schema: LogSchema):
        self.schema = schema
        self.files = find_files(source, schema.format)
        columns = schema.columns
        extra = {n: FieldColumn(column=f) if isinstance(f, str) else f for n, f in columns.fields.items()}
        self.fields: dict[str, FieldColumn] = extra
        self.columns = {
            "user": columns.user,
            "item": columns.item,
            **({"time": columns.time} if columns.time else {}),
            **({"action_type": columns.action_type} if columns.action_type else {}),
            **({"value": columns.value} if columns.value else {}),
            **{f"field.{name}": spec.column for name, spec in extra.items()},
        }
        self.rows_read = 0
        if self.files[0].format == "parquet":
            self.types, self.estimated_rows = self._check_parquet()
        else:
            self.types, self.estimated_rows = self._check_csv()

    @property
    def has_times(self) -> bool:
        return "time" in self.columns

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

    # -- types -----------------------------------------------------------------------------------------------------

    def _check_parquet(self) -> tuple[LogTypes, int]:
        rows = 0
        kinds: dict[str, list[pa.DataType]] = {role: [] for role in self.columns}  # in the files that say one
        empty: dict[str, pa.DataType] = {}
        resolutions: set[TimeUnit] = set()
        numeric: list[str] = []
        for file in self.files:
            parquet = file.parquet()
            schema = parquet.schema_arrow
            rows += parquet.metadata.num_rows
            for role, column in self.columns.items():
                require_column(file.name, column, schema.names)
                kind = schema.field(column).type
                self._check_type(file, role, column, kind)
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                if pa.types.is_null(kind) or not parquet.metadata.num_rows:
                    empty.setdefault(role, kind)
                    continue
                kinds[role].append(kind)
                if role == "time" and (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
                    resolutions.add(getattr(kind, "unit", "s"))
                elif role == "time":
                    numeric.append(file.name)
            parquet.close()
        if resolutions and numeric:
            raise UserError(
                f"'{numeric[0]}', column '{self.columns['time']}': not of a timestamp type, as it is in other files; "
                "write all files with the same type"
            )

        def kind_of(role: str) -> pa.DataType:
            return kinds[role][0] if kinds[role] else empty[role]

        unit: TimeUnit = self.schema.time_unit
        fractions = False
        if resolutions:
            unit = max(resolutions, key=lambda r: TICKS_PER_SECOND[r])
        elif self.has_times:
            text = not convert.is_number(kind_of("time"))
            fractions = unit == "s" and pa.types.is_floating(kind_of("time"))
            if unit == "iso" and not text:
                raise UserError(
                    f"'{self.files[0].name}', column '{self.columns['time']}': numbers, not text in time_unit 'iso'; "
                    "set time_unit to s, ms, us or ns"
                )
        return LogTypes(
            user_integer=_integer(self.schema.user_ids, convert.is_number(kind_of("user"))),
            item_integer=_integer(self.schema.item_ids, convert.is_number(kind_of("item"))),
            unit=unit,
            fractions=fractions,
            action_type_integer="action_type" in self.columns and convert.is_number(kind_of("action_type")),
            fields={
                name: spec.type if spec.type != "auto" else convert.field_type(kinds[f"field.{name}"])
                for name, spec in self.fields.items()
            },
        ), rows

    def _check_type(self, file: DataFile, role: str, column: str, kind: pa.DataType) -> None:
        usable = convert.is_text(kind) or convert.is_number(kind) or pa.types.is_null(kind)
        if role == "time":
            usable = usable or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        elif role.startswith("field."):
            usable = (
                usable or pa.types.is_boolean(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
            )
        if not usable:
            raise UserError(
                f"'{file.name}', column '{column}': type {kind} cannot be used as {role}; map another column"
            )

    def _check_csv(self) -> tuple[LogTypes, int]:
        for file in self.files:
            names = csv_columns(file, self.schema.csv)
            for column in self.columns.values():
                require_column(file.name, column, names)
        sampled = next((f for f in self.files if self._sample(f).num_rows), self.files[0])
        sample = self._sample(sampled)

        def all_integers(role: str) -> bool:
            values = [v for v in sample.column(self.columns[role]).to_pylist() if v is not None]
            return bool(values) and all(map(_canonical_integer, values))

        fractions = (
            self.has_times and self.schema.time_unit == "s" and _has_decimals(sample, self.columns["time"])
        )
        bytes_a_row = min(self._plain_size(sampled), SAMPLE_BYTES) / max(sample.num_rows, 1)
        return LogTypes(
            user_integer=_integer(self.schema.user_ids, all_integers("user")),
            item_integer=_integer(self.schema.item_ids, all_integers("item")),
            unit=self.schema.time_unit,
            fractions=fractions,
            action_type_integer="action_type" in self.columns and all_integers("action_type"),
            fields={n: "string" if spec.type == "auto" else spec.type for n, spec in self.fields.items()},
        ), int(sum(map(self._plain_size, self.files)) / max(bytes_a_row, 1)) + 1

    @staticmethod
    def _plain_size(file: DataFile) -> int:
        """About how many bytes the file has, decompressed."""
        return file.size * (COMPRESSED_RATIO if file.path.lower().endswith(COMPRESSED) else 1)

    def _sample(self, file: DataFile) -> pa.RecordBatch:
        names = list(dict.fromkeys(self.columns.values()))
        stream = read_csv(file, self.schema.csv, names, SAMPLE_BYTES)
        empty = pa.record_batch([pa.array([], pa.binary()) for _ in names], names=names)
        return next(stream.batches, empty)

    # -- batches ---------------------------------------------------------------------------------------------------

    def _parquet_batches(self, file: DataFile, chunk_rows: int, quarantine: Quarantine) -> Iterator[Located]:
        names = list(dict.fromkeys(self.columns.values()))
        with file.parquet() as parquet:
            for group in range(parquet.num_row_groups):  # one by one, so that an error can name it
                start = 0
                try:
                    for batch in parquet.iter_batches(
                        chunk_rows, row_groups=[group], columns=names, use_threads=False
                    ):
                        yield batch, partial(_in_row_group, group, start)
                        start += batch.num_rows
                except (OSError, pa.ArrowInvalid) as error:
                    raise UserError(
                        f"cannot read '{file.name}', row group {group} ({str(error).splitlines()[0].rstrip('.')}): "
                        "the file is damaged; write it again or leave it out"
                    ) from None

    def _csv_batches(self, file: DataFile, chunk_rows: int, quarantine: Quarantine) -> Iterator[Located]:
        stream = read_csv(file, self.schema.csv, list(dict.fromkeys(self.columns.values())))
        start = handled = 0
        for batch in stream.batches:
            handled = self._malformed(file, stream.malformed, handled, quarantine)
            for first in range(0, batch.num_rows, chunk_rows):
                yield batch.slice(first, chunk_rows), partial(_in_stream, stream, start + first)
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
        types = self.types
        unit = "us" if types.fractions else types.unit
        table: dict[str, Callable[[pa.Array], Converted]] = {
            "user": lambda c: convert.to_ids(c, types.user_integer, "set user_ids: string if ids are text"),
            "item": lambda c: convert.to_ids(c, types.item_integer, "set item_ids: string if ids are text"),
            "time": lambda c: convert.to_ticks(c, unit, types.fractions),
            "action_type": lambda c: convert.to_ids(
                c, types.action_type_integer, "write all action types as text if these are"
            ),
            "value": convert.to_numbers,
        }
        for name, kind in types.fields.items():
            table[f"field.{name}"] = lambda c, kind=kind: convert.to_field(c, kind)  # type: ignore[misc]
        return table

    def _check(
        self, batch: pa.RecordBatch, file: DataFile, locate: Locate, quarantine: Quarantine
    ) -> pa.Table:
        """The batch's good rows, converted; bad ones go to the quarantine or end the work."""
        checked: dict[str, Converted] = {
            role: self._converters[role](batch.column(column)) for role, column in self.columns.items()
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
        column, result = self.columns[role], checked[role]
        value = _readable(batch.column(column)[row].as_py())
        missing = value is None or value != value
        problem = "the value is missing" if missing else f"{value!r} {result.problem}"
        group, number = locate(row)
        if quarantine.failing:
            place = f"row group {group}, row {number}"
            if group is None:
                place = f"line {line_of(file, self.schema.csv, number)}"
            raise refuse(f"'{file.name}', {place}, column '{column}'", problem, "" if missing else result.fix)
        record = {c: _readable(batch.column(c)[row].as_py()) for c in dict.fromkeys(self.columns.values())}
        kind = f"{column}: " + ("missing" if missing else result.problem)
        quarantine.add(
            BadRow(
                file.name, group, number, column, problem, json.dumps(record, default=str, ensure_ascii=False)
            ),
            kind,
        )


def _in_row_group(group: int, start: int, row: int) -> tuple[int | None, int]:
    return group, start + row


def _in_stream(stream: CsvStream, start: int, row: int) -> tuple[int | None, int]:
    return None, stream.record(start + row)


def _integer(wanted: IdType, found: bool) -> bool:
    return found if wanted == "auto" else wanted == "integer"


def _canonical_integer(text: bytes) -> bool:
    """Whether an integer would be written back as the same text: '007' is not."""
    digits = text.removeprefix(b"-")
    return digits.isdigit() and len(digits) < 19 and (digits[:1] != b"0" or text == b"0")


def _has_decimals(sample: pa.RecordBatch, column: str) -> bool:
    return any(v is not None and b"." in v for v in sample.column(column).to_pylist())


def _readable(value: Any) -> Any:
    return value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else value
