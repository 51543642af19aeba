"""What a log's users are described by, put beside each user's sequence.

Shapes: R users.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.batch import Jagged
from gr.data.making.convert import is_text, plain
from gr.data.making.log_types import is_list
from gr.errors import UserError


@dataclass(frozen=True)
class UserFields:
    """``ids``: int64 or string, distinct.  ``columns``: by name, one value an id: int64, float64 (NaN unknown) or
    string ("" unknown), or lists of int64 or string; integers of which some are unknown are lists, empty for these.

    Every process that writes sequences holds them: about 8 bytes for each user and column."""

    ids: pa.Array
    columns: dict[str, pa.Array]

    @staticmethod
    def of_table(table: pa.Table, taken: Iterable[str] = ()) -> UserFields:
        """``table``: ``user_id``, then the columns.  taken: names of the log's own (with ``field.`` before a field's),
        which no column may have."""
        names = {name.removeprefix("field.") for name in taken} | {"item", "time", "type", "value", "user_id"}
        columns = {}
        for name in table.column_names[1:]:
            if name in names:
                raise UserError(
                    f"the users have a column '{name}', as the actions have: rename one, or leave it out of "
                    "users.columns"
                )
            columns[name] = _stored(plain(table[name].combine_chunks()), name)
        return UserFields(table["user_id"].combine_chunks(), columns)

    def of(self, users_R: pa.Array) -> dict[str, np.ndarray | Jagged]:
        """The columns of these users.  Raises UserError for a user that is not described."""
        at_R = pc.index_in(users_R, value_set=self.ids)
        if at_R.null_count:
            missing = users_R.filter(at_R.is_null())
            raise UserError(
                f"user {missing[0].as_py()!r} of the log is not among the users that are described: give each a row "
                "there, or leave users out"
            )
        return {name: _numpy(column.take(at_R)) for name, column in self.columns.items()}


def _stored(column: pa.Array, name: str) -> pa.Array:
    kind = column.type
    if is_list(kind):
        inner = pa.string() if is_text(kind.value_type) else pa.int64()
        lists = _cast(column, pa.list_(inner), name)  # one that nobody knows is taken as an empty one
        if lists.flatten().null_count:
            raise UserError(
                f"column '{name}' of the users has lists in which a value is missing: leave it out of them"
            )
        return lists
    if is_text(kind):
        return pc.fill_null(_cast(column, pa.string(), name), "")
    if pa.types.is_floating(kind) or (pa.types.is_decimal(kind) and kind.precision <= 15):
        return pc.fill_null(column.cast(pa.float64()), float("nan"))
    column = _cast(column, pa.int64(), name)
    if not column.null_count:
        return column
    known = column.is_valid().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(known)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), column.drop_null())


def _cast(column: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
    inner = column.type.value_type if pa.types.is_list(kind) else column.type
    try:
        if not (is_text(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner)):
            raise pa.ArrowInvalid
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"column '{name}' of the users holds {column.type}, of which no field is made: give integers, decimals, "
            "text, or lists of integers or text, or leave it out of users.columns"
        ) from None


def _numpy(column: pa.Array) -> np.ndarray | Jagged:
    if pa.types.is_list(column.type):
        offsets = column.offsets.to_numpy().astype(np.int64)
        return Jagged(offsets - offsets[0], column.flatten().to_numpy(zero_copy_only=False))
    return column.to_numpy(zero_copy_only=False)
