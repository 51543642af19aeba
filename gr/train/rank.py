"""Scores of given candidates by a trained ranking model, streamed from Parquet into Parquet.

Shapes: R requests, C candidates of all of them, K tasks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from gr.batch import Jagged
from gr.data.collate import collate
from gr.data.dataset import SequenceDataset
from gr.data.making.convert import MISSING, can_be_ids, to_ids
from gr.data.making.times import YEAR_2200
from gr.data.outputs import parquet_rows
from gr.data.requests import FoundUsers, as_id, find_users
from gr.data.sequences import ITEM, TIME, USER_ID, Sequences
from gr.data.stores import remedy
from gr.errors import UserError, first_line
from gr.models.pointwise import Pointwise
from gr.models.two_tower.model import TwoTower
from gr.train import rank_fields
from gr.train.place import parquet_file, place
from gr.train.runs import OpenRun

REQUESTS, LISTED = 1024, 1 << 20
"""Requests that are read at a time, and candidates in their lists; a list with more is read alone."""
ACTIONS, CANDIDATES = 1 << 14, 1 << 15
"""Actions of histories, and candidates, that are computed at a time; a request with more candidates is cut."""
OF_A_REQUEST, PAIRS = 256, 8192
"""Candidates of each request, and pairs for a two_tower model, that are computed together."""
Policy = Literal["refuse", "null"]


@dataclass
class Ranked:
    """What was done.  ``without_history``: requests of users without an action before them; ``unknown_users``: requests
    of users, ``unknown_items``: candidates that the dataset doesn't have, whose scores are null."""

    requests: int = 0
    candidates: int = 0
    without_history: int = 0
    unknown_users: int = 0
    unknown_items: int = 0


def rank(
    run: OpenRun,
    asked: str | os.PathLike,
    out: str | os.PathLike,
    *,
    unknown: Policy = "refuse",
    at_once: int | None = None,
    advance: Callable[[int], None] = lambda candidates: None,
) -> Ranked:
    """Write to ``out`` the probability of each task's label for every candidate of every request.

    asked: Parquet with a row a request: ``user_id``, ``item_ids`` (a list of raw ids), perhaps ``time`` (seconds; what
    the user did before it is known, and without it all that the user did, at the time of the last of it), and each
    column that the model knows of a request (of_request); for a two_tower model in the place of user_id and time the
    columns that it knows of a user.  Columns of ``out``: those, and of each task a list of float32, in the order of
    item_ids.  unknown: what to do about users and items that the dataset doesn't have.  at_once: candidates that are
    computed together: of a request, 256 where nothing is said, or for a two_tower model of any, 8192.  advance: called
    with numbers of candidates that are done.  Memory: 1024 requests with lists of 2^20 candidates in all, or the
    longest list, and what is computed at a time."""
    model = ranking(run)
    source, names = _opened(asked, model, run.data.dataset)
    done = Ranked()
    with parquet_rows(out) as write, torch.no_grad():
        for table in _pieces(source, names):
            write(_scored(run, model, table, str(asked), unknown, at_once, done, advance))
        if not done.requests:
            raise UserError(f"'{asked}' has no request: nothing is written to '{out}'")
    return done


def ranking(run: OpenRun) -> Pointwise | TwoTower:
    """The run's model, if it judges given items."""
    if not isinstance(run.model, Pointwise | TwoTower):
        raise UserError(
            f"run '{run.folder.path}' trained a model '{run.config.model.name}', which ranks the catalogue: "
            "use gr recommend, or a run whose model is ranking, din, dlrm or two_tower"
        )
    return run.model


def check_requests(run: OpenRun, asked: str | os.PathLike) -> int:
    """How many candidates a file of requests has, an empty list counted as one; refuses a file that the run's model
    can't answer, before anything is computed."""
    source, _ = _opened(asked, ranking(run), run.data.dataset)
    return sum(listed for _, listed in _sizes(source))


def _opened(
    asked: str | os.PathLike, model: Pointwise | TwoTower, dataset: SequenceDataset
) -> tuple[pq.ParquetFile, list[str]]:
    """The file of requests, and its columns to read."""
    file = place(asked)
    try:
        source = parquet_file(file)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"there is no file '{file}' with requests: give Parquet with user_id and item_ids"
        ) from None
    except (OSError, pa.ArrowInvalid) as error:
        fix = remedy(error, "write the requests again")
        raise UserError(f"'{file}' cannot be read as Parquet ({first_line(error)}): {fix}") from None
    there = source.schema_arrow.names
    if twice := [name for name in there if there.count(name) > 1]:
        raise UserError(f"'{file}' has two columns '{twice[0]}': leave one of them, under that name")
    fields = isinstance(model, TwoTower)
    extra = [] if isinstance(model, TwoTower) else model.columns_of_requests
    for name in ["item_ids"] if fields else [USER_ID, "item_ids", *extra]:
        if name not in there:
            known = f"the run's model knows '{name}' of a request" if name in extra else "a request needs it"
            raise UserError(
                f"'{file}' has no column '{name}' (it has {', '.join(there)}), and {known}: add it"
            )
    kind = source.schema_arrow.field("item_ids").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise UserError(f"column item_ids of '{file}' is of type {kind}: give a list of candidates a request")
    if isinstance(model, TwoTower):
        extra = rank_fields.check_columns(model, dataset, source.schema_arrow, str(file))
    if taken := [name for name in model.labels.names if name in extra]:
        raise UserError(
            f"the run's task '{taken[0]}' has the name of a column of requests, and its scores can't be written beside "
            "that: train with another name in model.tasks"
        )
    if isinstance(model, TwoTower):
        return source, ["item_ids", *extra]
    kind = source.schema_arrow.field(USER_ID).type
    if not can_be_ids(kind):
        raise UserError(f"column user_id of '{file}' is of type {kind}: give the log's ids, numbers or text")
    if TIME in there and not dataset.has_timestamps:
        raise UserError(f"'{file}' has a column time, and the run's dataset has no times: leave it out")
    if TIME in there and not pa.types.is_integer(source.schema_arrow.field(TIME).type):
        raise UserError(f"column time of '{file}' holds no integers: give seconds since 1970")
    times = [TIME] if TIME in there else []
    return source, list(dict.fromkeys([USER_ID, "item_ids", *times, *extra]))


def _sizes(source: pq.ParquetFile) -> list[tuple[int, int]]:
    """(requests, candidates) of each row group, an empty list counted as one candidate: so does Parquet."""
    leaves = [source.schema.column(n) for n in range(len(source.schema))]
    (at, *_) = (
        n for n, leaf in enumerate(leaves) if leaf.path.startswith("item_ids.") and leaf.max_repetition_level
    )
    groups = [source.metadata.row_group(n) for n in range(source.num_row_groups)]
    return [(group.num_rows, group.column(at).num_values) for group in groups]


def _pieces(source: pq.ParquetFile, names: list[str]) -> Iterator[pa.Table]:
    """The requests in order, as many at a time as REQUESTS and LISTED say.  (Of a row group with lists of very
    different lengths Arrow may hold more than a piece: how many it reads at once is a matter of their mean.)"""
    longest = max((listed / max(requests, 1) for requests, listed in _sizes(source)), default=1)
    held: list[pa.RecordBatch] = []
    requests = candidates = 0
    for batch in source.iter_batches(max(1, min(REQUESTS, int(LISTED / max(longest, 1)))), columns=names):
        first = 0
        for row, count in enumerate(_counts(batch["item_ids"]).tolist()):
            if requests == REQUESTS or (requests and candidates + count > LISTED):
                yield pa.Table.from_batches([*held, batch.slice(first, row - first)])
                held, first, requests, candidates = [], row, 0, 0
            requests, candidates = requests + 1, candidates + count
        held.append(batch.slice(first))
    if requests:
        yield pa.Table.from_batches(held)


def _counts(lists: pa.Array) -> np.ndarray:
    """(R,) int64, how long each list is; none is an empty one."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _scored(
    run: OpenRun,
    model: Pointwise | TwoTower,
    table: pa.Table,
    name: str,
    unknown: Policy,
    at_once: int | None,
    done: Ranked,
    advance: Callable[[int], None],
) -> pa.Table:
    """The table with scores beside its requests."""
    rows, place_R = None, np.zeros(table.num_rows, np.int64)  # who asks a two_tower model says who that is
    if isinstance(model, Pointwise):
        rows, place_R = _histories(run.data.dataset, table, name, model.needs, unknown)
    lists = table["item_ids"].combine_chunks()
    counts_R = _counts(lists)
    items_C = _item_rows(lists.flatten(), run, name, unknown)
    owners_C = np.repeat(np.arange(len(counts_R)), counts_R)
    known_C = (items_C >= 0) & (place_R[owners_C] >= 0)
    done.requests += len(counts_R)
    done.candidates += len(items_C)
    done.unknown_users += int((place_R < 0).sum())
    done.unknown_items += int((items_C < 0).sum())
    scores_CK = np.zeros((len(items_C), len(model.labels.names)), np.float32)
    if isinstance(model, TwoTower):
        asking_C = items_C[known_C], owners_C[known_C]
        scores_CK[known_C] = rank_fields.scores(run, model, table, name, *asking_C, at_once or PAIRS, advance)
    elif known_C.any():
        asking = _requests(rows, place_R, table, name, run.config.data.max_length)
        done.without_history += int(((asking.lengths_R <= 1) & (place_R >= 0)).sum())
        kept_R = np.bincount(owners_C[known_C], minlength=len(counts_R))
        starts_R = np.cumsum(kept_R) - kept_R
        places_C = np.flatnonzero(known_C)
        for requests, first, stop in _cut(asking.lengths_R, kept_R):
            # of one request some of its candidates, or several requests with all of theirs
            own = places_C[starts_R[requests.start] + first : starts_R[requests.stop - 1] + stop]
            one = requests.stop - requests.start == 1
            counts = np.array([stop - first]) if one else kept_R[requests]
            batch = collate(asking.slice(requests.start, requests.stop), model.needs).to(model.device)
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
            candidates = Jagged(offsets, torch.from_numpy(items_C[own])).to(model.device)
            scores_CK[own] = (
                model.scores(batch, candidates, at_once or OF_A_REQUEST).sigmoid().float().cpu().numpy()
            )
            advance(len(own))
    advance(len(items_C) - int(known_C.sum()))
    if not np.isfinite(scores_CK).all():
        raise UserError("the model gives probabilities that are no numbers: choose an earlier --checkpoint")
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int32))
    for task, label in enumerate(model.labels.names):
        values = pa.array(np.ascontiguousarray(scores_CK[:, task]), mask=~known_C)
        table = table.append_column(label, pa.ListArray.from_arrays(offsets, values))
    return table


def _cut(lengths_R: np.ndarray, counts_R: np.ndarray) -> Iterator[tuple[slice, int, int]]:
    """(requests, from which candidate of the first, to which of the last) that are computed together."""
    start = actions = candidates = 0
    for request, (length, count) in enumerate(zip(lengths_R.tolist(), counts_R.tolist(), strict=True)):
        full = actions + length > ACTIONS or candidates + count > CANDIDATES
        if request > start and full:
            yield slice(start, request), 0, int(counts_R[request - 1])
            start, actions, candidates = request, 0, 0
        if count > CANDIDATES:
            for first in range(0, count, CANDIDATES):
                yield slice(request, request + 1), first, min(first + CANDIDATES, count)
            start, actions, candidates = request + 1, 0, 0
            continue
        actions, candidates = actions + length, candidates + count
    if start < len(lengths_R):
        yield slice(start, len(lengths_R)), 0, int(counts_R[-1])


@dataclass
class _Found:
    """Rows of users, and where each id is among them."""

    parts: list[Sequences] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)

    def add(self, rows: Sequences) -> None:
        self.places |= {user: len(self.places) + n for n, user in enumerate(rows.users_R.tolist())}
        self.parts.append(rows)


def _histories(
    dataset: SequenceDataset, table: pa.Table, name: str, columns: frozenset[str], unknown: Policy
) -> tuple[Sequences | None, np.ndarray]:
    """All that the requests' users did, a row a user, and each request's row, -1 where the user is unknown."""
    ids, integers = table[USER_ID], dataset.column(USER_ID).type != "string"
    if ids.null_count:
        raise UserError(f"'{name}' has a request without user_id: fill it in, or leave the request out")
    if integers and pa.types.is_floating(ids.type):  # as pandas writes integers of which some are missing
        ids = pa.chunked_array([rank_fields.values_of(table, USER_ID, "int64", name)])
    given = ids.to_pylist()
    found: FoundUsers = find_users(dataset, given)
    if unknown == "refuse":
        found.refuse_unknown("take their requests out, or give --unknown null")
    users = _Found()
    wanted = {ITEM, USER_ID, *columns, *([TIME] if dataset.has_timestamps else [])}
    for block, rows in zip(found.rows, dataset.read_blocks(sorted(found.rows), wanted)):
        users.add(rows.take(found.rows[block]))
    place_R = np.array([users.places.get(as_id(user, integers), -1) for user in given], np.int64)
    return Sequences.concatenate(users.parts) if users.parts else None, place_R


def _requests(
    rows: Sequences | None, place_R: np.ndarray, table: pa.Table, name: str, max_length: int
) -> Sequences:
    """A row a request: the latest of what its user did before it, then an unknown action in the candidates'
    place.  Those of unknown users have somebody else's, and no candidates."""
    assert rows is not None
    place_R = np.maximum(place_R, 0)
    stop_R = rows.lengths_R[place_R]
    if TIME in table.column_names:
        times_R = _times(table, name)
        assert rows.timestamps_A is not None
        stop_R = np.array(
            [
                np.searchsorted(rows.timestamps_A[first:last], time)
                for first, last, time in zip(
                    rows.offsets_R1[:-1][place_R], rows.offsets_R1[1:][place_R], times_R, strict=True
                )
            ],
            np.int64,
        )
    made = rows.take(place_R, np.maximum(stop_R - max_length, 0), stop_R).append_unknown(None)
    last_R = made.offsets_R1[1:] - 1
    if TIME in table.column_names:
        made.columns[TIME][last_R] = times_R  # type: ignore[index]
    for column in table.column_names:
        if column in made.columns and column not in (TIME, ITEM):
            held = made.columns[column]
            if isinstance(held, Jagged):
                raise UserError(
                    f"column '{column}' of requests holds lists, which isn't supported: leave it out"
                )
            kind = "string" if held.dtype == object else str(held.dtype)
            held[last_R] = rank_fields.values_of(table, column, kind, name)
    return made


def _times(table: pa.Table, name: str) -> np.ndarray:
    """(R,) int64 seconds, when requests are."""
    times = table[TIME].combine_chunks()
    if times.null_count:
        raise UserError(f"'{name}' has a request without time, where others have one: fill it in")
    seconds = pc.cast(times, pa.float64(), safe=False)  # of any integers
    far = pc.greater_equal(pc.abs(seconds), float(YEAR_2200))
    if pc.any(far).as_py():
        raise UserError(
            f"the time {times.filter(far)[0].as_py()} of a request of '{name}' is not between the years 1740 and 2200: "
            "give it in seconds since 1970"
        )
    return times.cast(pa.int64()).to_numpy(zero_copy_only=False)


def _item_rows(ids: pa.Array, run: OpenRun, name: str, unknown: Policy) -> np.ndarray:
    """(C,) int64 rows of the catalogue, -1 where an id is none."""
    known = run.data.dataset.catalogue.ids
    found = None
    if can_be_ids(ids.type) or pa.types.is_null(ids.type):
        found = to_ids(ids, integer=pa.types.is_integer(known.type), fix="")
    if found is None or any(problem.what != MISSING for problem in found.problems):
        raise UserError(
            f"item_ids of '{name}' are of type {ids.type}, and the dataset's items are {known.type}: give ids of that "
            "type"
        )
    ids = found.values.cast(known.type)
    rows = pc.index_in(ids, value_set=known)
    if rows.null_count and unknown == "refuse":
        first = ids.filter(rows.is_null())[0].as_py()
        raise UserError(
            f"{rows.null_count} candidates of '{name}' are not in the catalogue of '{run.data.dataset.path}', the "
            f"first is {first!r}: take them out, or give --unknown null"
        )
    return pc.fill_null(rows, -1).to_numpy(zero_copy_only=False).astype(np.int64)
