"""Recommendations of a trained run: top-k items per user and vectors, streamed into Parquet.

Shapes: B users of a batch, K items recommended, D model width (one more with an item bias), I catalogue size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.data.making.convert import MISSING, can_be_ids, to_ids
from gr.data.outputs import ROWS_PER_GROUP, beside, delivered, parquet_rows, remove_output
from gr.data.requests import (
    Exclude,
    FoundUsers,
    Request,
    find_users,
    recommendation_requests,
    requests,
)
from gr.data.stores import remedy
from gr.embeddings.table import Table
from gr.errors import UserError
from gr.modality.tower import Tower
from gr.models.retrieval import Retrieval
from gr.train.item_files import read_items
from gr.train.place import AnyPath, parquet_file, place
from gr.train.runs import OpenRun

AS_TEXT = pa.csv.ConvertOptions(column_types={"user_id": pa.string()}, strings_can_be_null=True)
"""Ids in CSV stay as they are written: 007 is not 7."""


def recommend(
    run: OpenRun,
    out: str | os.PathLike,
    *,
    users: Iterable[Any] | FoundUsers | None = None,
    k: int = 100,
    exclude: Exclude | None = None,
    time: int | None = None,
    held_out: str | None = None,
    user_vectors: str | os.PathLike | None = None,
    new_items: str | os.PathLike | None = None,
    advance: Callable[[int], None] = lambda users: None,
) -> int:
    """Write the ``k`` best items of each user to ``out``; returns the number of users.

    Columns: user_id, item_ids (raw ids, best first), scores (float32).  users: raw ids (one that is unknown is an
    error), or those that were found; all without it; each written once in the dataset's order.  exclude: history
    items not to recommend, as in evaluation (the run's without it); a user for whom fewer than k items are left has
    the shorter list.  time: the time of the request in seconds; each user's last time without it.  held_out: ask what
    the evaluation of this split asks: what comes after the actions before the held-out one, at its time, the held-out
    item never excluded; users without one are left out, and a column target_id has the held-out item.  user_vectors:
    a second file of user_id, vector (see :func:`query_vectors`).  new_items: a Parquet file of items that the catalogue
    doesn't have, recommended beside the others (see :func:`unseen_items`).  advance: called with the users
    done.  Files appear when they are complete.
    """
    model, config, data = retrieval(run), run.config, run.data
    device = model.device
    item_ids = data.dataset.catalogue.column("item_id").combine_chunks()
    exclude = config.eval.exclude if exclude is None else exclude
    asked: Iterable[Request]
    if held_out is None:
        asked = recommendation_requests(
            data.dataset,
            max_length=config.data.max_length,
            exclude=exclude,
            batch=config.eval.batch,
            users=users,
            time=time,
            columns=model.needs,
        )
    else:
        if time is not None:
            raise UserError("--held-out asks at the time of the held-out action: leave --time out")
        if users is not None and not isinstance(users, FoundUsers):
            users = find_users(data.dataset, users).refuse_unknown()
        asked = requests(
            data.dataset,
            data.split,
            held_out,
            max_length=config.data.max_length,
            exclude=exclude,
            batch=config.eval.batch,
            users=users,
            columns=model.needs,
        )
    unseen: Table | None = None
    if new_items is not None:
        more_ids, unseen = unseen_items(run, new_items)
        item_ids = pa.concat_arrays([item_ids, more_ids])
    count = 0
    with ExitStack() as files, torch.no_grad():
        lists = files.enter_context(parquet_rows(out))
        vectors = files.enter_context(parquet_rows(user_vectors)) if user_vectors is not None else None
        for request in asked:
            request = request.to(device)
            queries_BD = model.encode(request.batch)
            excluded = (request.exclude_offsets, request.exclude_items)
            scores_BK, rows_BK = model.similarity.topk(model.items, queries_BD, k, excluded)
            if unseen is not None:
                others = model.similarity.topk(unseen, queries_BD, k)
                scores_BK, rows_BK = _best_of((scores_BK, rows_BK), others, model.items.rows, k)
            names = pa.array(request.users.tolist())
            table = _lists_table(names, scores_BK.cpu(), rows_BK.cpu(), item_ids)
            if held_out is not None:
                table = table.append_column(
                    "target_id", item_ids.take(pa.array(request.targets_B.cpu().numpy()))
                )
            lists(table)
            if vectors is not None:
                vectors(vectors_table("user_id", names, query_vectors(model, queries_BD)))
            count += len(request)
            advance(len(request))
        if not count and held_out is not None:
            raise UserError(
                f"nothing to write to '{out}': none of these users has an action that split '{held_out}' holds out"
            )
    return count


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


def write_item_vectors(
    run: OpenRun, out: str | os.PathLike, new_items: str | os.PathLike | None = None
) -> None:
    """Write item_id, vector of the whole catalogue, and of ``new_items`` behind it (see :func:`recommend`); inner
    products with :func:`query_vectors` are the scores."""
    model = retrieval(run)
    parts = [(run.data.dataset.catalogue.column("item_id").combine_chunks(), model.items)]
    if new_items is not None:
        parts.append(unseen_items(run, new_items))
    with parquet_rows(out) as write, torch.no_grad():
        for item_ids, items in parts:
            for start in range(0, len(item_ids), ROWS_PER_GROUP):
                ids = item_ids[start : start + ROWS_PER_GROUP]
                vectors = item_vectors(model, range(start, start + len(ids)), items)
                write(vectors_table("item_id", ids, vectors))


def retrieval(run: OpenRun) -> Retrieval:
    """The run's model, if it recommends."""
    if not isinstance(run.model, Retrieval):
        raise UserError(
            f"run '{run.folder.path}' trained a model '{run.config.model.name}', which scores given items and can't "
            "search the catalogue: recommend with a run whose model is retrieval"
        )
    return run.model


def unseen_items(run: OpenRun, path: str | os.PathLike) -> tuple[pa.Array, Table]:
    """Raw ids, and rows to search, of items that the run's catalogue doesn't have: a Parquet file with item_id and the
    columns that the run's item tower reads.  Only of a model whose tower forms rows from such columns."""
    tower = retrieval(run).items
    if not isinstance(tower, Tower):
        raise UserError(
            f"run '{run.folder.path}' knows items by a row each and has none for new ones: train with "
            "model.item_tower=text or fused"
        )
    items = read_items(path)
    known = run.data.dataset.catalogue.column("item_id").combine_chunks()
    column = items["item_id"].combine_chunks()
    integer = pa.types.is_integer(known.type)
    converted = to_ids(column, integer=integer, fix="")
    if converted.bad is not None and converted.bad.any():
        row = int(converted.bad.argmax())
        what = converted.problem(row).what
        said = "is empty" if what == MISSING else what
        raise UserError(
            f"item_id {column[row].as_py()!r} of '{path}' {said}: write ids as the catalogue's are"
        )
    ids = converted.values.cast(known.type)
    there = pc.is_in(ids, value_set=known)
    if found := pc.sum(there).as_py():
        first = ids.filter(there)[0].as_py()
        raise UserError(
            f"'{path}' has {found:,} items that the catalogue knows ({first!r} is the first): leave them out"
        )
    return ids, tower.unseen(items)


def _best_of(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], rows: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of two searches, both (scores, rows), of which the other's rows come after the ``rows`` of the one."""
    scores_BC = torch.cat([one[0], other[0]], dim=1)
    rows_BC = torch.cat([one[1], other[1] + rows], dim=1)
    scores_BC, order_BC = scores_BC.sort(dim=1, descending=True, stable=True)
    return scores_BC[:, :k], rows_BC.gather(1, order_BC)[:, :k]


def query_vectors(model: Retrieval, queries_BD: Tensor) -> Tensor:
    """(B, D) float32: normalised and divided by the temperature as the similarity does, then a 1 for an item bias."""
    vectors_BD = model.similarity.queries(queries_BD) * model.similarity.scoring.scale
    if not model.similarity.scoring.bias:
        return vectors_BD
    return torch.cat([vectors_BD, torch.ones_like(vectors_BD[:, :1])], dim=1)


def item_vectors(model: Retrieval, rows: range, items: Table | None = None) -> Tensor:
    """(len(rows), D) float32 of the catalogue's items, or of others: normalised as the similarity does, then the item
    bias if there is one."""
    scoring, items = model.similarity.scoring, model.items if items is None else items
    vectors = scoring.columns(items.vectors(rows.start, rows.stop).float())
    if scoring.normalize_eps is not None:
        vectors = F.normalize(vectors, dim=-1, eps=scoring.normalize_eps)
    return (
        torch.cat([vectors, items.biases(rows.start, rows.stop)[:, None]], dim=1) if scoring.bias else vectors
    )


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


def vectors_table(key: str, ids: pa.Array, vectors: Tensor) -> pa.Table:
    """``key``, vector (a fixed-size list of float32)."""
    width = vectors.shape[1]
    values = pa.array(vectors.float().cpu().contiguous().flatten().numpy())
    return pa.table({key: ids, "vector": pa.FixedSizeListArray.from_arrays(values, width)})


def _lists_table(users: pa.Array, scores_BK: Tensor, rows_BK: Tensor, item_ids: pa.Array) -> pa.Table:
    if torch.isnan(scores_BK).any():
        raise UserError("the model scores items as NaN: it has diverged; choose an earlier --checkpoint")
    left_BK = scores_BK != -torch.inf  # where excluded items leave fewer than K
    offsets = pa.array([0, *left_BK.sum(1).cumsum(0).tolist()], pa.int32())
    items = item_ids.take(pa.array(rows_BK[left_BK].numpy()))
    scores = pa.array(scores_BK[left_BK].float().numpy())
    return pa.table(
        {
            "user_id": users,
            "item_ids": pa.ListArray.from_arrays(offsets, items),
            "scores": pa.ListArray.from_arrays(offsets, scores),
        }
    )
