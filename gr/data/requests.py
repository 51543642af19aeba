"""Requests: the sequences that an evaluation, or a recommendation, asks a model about.

Shapes: R users, B sequences, T actions in the batch (targets included), E excluded items of all sequences.

A request is a sample whose last action is the one to be predicted.  Evaluation takes the action that the split
holds out, with the latest ``max_length`` actions before it; recommendation takes everything known of a user and
an ``UNKNOWN`` action at the time of the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gr.batch import UNKNOWN, SequenceBatch
from gr.data.collate import collate
from gr.data.making.convert import YEAR_2200
from gr.data.dataset import SequenceDataset
from gr.data.hashing import derive, mix64
from gr.data.sequences import Sequences
from gr.data.split import Split
from gr.errors import UserError

Exclude = Literal["none", "kept", "all"]


@dataclass(frozen=True)
class Request:
    """B sequences to be ranked against the catalogue.

    batch: the sequences, each with the action to be predicted as its last one.
    targets_B: int64 item rows to find (``UNKNOWN`` when recommending).
    exclude_offsets: int64 (B+1,), exclude_items: int64 (E,): jagged item rows to take out of the ranking; never the
    target itself; an item may occur more than once.
    history_lengths_B: int64, actions before the target in the user's whole history, kept or not.
    users: (B,) raw user ids.
    """

    batch: SequenceBatch
    targets_B: Tensor
    exclude_offsets: Tensor
    exclude_items: Tensor
    history_lengths_B: Tensor
    users: np.ndarray

    def __len__(self) -> int:
        return self.batch.sequences

    def to(self, device: torch.device | str) -> Request:
        return replace(
            self,
            batch=self.batch.to(device),
            targets_B=self.targets_B.to(device),
            exclude_offsets=self.exclude_offsets.to(device),
            exclude_items=self.exclude_items.to(device),
        )


def requests(
    dataset: SequenceDataset,
    split: Split,
    name: str,
    *,
    max_length: int,
    exclude: Exclude = "kept",
    batch: int = 256,
    rank: int = 0,
    world: int = 1,
    max_users: int | None = None,
    users: FoundUsers | None = None,
) -> HeldOutRequests:
    """The requests of ``split``'s held-out actions ``name`` that belong to process ``rank`` of ``world``."""
    return HeldOutRequests(
        dataset,
        split,
        name,
        max_length=max_length,
        exclude=exclude,
        batch=batch,
        rank=rank,
        world=world,
        max_users=max_users,
        users=users,
    )


@dataclass
class HeldOutRequests:
    """Iterable, as often as wanted, over the requests of a held-out split, ``batch`` users at a time.

    Request i, counted in the dataset's order, belongs to rank i % world: each user is asked about once, whatever the
    number of processes.  ``max_users`` keeps that many users, the same ones for a dataset each time (those with the
    smallest keyed hash).  One block and one batch are in memory; after the first pass, blocks without a target are
    not read again.  ``exclude``: ``kept`` takes the ``max_length`` history items the model is shown out of the
    ranking, ``all`` the whole history's.  ``users``: these alone.
    """

    dataset: SequenceDataset
    split: Split
    name: str
    max_length: int
    exclude: Exclude = "kept"
    batch: int = 256
    rank: int = 0
    world: int = 1
    max_users: int | None = None
    users: FoundUsers | None = None
    population: int | None = field(default=None, init=False)
    """Users with a target in this split; known once a pass is over."""

    def __post_init__(self) -> None:
        self.split.check(self.name)
        self._blocks: Sequence[int] = range(len(self.dataset.manifest.blocks))
        if self.users is not None:
            self._blocks = sorted(self.users.rows)

    def __iter__(self) -> Iterator[Request]:
        return _requests(self._parts(), self.batch)

    @property
    def share(self) -> int | None:
        """Users of this rank; known once a pass is over."""
        if self.population is None:
            return None
        users = self.population if self.max_users is None else min(self.population, self.max_users)
        return len(range(self.rank, users, self.world))

    def _parts(self) -> Iterator[_Part]:
        count = 0
        subset = self._subset
        for rows, who_R, target_R in self._held_out():
            if subset is not None:
                inside = np.isin(rows.ordinals_R[who_R], subset, assume_unique=True)
                who_R, target_R = who_R[inside], target_R[inside]
            mine = (count + np.arange(len(who_R))) % self.world == self.rank
            count += len(who_R)
            who_R, target_R = who_R[mine], target_R[mine]
            first_R = np.maximum(target_R - self.max_length, 0)
            yield _Part(
                samples=rows.take(who_R, first_R, target_R + 1),
                excluded=_excluded(rows, who_R, first_R, target_R, self.exclude),
                history_R=target_R,
            )

    def _held_out(self) -> Iterator[tuple[Sequences, np.ndarray, np.ndarray]]:
        """Block by block: its rows, the numbers of those with a target, and the targets' indices."""
        found, population = [], 0
        for block in self._blocks:
            rows = self.dataset.read_block(block)
            index_R = self.split.target(rows, self.name, self.dataset.users)
            who_R = np.flatnonzero(index_R >= 0)
            if self.users is not None:
                who_R = np.intersect1d(who_R, self.users.rows[block])
            if len(who_R):
                found.append(block)
                population += len(who_R)
                yield rows, who_R, index_R[who_R]
        self._blocks, self.population = found, population

    @cached_property
    def _subset(self) -> np.ndarray | None:
        """Ordinals of the ``max_users`` users with the smallest keyed hash, or None for all users."""
        if self.max_users is None:
            return None
        key = np.uint64(derive("evaluation users", self.dataset.manifest.fingerprint))
        kept = np.empty(0, np.int64)
        for rows, who_R, _ in self._held_out():
            kept = np.concatenate([kept, rows.ordinals_R[who_R]])
            if len(kept) > self.max_users:
                order = np.argpartition(mix64(kept.astype(np.uint64) ^ key), self.max_users - 1)
                kept = kept[order[: self.max_users]]
        return kept


def recommendation_requests(
    dataset: SequenceDataset,
    *,
    max_length: int,
    exclude: Exclude = "kept",
    batch: int = 256,
    users: Iterable[Any] | FoundUsers | None = None,
    time: int | None = None,
) -> Iterator[Request]:
    """Requests for what comes next: all that is known of each user, then an ``UNKNOWN`` action.

    users: raw ids (all users without it), each answered once, in the dataset's order.  An id that the dataset
    does not know is an error, raised by this call and not by the first request; who would rather answer the others
    gives what :func:`find_users` found.  time: the time of the request in seconds; without it, the time of the
    user's last action.
    """
    if time is not None and not dataset.has_timestamps:
        raise UserError("a time of request was given, but this dataset has no timestamps: leave it out")
    if time is not None and abs(time) >= YEAR_2200:
        raise UserError(
            f"the time of request {time} is not between the years 1740 and 2200: give it in seconds since 1970"
        )
    wanted: dict[int, np.ndarray] | dict[int, None] = dict.fromkeys(range(len(dataset.manifest.blocks)))
    if users is not None:
        found = users if isinstance(users, FoundUsers) else find_users(dataset, users).refuse_unknown()
        wanted = found.rows
    return _requests(_recommendation_parts(dataset, wanted, max_length, exclude, time), batch)


def _recommendation_parts(
    dataset: SequenceDataset,
    wanted: dict[int, np.ndarray] | dict[int, None],
    max_length: int,
    exclude: Exclude,
    time: int | None,
) -> Iterator[_Part]:
    for block, who in wanted.items():
        rows = dataset.read_block(block)
        who_R = np.arange(len(rows)) if who is None else who
        history_R = rows.lengths_R[who_R]
        first_R = np.maximum(history_R - max_length, 0)
        yield _Part(
            samples=_append_unknown(rows.take(who_R, first_R, history_R), time),
            excluded=_excluded(rows, who_R, first_R, history_R, exclude),
            history_R=history_R,
        )


@dataclass(frozen=True)
class FoundUsers:
    """Where users are.

    rows: block -> their row numbers in it, ascending.  unknown: ids that the dataset does not have, as they were
    given and in that order, each once.  dataset: its path.
    """

    rows: dict[int, np.ndarray]
    unknown: list[Any]
    dataset: str

    @property
    def users(self) -> int:
        """How many were found."""
        return sum(map(len, self.rows.values()))

    def refuse_unknown(self) -> FoundUsers:
        """Itself, if all were found; else a UserError."""
        if not self.unknown:
            return self
        raise UserError(
            f"{len(self.unknown)} of {len(self.unknown) + self.users} users are not in the dataset '{self.dataset}', "
            f"the first is {self.unknown[0]!r}: take them out of the list, or prepare a dataset that has them"
        )


def find_users(dataset: SequenceDataset, ids: Iterable[Any]) -> FoundUsers:
    """Where the users with these raw ids are.  Ids may be written as text; repeats are dropped.

    Reads the id column alone.
    """
    left = list(dict.fromkeys(ids))
    found: dict[int, np.ndarray] = {}
    sought: set[Any] | None = None
    integers = False
    for number, block in enumerate(dataset.manifest.blocks):
        file = pq.ParquetFile(dataset.path / block.file)
        known = file.read_row_group(block.row_group, columns=["user_id"]).column("user_id").to_numpy()
        if sought is None:
            integers = np.issubdtype(known.dtype, np.integer)
            sought = {_as_id(i, integers) for i in left}
        rows = np.flatnonzero([user in sought for user in known.tolist()])
        if len(rows):
            found[number] = rows
            sought.difference_update(known[rows].tolist())
    unknown = {_as_id(i, integers): i for i in reversed(left) if _as_id(i, integers) in (sought or set())}
    return FoundUsers(found, list(unknown.values())[::-1], str(dataset.path))


def _as_id(value: Any, integers: bool) -> Any:
    """``value`` as an id of the dataset's type; text that is no integer stays text, which is found nowhere."""
    text = str(value)
    return int(text) if integers and re.fullmatch(r"0|-?[1-9]\d*", text) else text


@dataclass(frozen=True)
class _Part:
    """Requests before batching: samples with their target, the actions whose items are excluded, history lengths."""

    samples: Sequences
    excluded: Sequences
    history_R: np.ndarray

    def __len__(self) -> int:
        return len(self.history_R)

    def take(self, start: int, stop: int) -> _Part:
        rows = np.arange(start, min(stop, len(self)))
        return _Part(self.samples.take(rows), self.excluded.take(rows), self.history_R[rows])

    @staticmethod
    def concatenate(parts: list[_Part]) -> _Part:
        return _Part(
            Sequences.concatenate(p.samples for p in parts),
            Sequences.concatenate(p.excluded for p in parts),
            np.concatenate([p.history_R for p in parts]),
        )


def _excluded(
    rows: Sequences, who_R: np.ndarray, first_R: np.ndarray, stop_R: np.ndarray, exclude: Exclude
) -> Sequences:
    first = {"none": stop_R, "kept": first_R, "all": np.zeros_like(stop_R)}[exclude]
    items_only = replace(rows, timestamps_A=None, action_types_A=None, values_A=None, fields_A=None)
    return items_only.take(who_R, first, stop_R)


def _append_unknown(rows: Sequences, time: int | None) -> Sequences:
    """Each row with one more action: an unknown item at ``time``, of the type (and time) of the row's last action
    (0 where the row is empty)."""
    end = rows.offsets_R1[1:]
    last = np.where(rows.lengths_R > 0, end, 0)  # in a column that starts with a 0

    def append(column: np.ndarray | None, value: Any = None) -> np.ndarray | None:
        if column is None:
            return None
        return np.insert(column, end, np.insert(column, 0, 0)[last] if value is None else value)

    return replace(
        rows,
        offsets_R1=rows.offsets_R1 + np.arange(len(rows) + 1),
        items_A=np.insert(rows.items_A, end, UNKNOWN),
        timestamps_A=append(rows.timestamps_A, time),
        action_types_A=append(rows.action_types_A),
        values_A=None,
        fields_A=None,
    )


def _requests(parts: Iterable[_Part], batch: int) -> Iterator[Request]:
    """Parts of any size, joined and cut into requests of ``batch`` users; the last one may be smaller."""
    pending: list[_Part] = []
    count = 0
    for part in parts:
        pending.append(part)
        count += len(part)
        if count >= batch:
            joined = _Part.concatenate(pending)
            whole = count // batch * batch
            for start in range(0, whole, batch):
                yield _request(joined.take(start, start + batch))
            pending, count = [joined.take(whole, count)], count - whole
    if count:
        yield _request(_Part.concatenate(pending))


def _request(part: _Part) -> Request:
    samples = part.samples
    targets_B = samples.items_A[samples.offsets_R1[1:] - 1].astype(np.int64)
    owner_E = np.repeat(np.arange(len(part)), part.excluded.lengths_R)
    excluded_E = part.excluded.items_A.astype(np.int64)
    stays = excluded_E != targets_B[owner_E]
    counts = np.bincount(owner_E[stays], minlength=len(part))
    return Request(
        batch=collate(samples),
        targets_B=torch.from_numpy(targets_B),
        exclude_offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
        exclude_items=torch.from_numpy(excluded_E[stays]),
        history_lengths_B=torch.from_numpy(part.history_R.astype(np.int64)),
        users=samples.users_R,
    )
