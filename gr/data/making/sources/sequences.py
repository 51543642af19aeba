"""``sequences``: text files with a user and their items in order, a user a line."""

from __future__ import annotations

import codecs
import copy
import io
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator

from gr.data.dataset import SequenceDataset
from gr.data.making.csv_files import SAMPLE_BYTES
from gr.data.making.described import read_catalogue
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.executor import name_of
from gr.data.making.files import COMPRESSED, DataFile, find_files
from gr.data.making.log_types import COMPRESSED_RATIO
from gr.data.making.prepare import prepare
from gr.data.making.quarantine import BadRow, Quarantine, refuse
from gr.data.making.schema import CatalogueSchema, IdType, Preparation, known_encoding
from gr.data.making.sources.base import QUIET, Source
from gr.data.stores import remedy
from gr.errors import UserError, first_line
from gr.progress import Progress

SHOWN = 80  # characters of a bad line that a sentence repeats
ACTION_BYTES = 5  # ids of about 4 digits and a blank
FIXES = {"user": "set user_ids: string if ids are text", "item": "set item_ids: string if ids are text"}


class SequenceFiles(Source):
    """Lines of ``user item item ...``; no times.  Order within a line is the user's order; a user has one line."""

    name = "sequences"

    class Options(Preparation):
        """``delimiter``: between ids; without it any white space.  ``user_ids``, ``item_ids``: ``auto`` is integer
        where the first megabyte holds only integers.  ``catalogue``: as of a log."""

        delimiter: str | None = None
        encoding: Annotated[str, AfterValidator(known_encoding)] = "utf-8"
        user_ids: IdType = "auto"
        item_ids: IdType = "auto"
        catalogue: CatalogueSchema | None = None

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        if source is None:
            raise UserError(
                "sequences are read from somewhere: give --source a file, a glob, a folder or a URL"
            )
        options = self.options
        described = options.catalogue
        lines = SequenceLines(
            find_files(source, "csv", key=None, note=progress.note),
            delimiter=options.delimiter,
            encoding=options.encoding,
            user_ids=options.user_ids,
            item_ids=options.item_ids,
        )
        return prepare(
            lines,
            out,
            name_of(out),
            options,
            described=None
            if described is None
            else lambda integer: read_catalogue(described, integer, progress.note),
            overwrite=overwrite,
            progress=progress,
            provenance={"source": source, "options": options.model_dump(mode="json")},
            engine=engine,
        )


class SequenceLines:
    """Lines of a user id and its item ids in order, as a log without times.  ``fix``: what to do about a bad line, if
    not just to correct it.  Memory: a chunk, and the ids of the users."""

    has_times = False
    ticks_per_second = 1
    without_items = 0
    """Lines with nothing behind the user."""
    first_without = ""
    """Where the first of them is, and what it says."""

    def __init__(
        self,
        files: Sequence[DataFile],
        *,
        delimiter: str | None = None,
        encoding: str = "utf-8",
        user_ids: IdType = "auto",
        item_ids: IdType = "auto",
        fix: str = "",
    ):
        if delimiter == "":
            raise UserError(
                "delimiter is empty: give the text between two ids, or leave it out for white space"
            )
        self.files, self.delimiter, self.encoding, self.fix = files, delimiter, encoding, fix
        self.rows_read = 0
        sizes = [f.size * (COMPRESSED_RATIO if f.path.lower().endswith(COMPRESSED) else 1) for f in files]
        self.estimated_rows = sum(sizes) // ACTION_BYTES + 1
        asked = {"user": user_ids, "item": item_ids}
        found = self._integers_in_sample() if "auto" in asked.values() else set()
        self.integers = {
            role for role, kind in asked.items() if kind == "integer" or (kind == "auto" and role in found)
        }

    def remarks(self) -> list[str]:
        return self._assumptions()

    def facts(self) -> dict[str, Any]:
        return {"files": len(self.files), "assumptions": self._assumptions()}

    def _assumptions(self) -> list[str]:
        if not self.without_items:
            return []
        return [
            f"{self.without_items:,} lines have a user and no item, the first is {self.first_without}: these users are "
            "not in the dataset"
        ]

    @property
    def table_schema(self) -> pa.Schema:
        return pa.schema(
            [(role, pa.int64() if role in self.integers else pa.string()) for role in ("user", "item")]
        )

    def identity(self) -> Any:
        return [
            self.delimiter,
            self.encoding,
            sorted(self.integers),
            *([f.name, f.version] for f in self.files),
        ]

    def parts(self) -> list[None]:
        return [None]  # read by one process: a user may not have two lines

    def only(self, part: None) -> SequenceLines:
        reader = copy.copy(self)
        reader.rows_read = reader.without_items = 0
        return reader

    def seen(self) -> dict[str, Any]:
        return {"rows": self.rows_read, "without_items": [self.without_items, self.first_without]}

    def add_seen(self, seen: dict[str, Any]) -> None:
        self.rows_read += seen["rows"]
        lines, first = seen["without_items"]
        self.without_items += lines
        self.first_without = self.first_without or first

    def tables(self, chunk_rows: int, quarantine: Quarantine) -> Iterator[pa.Table]:
        users: list[Any] = []
        items: list[Any] = []
        seen: set[Any] = set()
        for file in self.files:
            for number, line in self._lines(file):
                ids = self._ids(line)
                problem, kind, fix = self._problem(ids, seen)
                if problem:
                    self._bad_line(file, number, line, problem, kind, fix, quarantine)
                    continue
                first, *sequence = ids
                user = int(first) if "user" in self.integers else first
                seen.add(user)
                if not sequence:
                    self.first_without = (
                        self.first_without or f"'{file.name}', line {number}: {line[:SHOWN]!r}"
                    )
                    self.without_items += 1
                users.extend([user] * len(sequence))
                items.extend(map(int, sequence) if "item" in self.integers else sequence)
                if len(users) >= chunk_rows:
                    yield self._table(users, items)
                    users, items = [], []
        if users:
            yield self._table(users, items)
        if self.without_items == len(seen) > 0:
            raise UserError(
                f"{self._assumptions()[0]}; set delimiter to what stands between ids"
                if self.delimiter is None
                else f"no line has an item behind its user by delimiter {self.delimiter!r}, the first is "
                f"{self.first_without}: set delimiter to what stands between ids"
            )

    def _lines(self, file: DataFile) -> Iterator[tuple[int, str]]:
        """(number, line) of those that aren't blank."""
        utf8 = codecs.lookup(self.encoding).name == "utf-8"
        encoding = "utf-8-sig" if utf8 else self.encoding  # with a mark at the start or without
        try:
            with io.TextIOWrapper(file.open(), encoding=encoding) as text:
                for number, line in enumerate(text, 1):
                    if line.strip():
                        yield number, line.strip("\r\n") if self.delimiter else line.strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"'{file.name}' is not {self.encoding} ({error.reason}): set encoding, such as latin-1"
            ) from None
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read '{file.name}' ({first_line(error)}): {remedy(error, 'check the file')}"
            ) from None

    def _ids(self, line: str) -> list[str]:
        return (
            line.split() if self.delimiter is None else [text.strip() for text in line.split(self.delimiter)]
        )

    def _problem(self, ids: list[str], seen: set[Any]) -> tuple[str, str, str]:
        """What is wrong with a line, the same without its values, and what to do; empty where nothing is."""
        for role, texts in (("user", ids[:1]), ("item", ids[1:])):
            if not all(texts):
                return f"an id of {_a(role)} is empty", f"an id of {_a(role)} is empty", ""
            if role in self.integers and (
                wrong := next((text for text in texts if not _plain_integer(text)), None)
            ):
                what = f"{role} {wrong!r} is not a plain integer of 64 bits"
                return what, f"{_a(role)} is not a plain integer", FIXES[role] if not self.fix else ""
        if (int(ids[0]) if "user" in self.integers else ids[0]) in seen:
            return f"user {ids[0]} has a line above", "the user has a line above", ""
        return "", "", ""

    def _bad_line(
        self,
        file: DataFile,
        number: int,
        line: str,
        problem: str,
        kind: str,
        fix: str,
        quarantine: Quarantine,
    ) -> None:
        self.rows_read += 1
        if quarantine.failing:
            said = f"{line[:SHOWN]!r}: {problem}"
            raise refuse(f"'{file.name}', line {number}", said, fix or self.fix)
        quarantine.add(BadRow(file.name, None, number - 1, None, problem, line), kind)

    def _integers_in_sample(self) -> set[str]:
        """Roles whose ids in the first megabyte of the first file with lines are all plain integers."""
        found: set[str] = set()
        for file in self.files:
            read = 0
            for _, line in self._lines(file):
                ids = self._ids(line)
                found = found or {"user", "item"}
                roles = {"user": ids[:1], "item": ids[1:]}
                found -= {role for role, texts in roles.items() if not all(map(_plain_integer, texts))}
                read += len(line)
                if read > SAMPLE_BYTES or not found:
                    return found
            if read:
                return found
        return found

    def _table(self, users: list[Any], items: list[Any]) -> pa.Table:
        self.rows_read += len(users)
        return pa.table({"user": users, "item": items}, schema=self.table_schema)


def _plain_integer(text: str) -> bool:
    """Whether a 64-bit integer would be written back as the same text: '007' is not."""
    digits = text.removeprefix("-")
    if not (digits.isdecimal() and digits.isascii()) or (digits[0] == "0" and text != "0"):
        return False
    return len(digits) < 19 or -(2**63) <= int(text) < 2**63


def _a(role: str) -> str:
    return f"a{'n' * (role == 'item')} {role}"
