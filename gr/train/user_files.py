"""Files of users: of those to recommend to, and of those among them that a dataset doesn't have."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.csv

from gr.data.making.convert import can_be_ids, to_ids
from gr.data.outputs import beside, delivered, remove_output
from gr.data.requests import FoundUsers
from gr.data.stores import remedy
from gr.errors import UserError
from gr.train.place import AnyPath, parquet_file, place

AS_TEXT = pa.csv.ConvertOptions(column_types={"user_id": pa.string()}, strings_can_be_null=True)
"""Ids in CSV stay as they are written: 007 is not 7."""


def read_user_ids(path: str | os.PathLike) -> list[str]:
    """Raw ids, as text, from a text file (one a line; empty lines are no ids), or a Parquet or CSV file's
    ``user_id``."""
    file = place(path)
    kind = file.suffix.lower()
    try:
        if kind not in (".parquet", ".csv"):
            lines = _content(file).decode("utf-8-sig").splitlines()
            return [line.strip() for line in lines if line.strip()]
        if kind == ".parquet":
            table = parquet_file(file).read()
        else:
            table = pa.csv.read_csv(pa.BufferReader(_content(file)), convert_options=AS_TEXT)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no file '{file}' with users: give a list of ids, or --users all") from None
    except UnicodeDecodeError:
        raise UserError(
            f"'{file}' is not text: list the ids one a line, or name it .parquet or .csv if it is such a file"
        ) from None
    except (OSError, pa.ArrowInvalid) as error:
        said = " ".join(str(error).split()).rstrip(".")
        fix = remedy(error, "write it again, or list the ids one a line in a text file")
        raise UserError(f"'{file}' cannot be read as {kind[1:] or 'text'} ({said}): {fix}") from None
    if "user_id" not in table.column_names:
        raise UserError(
            f"'{file}' has no column user_id (it has {', '.join(table.column_names)}): rename the column"
        )
    column = table.column("user_id").combine_chunks()
    if not can_be_ids(column.type):
        raise UserError(f"column user_id of '{file}' is of type {column.type}: write ids, integers or text")
    ids = to_ids(column, integer=False, fix="").values.to_pylist()  # 2.0 is 2, as where the log was read
    if None in ids:
        raise UserError(f"row {ids.index(None) + 1} of '{file}' has no user_id: remove it or fill it in")
    return ids


def _content(file: AnyPath) -> bytes:
    with file.open("rb") as opened:
        return opened.read()


def unknown_users_file(out: str | os.PathLike) -> str:
    """The file beside ``out`` that lists the users who were asked for and are unknown: recs.unknown-users.txt."""
    return beside(out, ".unknown-users.txt")


def write_unknown_users(found: FoundUsers, out: str | os.PathLike) -> str | None:
    """List the unknown users beside ``out``, an id a line as ``--users`` reads them; returns the file.  Where all are
    known there is none, nor one that an earlier call left."""
    file = unknown_users_file(out)
    if not found.unknown:
        remove_output(file)
        return None
    with delivered(file) as scratch:
        scratch.write_text("".join(f"{user}\n" for user in found.unknown), encoding="utf-8")
    return file
