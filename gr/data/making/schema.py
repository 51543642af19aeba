"""Schema of an action log: which columns mean what, and what to do with bad rows, duplicates and rare ids.

A schema file is YAML with the keys of :class:`LogSchema` and :class:`Preparation`; see docs/your-own-data.md.
"""

from __future__ import annotations

import codecs
from datetime import date
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gr.config import POSITIVE, Section

IdType = Literal["auto", "integer", "string"]
TimeUnit = Literal["s", "ms", "us", "ns", "iso"]

TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9, "iso": 10**6}


FIRST_DAY, LAST_DAY = date(1970, 1, 1), date(2200, 1, 1)
"""Times before the one or from the other on are no times of an action: sentinels, or numbers in another unit."""


class FieldColumn(Section):
    """An extra column of the actions.  ``type`` auto: the files' own (integer if it is one in all of them, float if
    it is a number in all of them, else string), string in CSV; in names of folders integer if all are integers."""

    shorthand = "column"
    column: str
    type: Literal["auto", "integer", "float", "string"] = "auto"


class FieldOfDataset(FieldColumn):
    """One whose type is that which the dataset has that is appended to, and was not asked for: no value may become
    another for it."""


GIVEN = frozenset(("user_id", "item", "time", "type", "value"))
"""Names of columns that a dataset gives."""


def _free(fields: dict[str, Any]) -> dict[str, Any]:
    if taken := fields.keys() & GIVEN:
        raise ValueError(f"'{min(taken)}' is the name of a column that gr makes: give the field another")
    return fields


class Columns(Section):
    """Names of the log's columns, in the files or in names of folders (``dt=2024-01-31/``).  Without ``time`` the
    order is that of the files, by the numbers in their names, and of the rows in them."""

    user: str
    item: str
    time: str | None = None
    action_type: str | None = None
    value: str | None = None
    fields: Annotated[dict[str, FieldColumn | str], AfterValidator(_free)] = {}

    @model_validator(mode="after")
    def _apart(self) -> Columns:
        return apart(self)


def apart(roles: Any) -> Any:
    """``roles`` (with user, item, time, value, perhaps action_type), unless two of them are one column.  A rating may
    be both the type and the value of an action, and a field may be any of them."""
    taken: dict[str, str] = {}
    for role in ("user", "item", "time", "action_type", "value"):
        if (column := getattr(roles, role, None)) is None:
            continue
        first = taken.setdefault(column, role)
        if first != role and (first, role) != ("action_type", "value"):
            raise ValueError(f"'{column}' is both {first} and {role}: name a column of its own for each")
    return roles


def known_encoding(name: str) -> str:
    """``name``, if Python has an encoding of that name; a ValueError, which pydantic tells with the key, if not."""
    try:
        codecs.lookup(name)
    except LookupError:
        raise ValueError("no encoding of that name is known: use utf-8, latin-1, ...") from None
    return name


_NO_ZONE = "no time zone of that name is known: use UTC, Europe/Berlin, ..."


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (OSError, ValueError):  # ZoneInfoNotFoundError is a KeyError, below
        raise ValueError(_NO_ZONE) from None
    except KeyError:
        if name != "UTC":  # needs no table of zones
            raise ValueError(_NO_ZONE) from None
    return name


def _day(value: Any) -> Any:
    """A date from text, as Python and JSON give it (YAML has dates of its own)."""
    if isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            raise ValueError("a day is needed, such as 1970-01-01") from None
    return value


DAY = Annotated[date, BeforeValidator(_day)]


def _ascii(text: str) -> str:
    if not text.isascii():
        raise ValueError("only ASCII characters can cut CSV")
    return text


class Csv(Section):
    """Form of CSV files.  ``names``: the columns of files without a header line.  ``delimiter``: one character, or
    one character repeated (``::``).  ``escape``: what stands before a quote in a value, where that isn't doubled.
    ``null_values``: spellings of a missing value."""

    delimiter: Annotated[str, AfterValidator(_ascii)] = ","
    names: list[str] | None = None
    quote: Annotated[str, Field(max_length=1), AfterValidator(_ascii)] = '"'
    escape: Annotated[str, Field(max_length=1), AfterValidator(_ascii)] = ""
    encoding: Annotated[str, AfterValidator(known_encoding)] = "utf-8"
    newlines_in_values: bool = False
    null_values: list[str] = [""]


class CatalogueSchema(Section):
    """Where the items are described: ``path`` (file, folder, glob or URL), its item id column and the columns kept
    (all of them if not given).  ``format`` where the names don't say it, as for ``.item``."""

    path: str
    item: str
    columns: list[str] | None = None
    format: Literal["auto", "parquet", "csv"] = "auto"
    csv: Csv = Csv()


class UsersSchema(Section):
    """Where the users are described: as a catalogue does it of items, with a row for each user of the log."""

    path: str
    user: str
    columns: list[str] | None = None
    format: Literal["auto", "parquet", "csv"] = "auto"
    csv: Csv = Csv()


class LogSchema(Section):
    """What the log looks like.

    ``time_unit``: unit of numeric times, or ``iso`` for text; columns of a timestamp type know their own.
    ``time_zone``: clock of the times that name none; without it UTC, and a log in which only some name one is
    refused.  ``earliest``, ``latest``: a time outside of [earliest, latest) is a bad row.  ``unknown_times``: numbers
    that stand for an unknown time (in time_unit; seconds where times are text or timestamps): bad rows.
    ``user_ids``, ``item_ids``, ``action_types``: ``auto`` is the type in the first file with rows (CSV: integer if
    the first megabyte's are).
    """

    columns: Columns
    time_unit: TimeUnit = "s"
    time_zone: Annotated[str, AfterValidator(_known_zone)] | None = None
    earliest: DAY = FIRST_DAY
    latest: DAY = LAST_DAY
    unknown_times: list[int] = []
    user_ids: IdType = "auto"
    item_ids: IdType = "auto"
    action_types: IdType = "auto"
    format: Literal["auto", "parquet", "csv"] = "auto"
    csv: Csv = Csv()
    catalogue: CatalogueSchema | None = None
    users: UsersSchema | None = None


class Filter(Section):
    """Minimum counts.  ``once``: items and users are counted once, in the whole log, as the papers do; ``core``:
    again and again until nothing more goes (k-core).  Then users with fewer than ``min_length`` actions left go."""

    min_item_count: Annotated[int, Field(ge=0)] = 0
    min_user_count: Annotated[int, Field(ge=0)] = 0
    mode: Literal["once", "core"] = "once"
    min_length: POSITIVE = 1


class Preparation(Section):
    """Policies and resources of preparing.

    ``items``: rows of the catalogue: ``seen``, those with an action left after the count filter (before
    ``min_length``, as in the published preparation of Amazon Books), or ``listed``, also all that the catalogue
    file lists.
    ``max_user_actions``: of each user only so many are kept, the latest, before anything is counted: a robot with
    millions of actions needs no more memory than others.
    ``memory_mb``: working memory of one partition; ``partitions`` (a power of two) overrides the choice made by it.
    ``scratch``: folder for the partitions, by default the one that OUT is in.
    """

    on_bad_rows: Literal["fail", "quarantine"] = "fail"
    duplicates: Literal["keep", "drop_exact"] = "keep"
    filter: Filter = Filter()
    items: Literal["listed", "seen"] = "seen"
    max_user_actions: POSITIVE | None = None
    chunk_rows: POSITIVE = 2**20
    memory_mb: POSITIVE = 256
    partitions: POSITIVE | None = None
    scratch: str | None = None
