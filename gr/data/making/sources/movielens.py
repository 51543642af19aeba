"""MovieLens (Harper and Konstan 2015): every rating is a positive event; the catalogue is every film listed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa

from gr.data.making.described import catalogue_table, check_distinct, read_catalogue
from gr.data.making.download import Published
from gr.data.making.log import LogReader
from gr.data.making.prepare import Actions, Described
from gr.data.making.schema import CatalogueSchema, Columns, Csv, LogSchema
from gr.data.making.sources.published import PublishedSource
from gr.errors import UserError

SITE = "https://grouplens.org/datasets/movielens"


class MovieLens(PublishedSource):
    """What the sizes have in common.  Ratings keep their value; ties in time keep the order of the file."""

    class Options(PublishedSource.Options):
        items: Literal["listed", "seen"] = "listed"

    def read(self, folder: Path) -> tuple[Actions, Described | None]:
        ratings, films = self.published.files
        return LogReader(str(folder / ratings), self.schema()), lambda integer: self.films(
            folder / films, integer
        )

    def schema(self) -> LogSchema:
        """Form of the ratings."""
        raise NotImplementedError

    def films(self, file: Path, integer_ids: bool) -> pa.Table:
        """The listed films: item_id, title, genres."""
        raise NotImplementedError


class ML1M(MovieLens):
    """1,000,209 ratings of 6,040 users; 3,883 films listed, 3,706 rated."""

    name = "ml-1m"
    published = Published(
        file="ml-1m.zip",
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        checksum="md5:c4d9eecfca2ab87c1945afe126590906",
        files=("ratings.dat", "movies.dat"),
        site=f"{SITE}/1m",
    )

    def schema(self) -> LogSchema:
        return LogSchema(
            columns=Columns(user="user", item="item", time="time", value="rating"),
            user_ids="integer",
            item_ids="integer",
            csv=Csv(delimiter="::", names=["user", "item", "rating", "time"], quote=""),
        )

    def films(self, file: Path, integer_ids: bool) -> pa.Table:
        rows = []
        for line, text in enumerate(file.read_text(encoding="latin-1").splitlines(), 1):
            parts = text.split("::")
            if len(parts) != 3:
                raise UserError(
                    f"'{file}', line {line}: {text!r} is not id::title::genres; fetch the file again"
                )
            rows.append(parts)
        if not rows:
            raise UserError(f"'{file}' lists no film: fetch the file again")
        ids, titles, genres = zip(*rows, strict=True)
        table = pa.table({"item": pa.array(ids), "title": pa.array(titles), "genres": pa.array(genres)})
        films = catalogue_table(table, "item", integer_ids, str(file))
        check_distinct(films, str(file), "item")
        return films


class ML20M(MovieLens):
    """20,000,263 ratings of 138,493 users; 27,278 films listed, 26,744 rated."""

    name = "ml-20m"
    published = Published(
        file="ml-20m.zip",
        url="https://files.grouplens.org/datasets/movielens/ml-20m.zip",
        checksum="md5:cd245b17a1ae2cc31bb14903e1204af3",
        files=("ratings.csv", "movies.csv"),
        site=f"{SITE}/20m",
    )

    def schema(self) -> LogSchema:
        return LogSchema(
            columns=Columns(user="userId", item="movieId", time="timestamp", value="rating"),
            user_ids="integer",
            item_ids="integer",
        )

    def films(self, file: Path, integer_ids: bool) -> pa.Table:
        schema = CatalogueSchema(path=str(file), item="movieId", columns=["title", "genres"])
        return read_catalogue(schema, integer_ids)
