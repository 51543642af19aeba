"""Amazon reviews (McAuley et al. 2015): Books from the ratings file of 2014, Beauty from 5-core sequences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from gr.data.making.described import catalogue_table
from gr.data.making.download import Published
from gr.data.making.log import LogReader
from gr.data.making.prepare import Actions, Described
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import Columns, Csv, Filter, LogSchema
from gr.data.making.sources.published import PublishedSource
from gr.errors import UserError


class AmazonBooks(PublishedSource):
    """Items and users with at least 5 ratings, both counted once in the whole file, then sequences of at least 5:
    695,762 items from the published file (those left before the last filter)."""

    name = "amazon-books"
    published = Published(
        file="ratings_Books.csv",
        url="http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Books.csv",
        # the publisher gives none; this one is what public projects pin
        checksum="sha256:87d923ddac2aacf40c1d0e0e056dbf4bf69c9c7d41852c6b434e781e759c0707",
        files=("ratings_Books.csv",),
        site="https://jmcauley.ucsd.edu/data/amazon",
    )

    class Options(PublishedSource.Options):
        filter: Filter = Filter(min_item_count=5, min_user_count=5, mode="once", min_length=5)

    def read(self, folder: Path) -> tuple[Actions, Described | None]:
        schema = LogSchema(
            columns=Columns(user="user", item="item", time="time", value="rating"),
            user_ids="string",
            item_ids="string",
            csv=Csv(names=["user", "item", "rating", "time"]),
        )
        return LogReader(str(folder / self.published.files[0]), schema), None


class AmazonBeauty(PublishedSource):
    """22,363 users, 12,101 items, 198,502 actions in time order, without times.

    ``sequences.txt``: user id, then item ids, a user a line.  ``titles.tsv`` (item id, ASIN, title) beside it, if
    there is one, becomes the catalogue.
    """

    name = "amazon-beauty"
    published = Published(
        file="sequences.txt",
        url=None,
        checksum=None,
        files=("sequences.txt",),
        site="https://github.com/RUCAIBox/CIKM2020-S3Rec (data/Beauty.txt there)",
    )

    class Options(PublishedSource.Options):
        items: Literal["listed", "seen"] = "seen"

    def read(self, folder: Path) -> tuple[Actions, Described | None]:
        titles = folder / "titles.tsv"
        return SequenceLines(folder / "sequences.txt"), _titles(titles) if titles.is_file() else None


class SequenceLines:
    """Lines of integers, a user id and its item ids in order, as a log."""

    has_times = False
    ticks_per_second = 1

    def __init__(self, file: Path):
        self.file = file
        self.rows_read = 0
        self.estimated_rows = file.stat().st_size // 5 + 1  # ids of about 4 digits and a blank

    def remarks(self) -> list[str]:
        return []

    def facts(self) -> dict[str, Any]:
        return {}

    table_schema = pa.schema([("user", pa.int64()), ("item", pa.int64())])

    def identity(self) -> Any:
        found = self.file.stat()
        return [str(self.file), found.st_size, found.st_mtime]

    def parts(self) -> list[None]:
        return [None]  # read whole: a user may not have two lines

    def only(self, part: None) -> SequenceLines:
        return SequenceLines(self.file)

    def seen(self) -> dict[str, Any]:
        return {"rows": self.rows_read}

    def add_seen(self, seen: dict[str, Any]) -> None:
        self.rows_read += seen["rows"]

    def tables(self, chunk_rows: int, quarantine: Quarantine) -> Iterator[pa.Table]:
        users: list[int] = []
        items: list[int] = []
        seen: set[int] = set()
        with self.file.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    user, *sequence = map(int, line.split())
                except ValueError:
                    raise UserError(
                        f"'{self.file}', line {number}: {line.strip()[:80]!r} is not a user id and item ids, all "
                        "integers; fetch the file again"
                    ) from None
                if user in seen:
                    raise UserError(
                        f"'{self.file}', line {number}: user {user} has a line above; fetch the file again"
                    )
                seen.add(user)
                users.extend([user] * len(sequence))
                items.extend(sequence)
                if len(users) >= chunk_rows:
                    yield self._table(users, items)
                    users, items = [], []
        if users:
            yield self._table(users, items)

    def _table(self, users: list[int], items: list[int]) -> pa.Table:
        self.rows_read += len(users)
        return pa.table({"user": pa.array(users, pa.int64()), "item": pa.array(items, pa.int64())})


def _titles(file: Path) -> Described:
    def read(integer_ids: bool) -> pa.Table:
        rows = [line.split("\t") for line in file.read_text().splitlines()]
        if wrong := next((n for n, row in enumerate(rows, 1) if len(row) != 3), None):
            raise UserError(
                f"'{file}', line {wrong}: not item id, ASIN and title between tabs; fetch the file again"
            )
        ids, asins, titles = zip(*rows, strict=True)
        table = pa.table({"item": pa.array(ids), "asin": pa.array(asins), "title": pa.array(titles)})
        return catalogue_table(table, "item", integer_ids, str(file))

    return read
