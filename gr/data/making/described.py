"""What is known of the items, and of the users: files read, ids checked, joined to the numbered items."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from gr.data.making.convert import MISSING, plain, to_ids
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
    parts, what = [], {"catalogue": "catalogue", "users": "file of users"}[key]
    for file in find_files(schema.path, schema.format, key=f"{key}.format", note=note):
        if file.format == "parquet":
            names = file.parquet().schema_arrow.names
        else:
            names = csv_columns(file, schema.csv)
        wanted = list(dict.fromkeys([id_column, *(schema.columns or names)]))
        for column in wanted:
            require_column(file.name, column, names)
        if file.format == "parquet":
            table = file.table(wanted)
        else:
            stream = read_csv(file, schema.csv, wanted)
            batches = list(stream.batches)
            if stream.malformed:
                record, text, problem = stream.malformed[0]
                raise UserError(f"'{file.name}', record {record}: {text!r} {problem}; correct the {what}")
            table = pa.table(
                {c: pa.chunked_array([b.column(c) for b in batches], pa.binary()) for c in wanted}
            )
            table = _as_text(table, file.name, key)
        parts.append(catalogue_table(table, id_column, integer_ids, file.name, what))
    table = pa.concat_tables(parts, promote_options="default")
    check_distinct(table, schema.path, {"catalogue": "item", "users": "user"}[key])
    return table


def catalogue_table(
    table: pa.Table, item: str, integer_ids: bool, name: str, what: str = "catalogue"
) -> pa.Table:
    """``table`` with its column ``item`` checked and renamed to item_id, first.  ``what``: the table, in sentences."""
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
