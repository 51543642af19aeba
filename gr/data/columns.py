"""Columns between memory and Parquet, and digests and checksums of what they hold.

A column of actions is stored as one list a user (a multi-valued one as a list of lists), a column of users as it is.
Digests and checksums are of the content, not of its encoding: the same whatever wrote the file.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gr.batch import Jagged, values_of
from gr.data.sequences import DTYPES, ITEM, TIME, TYPE, USER_ID, VALUE, Column, Sequences
from gr.errors import UserError

TYPES = {
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
}
"""Types of values by the name that a manifest gives them."""


MOST = 2**31 - 1
"""Values, or bytes of text, that an array of the files holds: its offsets have 32 bits."""

STORED = {ITEM: "items", TIME: "timestamps", TYPE: "action_types", VALUE: "values"}
"""Names in the files of the columns that every dataset may have: each is a list a user."""


@dataclass(frozen=True)
class ColumnInfo:
    """What a column holds.  ``of``: "actions" or "users".  ``type``: of its values, a key of TYPES.  ``multi``: a list
    of values each, any number of them."""

    name: str
    type: str
    of: str = "actions"
    multi: bool = False

    @property
    def stored(self) -> str:
        """Its name in the Parquet files, where a field may not be taken for a column that every dataset may have."""
        if self.of == "users":
            return self.name if self.name == USER_ID else f"user.{self.name}"
        return STORED.get(self.name, f"field.{self.name}")

    @property
    def arrow(self) -> pa.DataType:
        """As stored."""
        kind = TYPES[self.type]
        for _ in range(self.multi + (self.of == "actions")):
            kind = pa.list_(kind)
        return kind


def described(rows: Sequences) -> list[ColumnInfo]:
    """What the columns of ``rows`` hold; a UserError for what can't be stored."""
    found = []
    for of, columns in (("actions", rows.columns), ("users", rows.user_columns)):
        for name, column in columns.items():
            multi = isinstance(column, Jagged)
            values = values_of(column)
            kind = "string" if values.dtype.kind in "OU" else str(values.dtype)
            if kind not in TYPES:
                raise UserError(f"column '{name}' is of type {kind}: give one of {', '.join(TYPES)}")
            found.append(ColumnInfo(name, kind, of, multi))
    names = [info.name for info in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"'{twice[0]}' is a column of actions and of users: give each a name of its own")
    return found


def canonical(rows: Sequences) -> Sequences:
    """The rows with the columns that every dataset may have in the dtypes that they are stored in."""
    columns = {
        name: column.astype(DTYPES[name], copy=False) if name in DTYPES else column  # type: ignore[union-attr]
        for name, column in rows.columns.items()
    }
    return Sequences(rows.offsets_R1, rows.ordinals_R, columns, rows.user_columns)


def to_table(rows: Sequences) -> pa.Table:
    """As stored: users' columns, then one list a user of each column of actions.  A UserError where these are more
    than lists hold."""
    if (actions := int(rows.offsets_R1[-1])) > MOST:
        first = rows.users_R[:1].tolist()[0]
        raise UserError(
            f"{len(rows):,} users from user {first!r} on have {actions:,} actions, and a block of a dataset holds "
            f"{MOST:,} at most: set max_user_actions to keep only the latest of each user"
        )
    offsets = pa.array(rows.offsets_R1.astype(np.int32))
    stored = {name: _to_arrow(column, name) for name, column in rows.user_columns.items()}
    for name, column in rows.columns.items():
        stored[name] = pa.ListArray.from_arrays(offsets, _to_arrow(column, name))
    return pa.table(stored)


def from_table(table: pa.Table, infos: list[ColumnInfo], first_ordinal: int) -> Sequences:
    """What :func:`to_table` stored.  ``infos``: the columns wanted, ``item`` among them; rows are numbered from
    ``first_ordinal``."""
    arrays = {info.name: whole(table.column(info.name)) for info in infos}
    offsets = arrays[ITEM].offsets.to_numpy().astype(np.int64)
    return Sequences(
        offsets_R1=offsets - offsets[0],
        ordinals_R=np.arange(first_ordinal, first_ordinal + table.num_rows),
        columns={i.name: _from_arrow(arrays[i.name].flatten()) for i in infos if i.of == "actions"},
        user_columns={i.name: _from_arrow(arrays[i.name]) for i in infos if i.of == "users"},
    )


def whole(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece, as it is where it is one (``combine_chunks`` copies that, too)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _to_arrow(column: Column, name: str) -> pa.Array:
    """``name``: for the error where there is more than 32-bit offsets reach."""
    if isinstance(column, Jagged):
        if int(column.offsets[-1]) > MOST:
            raise UserError(
                f"column '{name}' has {int(column.offsets[-1]):,} values in a block of a dataset, which holds {MOST:,} "
                "at most: set max_user_actions, or leave the column out"
            )
        return pa.ListArray.from_arrays(
            pa.array(column.offsets.astype(np.int32)), _to_arrow(column.values, name)
        )
    if column.dtype.kind not in "OU":
        return pa.array(column)
    stored = pa.array(column.tolist(), pa.string())  # in chunks where it's more text than one array holds
    if isinstance(stored, pa.ChunkedArray):
        raise UserError(
            f"column '{name}' has more than {MOST:,} bytes of text in a block of a dataset, which is what it holds: "
            "set max_user_actions, or leave the column out"
        )
    return stored


def _from_arrow(array: pa.Array) -> Column:
    if pa.types.is_list(array.type):
        offsets = array.offsets.to_numpy().astype(np.int64)
        return Jagged(offsets - offsets[0], _from_arrow(array.flatten()))  # type: ignore[arg-type]
    return array.to_numpy(zero_copy_only=False)


def block_digest(rows: Sequences) -> str:
    """Digest of a block; the fingerprint of the dataset, hence the order of training, hangs on it.

    Ids as text, arrays little-endian; the columns that every dataset may have in a fixed order, "|" for one that is
    missing, then the others by name.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\n".join(map(str, rows.users_R.tolist())).encode())
    digest.update(_bytes(rows.offsets_R1.astype(np.int64, copy=False)))
    for name in (ITEM, TIME, TYPE, VALUE):
        column = rows.columns.get(name)
        digest.update(b"|" if column is None else _bytes(column))  # type: ignore[arg-type]
    others = [(name, rows.columns[name]) for name in sorted(rows.columns.keys() - DTYPES.keys())]
    others += [
        (f"{name} of users", rows.user_columns[name]) for name in sorted(rows.user_columns.keys() - {USER_ID})
    ]
    for name, column in others:
        digest.update(f"|{name}|".encode())
        for part in _content(_to_arrow(column, name)):
            digest.update(part)
    return digest.hexdigest()


def checksum(array: pa.Array) -> str:
    """CRC-32 of a column as it is read from Parquet, whatever its type.

    It is made whenever a column is read for the first time, and finds what accidents do to a column at ten times
    the speed of a digest that would also resist an attacker.
    """
    crc = 0
    for part in _content(array):
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def _content(array: pa.Array) -> Iterator[Any]:
    """A column's bytes: where nulls are, the lengths of lists (outer ones first) and of texts, then values."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if array.null_count:
        yield _bytes(array.is_valid().to_numpy(zero_copy_only=False))
        array = array.drop_null()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield _bytes(np.diff(array.offsets.to_numpy()).astype(np.int64))
        yield from _content(array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        _, offsets, content = array.buffers()
        bounds = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        yield _bytes(np.diff(bounds).astype(np.int64))
        if content is not None and len(bounds):
            yield memoryview(content)[bounds[0] : bounds[-1]]
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        yield _bytes(array.to_numpy(zero_copy_only=False))
    else:
        yield repr(array.to_pylist()).encode()


def _bytes(values: np.ndarray) -> Any:
    """The values' bytes, little-endian, without a copy where they are so already."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
