"""What is known of the items, and of the users: files read, ids checked, joined to the numbered items."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr.data.making.convert import MISSING, is_number, is_text, is_utf8, plain, to_ids
from gr.data.making.csv_files import csv_columns, read_csv
from gr.data.making.files import find_files, require_column
from gr.data.making.schema import CatalogueSchema, UsersSchema
from gr.errors import UserError

RESERVED = ("item_id", "count")


def read_catalogue(
    schema: CatalogueSchema, integer_ids: bool, note: Callable[[str], None] | None = None
) -> pa.Table:
    """``item_id`` (int64 or string, distinct) and the described columns (CSV: text).  ``note`` is told of files in a
    folder that are left out."""
    return _read(schema, "catalogue", schema.item, integer_ids, note)


def read_users(schema: UsersSchema, integer_ids: bool, note: Callable[[str], None] | None = None) -> pa.Table:
    """``user_id`` (int64 or string, distinct) and the described columns, likewise."""
    table = _read(schema, "users", schema.user, integer_ids, note)
    return table.rename_columns(["user_id", *table.column_names[1:]])


def _read(
    schema: CatalogueSchema | UsersSchema,
    key: str,
    id_column: str,
    integer_ids: bool,
    note: Callable[[str], None] | None,
) -> pa.Table:
    parts: list[pa.Table] = []
    names_of: list[str] = []
    what = {"catalogue": "catalogue", "users": "file of users"}[key]
    for file in find_files(schema.path, schema.format, key=f"{key}.format", note=note):
        if file.format == "parquet":
            names = file.parquet().schema_arrow.names
        else:
            names = csv_columns(file, schema.csv)
        wanted = list(dict.fromkeys([id_column, *(names if schema.columns is None else schema.columns)]))
        for column in wanted:
            require_column(file.name, column, names)
        if file.format == "parquet":
            table = _checked(file.table(wanted), file.name, what)
        else:
            stream = read_csv(file, schema.csv, wanted)
            batches = list(stream.batches)
            if stream.malformed:
                bad = stream.malformed[0]
                fix = f"{bad.fix}, or correct" if bad.fix else "correct"
                raise UserError(
                    f"'{file.name}', record {bad.record}: {bad.text!r} {bad.problem}; {fix} the {what}"
                )
            table = pa.table(
                {c: pa.chunked_array([b.column(c) for b in batches], pa.binary()) for c in wanted}
            )
            table = _as_text(table, file.name, key)
        parts.append(catalogue_table(table, id_column, integer_ids, file.name, what))
        names_of.append(file.name)
    table = joined(parts, names_of, what)
    check_distinct(table, schema.path, {"catalogue": "item", "users": "user"}[key])
    return table


_PLAIN = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
"""Instead of types for which there are few operations."""


def _checked(table: pa.Table, name: str, what: str) -> pa.Table:
    """The table, whose columns are of types that are worked with, and text that is text."""
    for n, column in enumerate(table.column_names):
        kind = table.schema.field(n).type
        if kind in _PLAIN:
            table = table.set_column(n, column, table[column].cast(_PLAIN[kind]))
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if text and not all(map(is_utf8, table[column].chunks)):
            raise UserError(f"'{name}', column '{column}': not all of it is UTF-8; write the {what} again")
        try:
            pq.write_table(table.select([n]).slice(0, 0), pa.BufferOutputStream())
            table[column].slice(0, 0).take(pa.array([], pa.int32()))
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            raise UserError(
                f"'{name}', column '{column}': type {kind} can't be kept; leave it out of columns, or write another"
            ) from None
    return table


def joined(parts: list[pa.Table], files: list[str], what: str) -> pa.Table:
    """The rows of all files.  A column is text where it is in each of them in some form, a float where one has floats
    and others integers that floats can hold."""
    for column in dict.fromkeys(name for part in parts for name in part.column_names):
        kinds = {n: p.schema.field(column).type for n, p in enumerate(parts) if column in p.column_names}
        known = {kind for kind in kinds.values() if not pa.types.is_null(kind)}
        if len(known) > 1 and all(map(is_text, known)):
            for n in kinds:
                at = parts[n].column_names.index(column)
                parts[n] = parts[n].set_column(at, column, parts[n][column].cast(pa.string()))
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(_unlike(parts, files, what)) from None


def _unlike(parts: list[pa.Table], files: list[str], what: str) -> str:
    """The first column of which two files have types that don't go together."""
    first: dict[str, tuple[str, pa.DataType]] = {}
    for part, file in zip(parts, files):
        for field in part.schema:
            if pa.types.is_null(field.type):
                continue
            name, kind = first.setdefault(field.name, (file, field.type))
            if kind != field.type:
                return (
                    f"'{file}', column '{field.name}': type {field.type}, where '{name}' has {kind}; write all files "
                    f"of the {what} with one type"
                )
    return f"the files of the {what} don't go together: write them with the same types"


def catalogue_table(
    table: pa.Table, item: str, integer_ids: bool, name: str, what: str = "catalogue"
) -> pa.Table:
    """``table`` with its column ``item`` checked and renamed to item_id, first.  ``what``: the table, in sentences."""
    kind = table.schema.field(item).type
    if not (is_text(kind) or is_number(kind) or pa.types.is_null(kind)):
        raise UserError(f"'{name}', column '{item}': type {kind} can't be ids; write integers or text")
    column = to_ids(plain(table[item].combine_chunks()), integer_ids, "")
    if column.bad is not None:
        row = int(column.bad.argmax())
        value, wrong = table[item][row].as_py(), column.problem(row).what
        problem = (
            "the value is missing" if wrong == MISSING else f"{value!r} {wrong}, where the log has integers"
        )
        if wrong != MISSING and not integer_ids:
            problem = f"{value!r} {wrong}"
        raise UserError(f"'{name}', row {row}, column '{item}': {problem}; correct the {what}")
    others = {c: table[c] for c in table.column_names if c != item}
    if clash := [c for c in others if c in RESERVED]:
        raise UserError(
            f"'{name}' has a column '{clash[0]}', a name that gr gives: rename it or leave it out of columns"
        )
    return pa.table({"item_id": column.values, **others})


def join(ids: pa.Array, counts: pa.Array, described: pa.Table | None) -> tuple[pa.Table, int]:
    """The dataset's catalogue, in the order of ``ids``, and how many of the items are not described."""
    columns: dict[str, pa.Array] = {"item_id": ids, "count": counts}
    if described is None:
        return pa.table(columns), 0
    at = pc.index_in(ids, value_set=described["item_id"].combine_chunks())
    for name in described.column_names:
        if name != "item_id":
            columns[name] = described[name].combine_chunks().take(at)
    return pa.table(columns), at.null_count


def _as_text(table: pa.Table, name: str, key: str) -> pa.Table:
    try:
        return table.cast(pa.schema([(c, pa.string()) for c in table.column_names]))
    except pa.ArrowInvalid:
        raise UserError(f"'{name}' is not UTF-8: set {key}.csv.encoding, for example latin-1") from None


def check_distinct(table: pa.Table, name: str, what: str) -> None:
    """Refuse a table of which two rows have one ``item_id``."""
    ids = table["item_id"]
    if len(ids.unique()) < len(ids):
        counted = ids.value_counts()
        twice = counted.filter(pc.greater(counted.field("counts"), 1))
        raise UserError(
            f"'{name}' lists {what} {twice[0]['values'].as_py()!r} more than once: leave one row of it"
        )
