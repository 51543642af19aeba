"""MovieLens-1M as a table of impressions: will this user like this film?  The data of pre-ranking's published tables
(Li et al., IntTower, arXiv 2210.09890): ratings of 3 are dropped, above 3 is a like, the split is random.

A row of the dataset is one rating; rows stand in a random order that hangs on ``split_seed`` alone, so that the split
``impressions`` (gr/data/split.py) cuts training, validation and test from it.

What there is beside ids: mean labels of the user and of the film.  They come from labels, so it matters from which:

- **clean**: a row of training is given the means of the training rows in other folds (its own label is in neither), a
  held-out row those of all training rows.
- **leaky**, as in the released code behind the published figures: means over all rows of the same part, the row's own
  label among them, and of the test rows the test's own labels.  What is to be predicted is partly told.  Figures under
  it compare with the published ones, and with nothing else.

The catalogue has an ``item_mean``, too: that of a row which isn't among the labels, for heads of items that are
computed before anybody asks.

Shapes: N ratings, U users, I films.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
from pydantic import Field

from gr.config import FRACTION, SEED, Section
from gr.data.dataset import SequenceDataset
from gr.data.hashing import derive, keyed
from gr.data.making.download import Published, downloads, obtain
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.sources.base import QUIET, Source
from gr.data.making.sources.movielens import ML1M
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter, check_output
from gr.errors import UserError, first_line
from gr.progress import Progress

NAME = "ml-1m-ctr"
BLOCK_ROWS = 8192
AGES = (1, 18, 25, 35, 45, 50, 56)
OCCUPATIONS = 21
GENDERS = ("F", "M")


class ML1MCTR(Source):
    """739,012 of the 1,000,209 ratings; 6,040 users, 3,668 films."""

    name = NAME
    published = Published(
        file=ML1M.published.file,
        url=ML1M.published.url,
        checksum=ML1M.published.checksum,
        files=("ratings.dat", "movies.dat", "users.dat"),
        site=ML1M.published.site,
    )

    class Options(Section):
        """``leaky``: means with the labels that they help to predict, as published.  ``folds``: of the clean means;
        1 leaves one row out at a time.  ``test``: share of all rows; ``valid``: of the others.  ``cache``: folder for
        downloads, by default ``downloads`` beside OUT."""

        leaky: bool = False
        folds: Annotated[int, Field(ge=1, le=1000)] = 10
        test: Annotated[FRACTION, Field(gt=0)] = 0.2
        valid: FRACTION = 0.2
        split_seed: SEED = 1
        cache: str | None = None

    options: Options

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        if engine.name != "process":
            raise UserError(f"{NAME} is made by one process, not on {engine.name}: leave --engine out")
        check_output(out, overwrite)
        options = self.options
        folder = obtain(source, self.published, downloads(options.cache, out), progress)
        ratings = read_ratings(folder / "ratings.dat")
        users = read_users(folder / "users.dat")
        films = ML1M().films(folder / "movies.dat", True)
        rated = len(ratings["value"])
        kept = np.flatnonzero(ratings["value"] != 3)
        if not len(kept):
            raise UserError(
                f"'{folder / 'ratings.dat'}' has ratings of 3 alone, which are dropped: fetch it again"
            )
        order = kept[np.argsort(keyed(kept, derive(NAME, options.split_seed)), kind="stable")]
        shares = split_shares(options.test, options.valid)
        train, held = round(shares["train"] * len(order)), round(sum(shares.values()) * len(order))
        if not train:
            raise UserError(
                f"test={options.test:g} and valid={options.valid:g} leave none of {len(order):,} ratings to train on: "
                "lower them"
            )
        columns, items, catalogue = _columns(
            {name: column[order] for name, column in ratings.items()}, users, films
        )
        label_N, means = columns["label"], {}
        means["user_mean"], _ = _means(label_N, columns["user"], train, held, options)
        means["item_mean"], of_items = _means(label_N, items, train, held, options)
        catalogue = catalogue.append_column("item_mean", pa.array(of_items))
        protocol = "leaky" if options.leaky else "clean"
        provenance = {
            "source": source or self.published.url,
            "options": options.model_dump(mode="json"),
            "protocol": protocol,
            "split": shares,
            "likes": float(label_N.mean()),
            "stages": [
                {"stage": "rows of the log", "actions": rated, "users": None, "items": None},
                {
                    "stage": "without ratings of 3",
                    "actions": len(order),
                    "users": len(np.unique(columns["user"])),
                    "items": catalogue.num_rows,
                },
            ],
        }
        writer = DatasetWriter(
            out,
            f"{NAME}, {protocol} protocol",
            row_order="stream",
            block_rows=BLOCK_ROWS,
            overwrite=overwrite,
        )
        try:
            _write(writer, order + 1, items, columns | means, progress)
            return writer.finish(catalogue, provenance)
        except BaseException:
            writer.abandon()
            raise


def _write(
    writer: DatasetWriter,
    numbers_N: np.ndarray,
    items_N: np.ndarray,
    columns: dict[str, np.ndarray],
    progress: Progress,
) -> None:
    """A row an impression, called by the number of its line in the log."""
    with progress.stage("writing", len(numbers_N), "ratings") as stage:
        for start in range(0, len(numbers_N), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            numbers = numbers_N[part]
            given = {name: column[part] for name, column in columns.items()}
            writer.add(Sequences.of(numbers, np.arange(len(numbers) + 1), item=items_N[part], **given))
            stage.advance(len(numbers))


def split_shares(test: float, valid: float) -> dict[str, float]:
    """The shares of all rows that the split ``impressions`` is to be told."""
    return {"train": round((1 - test) * (1 - valid), 12), "valid": round((1 - test) * valid, 12)}


def read_ratings(file: Path) -> dict[str, np.ndarray]:
    """``user``, ``item``, ``value``: int64, N each, in the file's order."""
    names = ["user", "", "item", "", "value", "", "time"]  # fields are two colons apart
    table = _read(file, names, {"user": pa.int64(), "item": pa.int64(), "value": pa.int64()})
    found = {name: table[name].to_numpy() for name in ("user", "item", "value")}
    wrong = np.flatnonzero((found["value"] < 1) | (found["value"] > 5))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"'{file}', line {row + 1}: the rating is {found['value'][row]}, and a rating is 1 to 5; "
            "fetch the file again"
        )
    return found


def read_users(file: Path) -> dict[str, np.ndarray]:
    """``id``, and as codes from 0 on ``gender``, ``age`` (its group), ``occupation``: int64, U each, by id."""
    names = ["id", "", "gender", "", "age", "", "occupation", "", "zip"]
    kinds = {"id": pa.int64(), "gender": pa.string(), "age": pa.int64(), "occupation": pa.int64()}
    table = _read(file, names, kinds)
    ids = table["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    if (twice := ids[order][1:][np.diff(ids[order]) == 0]).size:
        raise UserError(f"'{file}' lists user {twice[0]} more than once: fetch the file again")
    known = {"gender": GENDERS, "age": AGES, "occupation": tuple(range(OCCUPATIONS))}
    found = {"id": ids[order]}
    for name, categories in known.items():
        values = table[name].to_pylist()
        codes = {value: code for code, value in enumerate(categories)}
        if unseen := [(line, value) for line, value in enumerate(values, 1) if value not in codes]:
            line, value = unseen[0]
            raise UserError(
                f"'{file}', line {line}: {name} {value!r} is none of {', '.join(map(str, categories))}; "
                "fetch the file again"
            )
        found[name] = np.array([codes[value] for value in values])[order]
    return found


def _read(file: Path, names: list[str], kinds: dict[str, pa.DataType]) -> pa.Table:
    """Columns of a file whose fields are separated by two colons: every other one, between them, is empty."""
    columns = [name or f"between {number}" for number, name in enumerate(names)]
    shape = "::".join(name for name in names if name)
    try:
        table = csv.read_csv(
            file,
            csv.ReadOptions(column_names=columns, encoding="latin-1", use_threads=False),
            csv.ParseOptions(delimiter=":", quote_char=False),
            csv.ConvertOptions(column_types=kinds, include_columns=list(kinds), strings_can_be_null=False),
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"'{file}' can't be read as lines of {shape} ({first_line(error)}): fetch the file again"
        ) from None
    for name in kinds:
        if table[name].null_count:
            line = table[name].is_null().index(True).as_py() + 1
            raise UserError(f"'{file}', line {line}: {name} is missing; fetch the file again")
    return table


def _columns(
    ratings: dict[str, np.ndarray], users: dict[str, np.ndarray], films: pa.Table
) -> tuple[dict[str, np.ndarray], np.ndarray, pa.Table]:
    """Columns of the rows, their items' rows, and the catalogue: the films that have a row."""
    at = np.searchsorted(users["id"], ratings["user"])
    unknown = (at == len(users["id"])) | (
        users["id"][np.minimum(at, len(users["id"]) - 1)] != ratings["user"]
    )
    if unknown.any():
        raise UserError(
            f"ratings.dat has user {ratings['user'][unknown][0]}, whom users.dat doesn't have: fetch both again"
        )
    columns = {"user": at, **{name: users[name][at] for name in ("gender", "age", "occupation")}}
    columns["label"] = (ratings["value"] > 3).astype(np.int64)
    ids, items = np.unique(ratings["item"], return_inverse=True)
    listed = dict(zip(films["item_id"].to_pylist(), range(films.num_rows)))
    if missing := [item for item in ids.tolist() if item not in listed]:
        raise UserError(f"ratings.dat has film {missing[0]}, which movies.dat doesn't list: fetch both again")
    rows = films.take([listed[item] for item in ids.tolist()])
    genres = [text.split("|") for text in rows["genres"].to_pylist()]
    names = sorted({name for some in genres for name in some})
    code = {name: number for number, name in enumerate(names)}
    catalogue = pa.table(
        {
            "item_id": pa.array(ids),
            "count": np.bincount(items, minlength=len(ids)),
            "title": rows["title"].combine_chunks(),
            "genres": pa.array([[code[name] for name in some] for some in genres], pa.list_(pa.int64())),
            "genre_names": rows["genres"].combine_chunks(),
        }
    )
    return columns, items.astype(np.int32), catalogue


def _means(
    label_N: np.ndarray,
    owner_N: np.ndarray,
    train: int,
    held: int,
    options: ML1MCTR.Options,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean labels of each row's owner, (N,) float32, scaled so that training's are from 0 to 1; and of each owner, as
    one asks who has no row to leave out.  Rows before ``train`` train, those from ``held`` on are the test."""
    before = held if options.leaky else train
    counts_O = np.bincount(owner_N[:before], minlength=int(owner_N.max()) + 1)
    sums_O = np.bincount(owner_N[:before], label_N[:before], len(counts_O))
    mean_O = np.where(counts_O > 0, sums_O / np.maximum(counts_O, 1), label_N[:before].mean())
    if options.leaky:
        parts = (slice(0, held), slice(held, None))
        mean_N = np.concatenate([_of_all(label_N[part], owner_N[part]) for part in parts])
    else:
        mean_N = clean_means(label_N, owner_N, train, options.folds, options.split_seed)
    low, high = mean_N[:train].min(), mean_N[:train].max()
    scaled_N, scaled_O = ((mean - low) / max(high - low, 1e-12) for mean in (mean_N, mean_O))
    return scaled_N.astype(np.float32), scaled_O.astype(np.float32)


def _of_all(label_N: np.ndarray, owner_N: np.ndarray) -> np.ndarray:
    """(N,) each row's owner's mean label, the row's own included."""
    return (np.bincount(owner_N, label_N) / np.maximum(np.bincount(owner_N), 1))[owner_N]


def clean_means(label_N: np.ndarray, owner_N: np.ndarray, train: int, folds: int, seed: int) -> np.ndarray:
    """(N,) float64: for a row of training the mean label of its owner's training rows in other folds (of all others
    where ``folds`` is 1), for another row of all its owner's training rows; where there are none, training's mean.

    Leaving out the row alone gives a row a mean that says its label, to who knows the owner: it is the lower of two.
    Out of a fold that is so only together with what else is in it."""
    owners = int(owner_N.max()) + 1
    label_T, owner_T = label_N[:train].astype(np.float64), owner_N[:train]
    sums_O, counts_O = np.bincount(owner_T, label_T, owners), np.bincount(owner_T, minlength=owners)
    sums_N, counts_N = sums_O[owner_N], counts_O[owner_N].astype(np.float64)
    if folds == 1:
        sums_N[:train] -= label_T
        counts_N[:train] -= 1
    else:
        fold_T = (keyed(np.arange(train), derive(NAME, "folds", seed)) % np.uint64(folds)).astype(np.int64)
        cell_T = owner_T * folds + fold_T
        sums_N[:train] -= np.bincount(cell_T, label_T, owners * folds)[cell_T]
        counts_N[:train] -= np.bincount(cell_T, minlength=owners * folds)[cell_T]
    return np.where(counts_N > 0, sums_N / np.maximum(counts_N, 1), label_T.mean())
