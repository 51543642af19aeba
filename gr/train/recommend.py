"""Recommendations of a trained run: top-k items per user and vectors, streamed into Parquet.

Shapes: B users of a batch, K items recommended, D model width (one more with an item bias), I catalogue size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.data.making.convert import MISSING, to_ids
from gr.data.outputs import ROWS_PER_GROUP, parquet_rows
from gr.data.requests import (
    Exclude,
    FoundUsers,
    Request,
    find_users,
    recommendation_requests,
    requests,
)
from gr.embeddings.table import Table
from gr.errors import UserError
from gr.modality.tower import Tower
from gr.models.retrieval import Retrieval
from gr.train.item_files import read_items
from gr.train.runs import OpenRun


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
    new_items: str | os.PathLike | NewItems | None = None,
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
    doesn't have, recommended beside the others (see :func:`unseen_items`), or what was made of it.  advance: called
    with the users done.  Files appear when they are complete.
    """
    model = retrieval(run)
    if held_out is None:
        asked = _asked(run, users, exclude, time)
    else:
        asked = _held_out(run, held_out, users, exclude, time)
    item_ids = run.data.dataset.catalogue.column("item_id").combine_chunks()
    unseen: Table | None = None
    if new_items is not None:
        more_ids, unseen = _as_new_items(run, new_items)
        item_ids = pa.concat_arrays([item_ids, more_ids])
    count = 0
    with ExitStack() as files, torch.no_grad():
        lists = files.enter_context(parquet_rows(out))
        vectors = files.enter_context(parquet_rows(user_vectors)) if user_vectors is not None else None
        for request in asked:
            request = request.to(model.device)
            queries_BD = model.encode(request.batch)
            scores_BK, rows_BK = _best(model, queries_BD, k, request, unseen)
            names = pa.array(request.users.tolist())
            table = _lists_table(names, scores_BK.cpu(), rows_BK.cpu(), item_ids)
            if held_out is not None:
                targets = item_ids.take(pa.array(request.targets_B.cpu().numpy()))
                table = table.append_column("target_id", targets)
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


def _asked(
    run: OpenRun, users: Iterable[Any] | FoundUsers | None, exclude: Exclude | None, time: int | None
) -> Iterable[Request]:
    """What each user is going to do next."""
    return recommendation_requests(
        run.data.dataset,
        max_length=run.config.data.max_length,
        exclude=exclude or run.config.eval.exclude,
        batch=run.config.eval.batch,
        users=users,
        time=time,
        columns=run.model.needs,
    )


def _held_out(
    run: OpenRun,
    split: str,
    users: Iterable[Any] | FoundUsers | None,
    exclude: Exclude | None,
    time: int | None,
) -> Iterable[Request]:
    """What the evaluation of a split asks of each user."""
    if time is not None:
        raise UserError("--held-out asks at the time of the held-out action: leave --time out")
    if users is not None and not isinstance(users, FoundUsers):
        users = find_users(run.data.dataset, users).refuse_unknown()
    return requests(
        run.data.dataset,
        run.data.split,
        split,
        max_length=run.config.data.max_length,
        exclude=exclude or run.config.eval.exclude,
        batch=run.config.eval.batch,
        users=users,
        columns=run.model.needs,
    )


def _best(
    model: Retrieval, queries_BD: Tensor, k: int, request: Request, unseen: Table | None
) -> tuple[Tensor, Tensor]:
    """(scores, rows), both (B, K), best first, of the catalogue's items that the request doesn't exclude; the rows of
    ``unseen`` ones come after the catalogue's."""
    excluded = (request.exclude_offsets, request.exclude_items)
    scores_BK, rows_BK = model.similarity.topk(model.items, queries_BD, k, excluded)
    if unseen is None:
        return scores_BK, rows_BK
    more_scores_BK, more_rows_BK = model.similarity.topk(unseen, queries_BD, k)
    scores_BC = torch.cat([scores_BK, more_scores_BK], dim=1)
    rows_BC = torch.cat([rows_BK, more_rows_BK + model.items.rows], dim=1)
    scores_BC, order_BC = scores_BC.sort(dim=1, descending=True, stable=True)
    return scores_BC[:, :k], rows_BC.gather(1, order_BC)[:, :k]


def write_item_vectors(
    run: OpenRun, out: str | os.PathLike, new_items: str | os.PathLike | NewItems | None = None
) -> None:
    """Write item_id, vector of the whole catalogue, and of ``new_items`` behind it (see :func:`recommend`); inner
    products with :func:`query_vectors` are the scores."""
    model = retrieval(run)
    parts = [NewItems(run.data.dataset.catalogue.column("item_id").combine_chunks(), model.items)]
    if new_items is not None:
        parts.append(_as_new_items(run, new_items))
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


class NewItems(NamedTuple):
    """Raw ids, and the rows that are searched for them."""

    ids: pa.Array
    rows: Table


def _as_new_items(run: OpenRun, given: str | os.PathLike | NewItems) -> NewItems:
    return given if isinstance(given, NewItems) else unseen_items(run, given)


def unseen_items(run: OpenRun, path: str | os.PathLike) -> NewItems:
    """Raw ids, and rows to search, of items that the run's catalogue doesn't have: a Parquet file with item_id and the
    columns that the run's item tower reads.  Only of a model whose tower forms rows from such columns."""
    tower = retrieval(run).items
    if not isinstance(tower, Tower):
        raise UserError(
            f"run '{run.folder.path}' knows items by a row each and has none for new ones: train with "
            "model.item_tower.name text, image or fused"
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
    return NewItems(ids, tower.unseen(items))


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
