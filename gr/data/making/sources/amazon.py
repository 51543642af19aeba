"""Amazon reviews (McAuley et al. 2015): Books from the ratings file of 2014, Beauty from 5-core sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa

from gr.data.making.described import catalogue_table
from gr.data.making.download import Published
from gr.data.making.files import find_files
from gr.data.making.log import LogReader
from gr.data.making.prepare import Actions, Described
from gr.data.making.schema import Columns, Csv, Filter, LogSchema
from gr.data.making.sources.published import PublishedSource
from gr.data.making.sources.sequences import SequenceLines
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
        files = find_files(str(folder / "sequences.txt"), "csv")
        lines = SequenceLines(files, user_ids="integer", item_ids="integer", fix="fetch the file again")
        return lines, _titles(titles) if titles.is_file() else None


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
