"""What holds for the whole log, fixed before any of it is read: where its columns are, and their types.

Columns are those of the files, or of the names of their folders (``dt=2024-01-31/part-0.parquet``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.making import convert
from gr.data.making.csv_files import SAMPLE_BYTES, csv_columns, read_csv
from gr.data.making.files import COMPRESSED, DataFile, opened_parquet, require_column
from gr.data.making.schema import TICKS_PER_SECOND, FieldColumn, IdType, LogSchema, TimeUnit
from gr.data.making.times import EARLY, Clock, FileTimes
from gr.errors import UserError

COMPRESSED_RATIO = 8  # a generous guess of how much smaller a compressed CSV is
IDS = ("user", "item", "action_type")


@dataclass(frozen=True)
class LogTypes:
    """``integers``: roles of ids that are integers, not text.  ``fields``: name -> integer, float or string.
    ``clock``: None for a log without times."""

    integers: frozenset[str]
    fields: dict[str, str]
    clock: Clock | None

    @property
    def ticks_per_second(self) -> int:
        return self.clock.per_second if self.clock else 1


class Span(NamedTuple):
    """Times of a file: how many, the first, the last, and their ticks a second (None: the schema says)."""

    rows: int
    first: int
    last: int
    per_second: int | None


@dataclass
class Layout:
    """Where the mapped columns are, file by file.  ``constants``: path -> the columns that its folders name.
    ``spans``: what the files' statistics say of their times."""

    columns: dict[str, str]
    """Role -> column."""
    types: LogTypes = field(init=False)
    rows: int = 0
    naive: bool = False
    """Whether times may name no zone."""
    constants: dict[str, dict[str, str | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    spans: dict[str, Span] = field(default_factory=dict)
    groups: dict[str, list[int]] = field(default_factory=dict)
    """Path of a Parquet file -> rows of its row groups."""

    def place(self, file: DataFile, names: list[str]) -> dict[str, str | None]:
        """The mapped columns that the folders of ``file`` name; what the file has itself counts."""
        folders = file.folder_columns
        constants = {}
        for column in dict.fromkeys(self.columns.values()):
            if column in folders and column not in names:
                constants[column] = folders[column]
                continue
            require_column(file.name, column, names, folders)
            note = f"column '{column}' is in the files and in the names of their folders: the files' is read"
            if column in folders and note not in self.notes:
                self.notes.append(note)
        if constants:
            self.constants[file.path] = constants
        return constants

    def in_file(self, file: DataFile) -> list[str]:
        """The mapped columns that the file has itself."""
        elsewhere = self.constants.get(file.path, {})
        return [c for c in dict.fromkeys(self.columns.values()) if c not in elsewhere]

    def whole(self, file: DataFile, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch of the file with the columns that its folders name."""
        for column, value in self.constants.get(file.path, {}).items():
            batch = batch.append_column(column, _constant(value, batch.num_rows))
        return batch

    def early_files(self) -> dict[str, FileTimes]:
        """The files of which all times are early ones, by their statistics."""
        clock, found = self.types.clock, {}
        for name, span in self.spans.items() if clock else ():
            assert clock is not None
            scale = (
                clock.per_second // span.per_second if span.per_second else 10**6 if clock.fractions else 1
            )
            first, last = span.first * scale, span.last * scale
            if 0 < last < EARLY * clock.per_second:
                found[name] = FileTimes(rows=span.rows, first=first, last=last)
                found[name].early_span(span.rows, first, last)
        return found

    def folder_kinds(self, column: str) -> list[pa.DataType]:
        """For each file whose folders name the column: integer if its value is written as one, text, or nothing."""
        values = [c[column] for c in self.constants.values() if column in c]
        return [
            pa.null() if v is None else pa.int64() if plain_integer(v.encode()) else pa.string()
            for v in values
        ]


def lay_out_parquet(
    files: list[DataFile],
    schema: LogSchema,
    columns: dict[str, str],
    fields: dict[str, FieldColumn],
    lists: bool = False,
) -> Layout:
    """Checks every file's schema; reads no rows.  ``lists``: a row is a user's, with lists of its actions."""

    def opened() -> Iterator[tuple[DataFile, pa.Schema, list[int], pq.ParquetFile]]:
        for file, opened in zip(files, opened_parquet(files)):
            with opened as parquet:
                groups = range(parquet.num_row_groups)
                if lists:
                    rows = [list_values(parquet.metadata, columns["item"], [g]) for g in groups]
                else:
                    rows = [parquet.metadata.row_group(g).num_rows for g in groups]
                yield file, parquet.schema_arrow, rows, parquet

    return lay_out_typed(opened(), schema, columns, fields, lists)


def lay_out_typed(
    tables: Iterable[tuple[DataFile, pa.Schema, list[int], pq.ParquetFile | None]],
    schema: LogSchema,
    columns: dict[str, str],
    fields: dict[str, FieldColumn],
    lists: bool = False,
) -> Layout:
    """``tables``: of each file its schema, the actions of its groups, and where there is one the open Parquet file,
    whose statistics tell of times."""
    layout = Layout(columns)
    kinds: dict[str, list[pa.DataType]] = {role: [] for role in columns}  # in the files that say one
    empty: dict[str, pa.DataType] = {}
    clocks: dict[str, str] = {}  # what sort of time -> the first file with it
    units: set[TimeUnit] = set()
    files = []
    for file, arrow, groups, parquet in tables:
        files.append(file)
        rows = sum(groups)
        layout.rows += rows
        layout.groups[file.path] = groups
        constants = layout.place(file, arrow.names)
        for role, column in columns.items():
            if column in constants:
                continue
            kind = convert.plain_type(arrow.field(column).type)
            if lists:
                kind = _value_type(file, role, column, kind)
            check_type(file.name, role, column, kind, fields, lists)
            if pa.types.is_null(kind) or not rows:
                empty.setdefault(role, kind)
                continue
            _check_booleans(file.name, role, column, kind, kinds[role])
            kinds[role].append(kind)
            if role == "time":
                clocks.setdefault(_sort_of_time(kind), file.name)
                if unit := _unit(kind):
                    units.add(unit)
        timed = "time" in columns and columns["time"] not in constants and rows and not lists
        if timed and parquet is not None and (span := _statistics(parquet, columns["time"])):
            layout.spans[file.name] = span
    for role, column in columns.items():
        found = layout.folder_kinds(column)
        if (
            role in IDS and pa.string() in found
        ):  # one that is not written as an integer makes all of them text
            kinds[role] = [pa.string()]
        else:
            kinds[role] += [k for k in found if k != pa.null()]
        if role.startswith("field.") and pa.null() in found:
            kinds[role].append(pa.string())
    if "time" in columns and any(k != pa.null() for k in layout.folder_kinds(columns["time"])):
        clocks.setdefault("text", next(n.name for n in files if n.path in layout.constants))
    layout.naive = "naive" in clocks or schema.time_unit == "iso"
    first = {role: (kinds[role] or [empty.get(role, pa.null())])[0] for role in columns}
    layout.types = LogTypes(
        integers=frozenset(
            r for r in IDS if r in columns and _integer(_wanted(schema, r), convert.is_number(first[r]))
        ),
        fields={
            name: spec.type if spec.type != "auto" else convert.field_type(kinds[f"field.{name}"])
            for name, spec in fields.items()
        },
        clock=_clock(schema, columns["time"], clocks, units, kinds["time"]) if "time" in columns else None,
    )
    return layout


def lay_out_csv(
    files: list[DataFile], schema: LogSchema, columns: dict[str, str], fields: dict[str, FieldColumn]
) -> Layout:
    """Checks every file's header; the types come from the first file with rows."""
    layout = Layout(columns)
    for file in files:
        layout.place(file, csv_columns(file, schema.csv))
    for sampled in [*files, files[0]]:  # the first again if none has rows
        sample = csv_sample(sampled, schema, layout)
        if sample.num_rows:
            break

    def all_integers(role: str) -> bool:
        found = layout.folder_kinds(columns[role])
        if columns[role] in layout.in_file(sampled):
            values = [v for v in sample.column(columns[role]).to_pylist() if v is not None]
            found += [pa.int64() if plain_integer(v) else pa.string() for v in values]
        found = [k for k in found if k != pa.null()]
        return bool(found) and all(k == pa.int64() for k in found)

    def field_type(name: str, spec: FieldColumn) -> str:
        if spec.type != "auto":
            return spec.type
        of_folders = all(spec.column not in layout.in_file(f) for f in files)
        missing = pa.null() in layout.folder_kinds(spec.column)
        return "integer" if of_folders and not missing and all_integers(f"field.{name}") else "string"

    clock = None
    if "time" in columns:
        times = layout.whole(sampled, sample).column(columns["time"])
        decimals = any(v is not None and "." in v for v in convert.readable(times, "")[0].to_pylist())
        clock = Clock.of(schema, schema.time_unit, fractions=schema.time_unit == "s" and decimals)
        _check_zone(schema, schema.time_unit == "iso")
        layout.naive = schema.time_unit == "iso"
    layout.types = LogTypes(
        integers=frozenset(r for r in IDS if r in columns and _integer(_wanted(schema, r), all_integers(r))),
        fields={name: field_type(name, spec) for name, spec in fields.items()},
        clock=clock,
    )
    bytes_a_row = min(plain_size(sampled), SAMPLE_BYTES) / max(sample.num_rows, 1)
    layout.rows = int(sum(map(plain_size, files)) / max(bytes_a_row, 1)) + 1
    return layout


def csv_sample(file: DataFile, schema: LogSchema, layout: Layout) -> pa.RecordBatch:
    """The first megabyte's rows."""
    names = layout.in_file(file)
    stream = read_csv(file, schema.csv, names, SAMPLE_BYTES)
    empty = pa.record_batch([pa.array([], pa.binary()) for _ in names], names=names)
    return next(stream.batches, empty)


def plain_integer(text: bytes) -> bool:
    """Whether an integer would be written back as the same text: '007' is not."""
    digits = text.removeprefix(b"-")
    return digits.isdigit() and len(digits) < 19 and (digits[:1] != b"0" or text == b"0")


def _wanted(schema: LogSchema, role: str) -> IdType:
    return {"user": schema.user_ids, "item": schema.item_ids, "action_type": schema.action_types}[role]


def _integer(wanted: IdType, found: bool) -> bool:
    return found if wanted == "auto" else wanted == "integer"


def plain_size(file: DataFile) -> int:
    """About how many bytes the file has, decompressed."""
    return file.size * (COMPRESSED_RATIO if file.path.lower().endswith(COMPRESSED) else 1)


def _constant(value: str | None, rows: int) -> pa.Array:
    index = pa.array([0] if value is not None else [None], pa.int8())
    indices = pa.repeat(index[0], rows)
    return pa.DictionaryArray.from_arrays(indices, pa.array([value or ""], pa.string()))


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_values(footer: pq.FileMetaData, column: str, groups: Iterable[int] | None = None) -> int:
    """Values in the lists of a column (a list that is empty or missing counts as one)."""
    total = 0
    for group in range(footer.num_row_groups) if groups is None else groups:
        chunks = footer.row_group(group)
        for n in range(chunks.num_columns):
            chunk = chunks.column(n)
            if chunk.path_in_schema.startswith(f"{column}."):
                total += chunk.num_values
                break
    return total


def _value_type(file: DataFile, role: str, column: str, kind: pa.DataType) -> pa.DataType:
    """The type of an action's value in a log of lists."""
    if is_list(kind) and role != "user":
        return convert.plain_type(kind.value_type)
    if role == "user" or role.startswith("field."):
        return kind
    raise UserError(
        f"'{file.name}', column '{column}': type {kind} is no list, where a row is a user's and each list has a value "
        "an action; prepare a log with one row an action as log"
    )


def check_type(
    name: str,
    role: str,
    column: str,
    kind: pa.DataType,
    fields: dict[str, FieldColumn],
    lists: bool = False,
) -> None:
    """Refuse a type that cannot play the role.  ``name``: of the file.  ``lists``: a row is a user's."""
    moment = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    usable = convert.can_be_ids(kind) or pa.types.is_null(kind)
    if role == "time":
        usable = usable or moment
    elif role.startswith("field."):
        asked = fields[role.removeprefix("field.")].type
        usable = usable or pa.types.is_boolean(kind) or (moment and asked in ("auto", "string"))
    elif role in ("value", "action_type"):
        usable = usable or pa.types.is_boolean(kind)
    if usable:
        return
    remedy = "map another column"
    if pa.types.is_nested(kind):
        remedy = "write its parts as columns of their own"
        if lists and not pa.types.is_struct(kind):
            remedy = "a row has one user, and of all else single values or a list of them: write it so"
        elif not pa.types.is_struct(kind):
            remedy = (
                "the log has one row an action, so explode the lists first (explode in Spark and pandas, "
            )
            remedy += "unnest in SQL), or prepare it as lists if a row is a user's"
    raise UserError(f"'{name}', column '{column}': type {kind} cannot be used as {role}; {remedy}")


def go_together(role: str, kind: pa.DataType, first: pa.DataType) -> bool:
    """Whether a column of type ``kind`` is read as one of type ``first`` is, where that has fixed what its role is read
    as: no moment in a coarser unit, or by another clock, than it has."""
    if role == "action_type":
        return pa.types.is_null(first) or pa.types.is_boolean(kind) == pa.types.is_boolean(first)
    if role != "time":
        return True
    ticks = [TICKS_PER_SECOND[unit] for unit in map(_unit, (kind, first)) if unit]
    return _sort_of_time(kind) == _sort_of_time(first) and ticks == sorted(ticks)


def _check_booleans(name: str, role: str, column: str, kind: pa.DataType, before: list[pa.DataType]) -> None:
    """true in one file and 1 or 'true' in another would be two action types."""
    if role == "action_type" and before and not go_together(role, kind, before[0]):
        raise UserError(
            f"'{name}', column '{column}': type {kind}, where other files have {before[0]}; write all files with "
            "the same type"
        )


def _sort_of_time(kind: pa.DataType) -> Literal["zoned", "naive", "text", "number"]:
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "zoned" if getattr(kind, "tz", None) else "naive"
    return "text" if convert.is_text(kind) else "number"


def _unit(kind: pa.DataType) -> TimeUnit | None:
    """Of a timestamp or a date."""
    if pa.types.is_timestamp(kind):
        return kind.unit
    return "ms" if pa.types.is_date64(kind) else "s" if pa.types.is_date32(kind) else None


def _clock(
    schema: LogSchema, column: str, clocks: dict[str, str], units: set[TimeUnit], kinds: list[pa.DataType]
) -> Clock:
    """``clocks``: sort of time -> the first file with it."""
    typed = next((clocks[s] for s in ("zoned", "naive") if s in clocks), None)
    other = next((clocks[s] for s in ("number", "text") if s in clocks), None)
    if typed and other:
        raise UserError(
            f"'{other}', column '{column}': not of a timestamp type, as it is in other files; "
            "write all files with the same type"
        )
    if "zoned" in clocks and "naive" in clocks and schema.time_zone is None:
        raise UserError(
            f"'{clocks['naive']}', column '{column}': times without a zone, while those of '{clocks['zoned']}' have "
            "one; set time_zone to the zone of those without, such as UTC (Spark's INT96 is UTC)"
        )
    if schema.time_unit == "iso" and "number" in clocks:
        raise UserError(
            f"'{clocks['number']}', column '{column}': numbers, not text in time_unit 'iso'; "
            "set time_unit to s, ms, us or ns"
        )
    _check_zone(schema, bool(typed) or schema.time_unit == "iso" or not clocks)
    if units:
        return Clock.of(schema, max(units, key=lambda u: TICKS_PER_SECOND[u]), typed=True)
    decimals = any(pa.types.is_floating(k) or (pa.types.is_decimal(k) and k.scale > 0) for k in kinds)
    return Clock.of(schema, schema.time_unit, fractions=schema.time_unit == "s" and decimals)


def _check_zone(schema: LogSchema, used: bool) -> None:
    if schema.time_zone is not None and not used:
        raise UserError(
            f"time_zone is '{schema.time_zone}', but times in time_unit '{schema.time_unit}' count from 1970 in UTC: "
            "leave time_zone out"
        )


def _statistics(parquet: pq.ParquetFile, column: str) -> Span | None:
    """The span of the file's times by the statistics of its row groups; None where one has none."""
    metadata = parquet.metadata
    names = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    index, kind = names.index(column), parquet.schema_arrow.field(column).type
    ends: list[int] = []
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(index)
        found = chunk.statistics if chunk.is_stats_set else None
        if found is None or not found.has_min_max:
            return None
        ends += [found.min, found.max] if pa.types.is_integer(kind) else [found.min_raw, found.max_raw]
    if not ends or not all(isinstance(e, int | float) and abs(e) < 2**63 for e in ends):
        return None
    own = TICKS_PER_SECOND[kind.unit] if pa.types.is_timestamp(kind) else None
    days = 86_400 if pa.types.is_date32(kind) else 1
    return Span(
        metadata.num_rows, int(min(ends)) * days, int(max(ends)) * days, own or (1 if days > 1 else None)
    )
