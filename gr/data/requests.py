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
import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.data.collate import collate
from gr.data.dataset import SequenceDataset
from gr.data.hashing import derive, hash_ids, mix64
from gr.data.making.times import YEAR_2200
from gr.data.sequences import ITEM, USER_ID, Sequences
from gr.data.split import Split
from gr.data.targets import TargetKinds
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
    columns: Iterable[str] | None = None,
    users: FoundUsers | None = None,
    kinds: TargetKinds | None = None,
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
        columns=columns if columns is None else frozenset(columns),
        users=users,
        kinds=kinds,
    )


@dataclass
class HeldOutRequests:
    """Iterable, as often as wanted, over the requests of a held-out split, ``batch`` users at a time.

    User i of those with targets, counted in the dataset's order, belongs to rank i % world: each target is asked about
    once, whatever the number of processes, and all those of a user by one.  ``max_users`` keeps that many users, the
    same ones for a dataset each time (those with the smallest keyed hash).  One block and one batch are in memory;
    after the first pass, blocks without a target are not read again.  ``exclude``: ``kept`` takes the ``max_length``
    history items the model is shown out of the ranking, ``all`` the whole history's.  ``columns``: those that the
    batches carry beside ``item``; every one of numbers without it.  ``users``: these alone.  ``kinds``: counts this
    process's targets in the first pass."""

    dataset: SequenceDataset
    split: Split
    name: str
    max_length: int
    exclude: Exclude = "kept"
    batch: int = 256
    rank: int = 0
    world: int = 1
    max_users: int | None = None
    columns: frozenset[str] | None = None
    users: FoundUsers | None = None
    kinds: TargetKinds | None = None
    population: int | None = field(default=None, init=False)
    """Targets in this split; known once a pass is over."""
    _own: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.split.check(self.name)
        self._blocks: Sequence[int] = self.split.blocks(self.dataset)
        if self.users is not None:
            self._blocks = sorted(self.users.rows)

    def __iter__(self) -> Iterator[Request]:
        return _requests(self._parts(), self.batch, self.columns)

    def empty(self) -> Request:
        """A request about nobody, with the columns of the others."""
        rows, nobody = self.dataset.read_block(0, self._read(())), np.empty(0, np.int64)
        part = _Part(
            samples=_carried(rows, self.columns).take(nobody),
            excluded=_excluded(rows, nobody, nobody, nobody, self.exclude),
            history_R=nobody,
        )
        return _request(part, self.columns)

    @property
    def share(self) -> int | None:
        """Requests of this rank; known once a pass is over."""
        if self.population is None or self.split.several:
            return self._own
        users = self.population if self.max_users is None else min(self.population, self.max_users)
        return len(range(self.rank, users, self.world))

    def _parts(self) -> Iterator[_Part]:
        count = own = 0
        subset = self._subset
        kinds = None if self.kinds is None or self.kinds.complete else self.kinds.restart()
        needed = self.split.needs if kinds is None else self.split.needs | kinds.needs
        for rows, who_R, target_R in self._held_out(self._read(needed)):
            if subset is not None:
                inside = np.isin(rows.ordinals_R[who_R], subset)
                who_R, target_R = who_R[inside], target_R[inside]
            number_R = np.cumsum(np.diff(who_R, prepend=-1) > 0)  # of the user, from 1
            mine = (count + number_R - 1) % self.world == self.rank
            count += int(number_R[-1]) if len(number_R) else 0
            own += int(mine.sum())
            who_R, target_R = who_R[mine], target_R[mine]
            if kinds is not None:
                kinds.add(rows, who_R, target_R)
            first_R = np.maximum(target_R - self.max_length, 0)
            yield _Part(
                samples=_carried(rows, self.columns).take(who_R, first_R, target_R + 1),
                excluded=_excluded(rows, who_R, first_R, target_R, self.exclude),
                history_R=target_R,
            )
        self._own = own
        if kinds is not None:
            kinds.complete = True

    def _read(self, needed: Iterable[str]) -> set[str] | None:
        return None if self.columns is None else {ITEM, USER_ID, *self.columns, *needed}

    def _held_out(self, columns: Iterable[str] | None) -> Iterator[tuple[Sequences, np.ndarray, np.ndarray]]:
        """Block by block: its rows (with ``columns``), the numbers of those with a target, and the targets' indices."""
        found, population = [], 0
        for block, rows in zip(self._blocks, self.dataset.read_blocks(self._blocks, columns)):
            who_R, index_R = self.split.targets(rows, self.name, self.dataset.users)
            if self.users is not None:
                asked = np.isin(who_R, self.users.rows[block])
                who_R, index_R = who_R[asked], index_R[asked]
            if len(who_R):
                found.append(block)
                population += len(who_R)
                yield rows, who_R, index_R
        self._blocks, self.population = found, population

    @cached_property
    def _subset(self) -> np.ndarray | None:
        """Ordinals of the ``max_users`` users with the smallest keyed hash, or None for all users."""
        if self.max_users is None:
            return None
        key = np.uint64(derive("evaluation users", self.dataset.manifest.fingerprint))
        kept = np.empty(0, np.int64)
        for rows, who_R, _ in self._held_out({ITEM, *self.split.needs}):
            kept = np.concatenate([kept, np.unique(rows.ordinals_R[who_R])])
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
    columns: Iterable[str] | None = None,
) -> Iterator[Request]:
    """Requests for what comes next: all that is known of each user, then an ``UNKNOWN`` action.

    users: raw ids (all users without it), each answered once, in the dataset's order.  An id that the dataset
    does not know is an error, raised by this call and not by the first request; who would rather answer the others
    gives what :func:`find_users` found.  time: the time of the request in seconds; without it, the time of the
    user's last action.  columns: those that the batches carry beside ``item``; every one of numbers without it.
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
    carried = None if columns is None else frozenset(columns)
    return _requests(
        _recommendation_parts(dataset, wanted, max_length, exclude, time, carried), batch, carried
    )


def _recommendation_parts(
    dataset: SequenceDataset,
    wanted: dict[int, np.ndarray] | dict[int, None],
    max_length: int,
    exclude: Exclude,
    time: int | None,
    columns: frozenset[str] | None,
) -> Iterator[_Part]:
    names = None if columns is None else {ITEM, USER_ID, *columns}
    for who, rows in zip(wanted.values(), dataset.read_blocks(wanted, names)):
        who_R = np.arange(len(rows)) if who is None else who
        history_R = rows.lengths_R[who_R]
        first_R = np.maximum(history_R - max_length, 0)
        yield _Part(
            samples=_carried(rows, columns).take(who_R, first_R, history_R).append_unknown(time),
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

    def refuse_unknown(
        self, fix: str = "take them out of the list, or prepare a dataset that has them"
    ) -> FoundUsers:
        """Itself, if all were found; else a UserError that ends in ``fix``."""
        if not self.unknown:
            return self
        raise UserError(
            f"{len(self.unknown)} of {len(self.unknown) + self.users} users are not in the dataset '{self.dataset}', "
            f"the first is {self.unknown[0]!r}: {fix}"
        )


def find_users(dataset: SequenceDataset, ids: Iterable[Any]) -> FoundUsers:
    """Where the users with these raw ids are.  Ids may be written as text; repeats are dropped.

    Users are stored in the order of (hash64(id), id) and the manifest keeps each block's first hash, so that only the
    blocks that can hold them are asked, for their id column alone; a dataset in another order is read through.
    """
    blocks = dataset.manifest.blocks
    integers = dataset.column(USER_ID).type != "string"
    given: dict[Any, Any] = {}  # id in the dataset's type -> as it was first written
    for written in ids:
        given.setdefault(as_id(written, integers), written)
    sought: dict[int, set[Any]] = {}
    if blocks[0].first_hash is None:
        everybody = set(given)
        sought = dict.fromkeys(range(len(blocks)), everybody)
    else:
        candidates = [user for user in given if isinstance(user, int) == integers]
        hashes = hash_ids(np.array(candidates, np.int64 if integers else object))
        firsts = np.array([block.first_hash for block in blocks], np.uint64)
        # users of one hash may lie on both sides of a border: from the last block that begins before it
        starts = np.maximum(np.searchsorted(firsts, hashes, "left") - 1, 0).tolist()
        stops = np.searchsorted(firsts, hashes, "right").tolist()
        for user, start, stop in zip(candidates, starts, stops, strict=True):
            for number in range(start, stop):
                sought.setdefault(number, set()).add(user)
    found: dict[int, np.ndarray] = {}
    for number in sorted(sought):
        if not given:
            break
        users = dataset.read_user_ids(number).tolist()
        rows = np.flatnonzero([user in sought[number] for user in users])
        if len(rows):
            found[number] = rows
            for row in rows.tolist():
                given.pop(users[row], None)
    return FoundUsers(found, list(given.values()), str(dataset.path))


def as_id(value: Any, integers: bool) -> Any:
    """``value`` as an id of the dataset's type; text that is no 64-bit integer stays text, which is found nowhere."""
    text = str(value)
    whole = integers and re.fullmatch(r"0|-?[1-9]\d{0,18}", text) is not None
    return int(text) if whole and -(2**63) <= int(text) < 2**63 else text


@dataclass(frozen=True)
class _Part:
    """Requests before batching: samples with their target, the actions whose items are excluded, history lengths."""

    samples: Sequences
    excluded: Sequences
    history_R: np.ndarray

    def __len__(self) -> int:
        return len(self.history_R)

    def take(self, start: int, stop: int) -> _Part:
        stop = min(stop, len(self))
        return _Part(
            self.samples.slice(start, stop), self.excluded.slice(start, stop), self.history_R[start:stop]
        )

    @staticmethod
    def concatenate(parts: list[_Part]) -> _Part:
        return _Part(
            Sequences.concatenate(p.samples for p in parts),
            Sequences.concatenate(p.excluded for p in parts),
            np.concatenate([p.history_R for p in parts]),
        )


def _carried(rows: Sequences, columns: frozenset[str] | None) -> Sequences:
    """Without the columns that only the split, or nobody, looks at."""
    return rows if columns is None else rows.select({ITEM, USER_ID, *columns})


def _excluded(
    rows: Sequences, who_R: np.ndarray, first_R: np.ndarray, stop_R: np.ndarray, exclude: Exclude
) -> Sequences:
    first = {"none": stop_R, "kept": first_R, "all": np.zeros_like(stop_R)}[exclude]
    return rows.select({ITEM}).take(who_R, first, stop_R)


def _requests(parts: Iterable[_Part], batch: int, columns: frozenset[str] | None) -> Iterator[Request]:
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
                yield _request(joined.take(start, start + batch), columns)
            pending, count = [joined.take(whole, count)], count - whole
    if count:
        yield _request(_Part.concatenate(pending), columns)


def _request(part: _Part, columns: frozenset[str] | None) -> Request:
    samples = part.samples
    targets_B = samples.items_A[samples.offsets_R1[1:] - 1].astype(np.int64)
    owner_E = np.repeat(np.arange(len(part)), part.excluded.lengths_R)
    excluded_E = part.excluded.items_A.astype(np.int64)
    stays = excluded_E != targets_B[owner_E]
    counts = np.bincount(owner_E[stays], minlength=len(part))
    return Request(
        batch=collate(samples, columns),
        targets_B=torch.from_numpy(targets_B),
        exclude_offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
        exclude_items=torch.from_numpy(excluded_E[stays]),
        history_lengths_B=torch.from_numpy(part.history_R.astype(np.int64)),
        users=samples.users_R,
    )
