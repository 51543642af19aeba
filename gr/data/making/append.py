"""A log of newer actions -> the next generation of a sequence dataset, in one process and bounded memory.

The log is read, checked, cut and sorted as :mod:`gr.data.making.prepare` does it.  Then two streams of users in one
order, the dataset's blocks and the new partitions, are merged into new files; the old log is not read again.  The new
manifest takes the old one's place last, so that a kill leaves the dataset as it was; the generation before is kept for
those who read it.

What comes out is what preparing both logs at once gives, but that
- items (and action types) that the dataset had keep their numbers, and new ones follow in the order of their raw ids;
- actions of one user within one second keep the order of the generations, for a dataset keeps seconds;
- an item of which ``max_user_actions`` left no action stays in the catalogue.
Late actions, older than some of their user's, are put in their place and counted.  Items that the catalogue doesn't
list any more keep what the dataset knows of them.

Memory: a partition of the new log, a block of the dataset and the new actions of its users, and tables of the items.

Shapes: R users, A actions of all of them, I items.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.columns import canonical, described
from gr.data.dataset import SequenceDataset
from gr.data.hashing import hash_ids
from gr.data.making.described import RESERVED, join, joined
from gr.data.making.executor import Actions, saying_no_space
from gr.data.making.in_process import InProcess, blocks
from gr.data.making.partitions import Grouped, duplicates, time_order
from gr.data.making.passes import Found, Writing
from gr.data.making.prepare import Described, Work, check_options
from gr.data.making.schema import Filter, Preparation
from gr.data.manifest import suffix
from gr.data.sequences import USER_ID, Sequences, gather
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.progress import Progress


def append(
    dataset: SequenceDataset,
    actions: Actions,
    options: Preparation,
    *,
    described: Described | None = None,
    progress: Progress | None = None,
    said: dict[str, Any] | None = None,
) -> SequenceDataset:
    """The dataset with ``actions``.  options: as it was prepared.  said: what its manifest is to say of this append.

    Raises UserError, and leaves the dataset as it was: bad rows (policy ``fail``), nothing to append, a dataset whose
    policies looked at the whole log.
    """
    check_options(actions, options, described)
    check_appendable(dataset, options)
    if options.duplicates == "drop_exact" and actions.ticks_per_second > 1:
        raise UserError(
            f"duplicates=drop_exact compares times to the digit, and '{dataset.path}' keeps seconds: prepare the old "
            "and the new log together"
        )
    manifest, out, progress = dataset.manifest, os.fspath(dataset.path), progress or Progress()
    with saying_no_space(out), InProcess(actions, out, options, progress) as work:
        writer = DatasetWriter(out, manifest.name, block_rows=manifest.block_rows, after=manifest)
        return _Appending(dataset, work, actions, out, options, described, progress, writer).done(said or {})


def check_appendable(dataset: SequenceDataset, options: Preparation) -> None:
    """Refuse a dataset to which nothing can be appended exactly."""
    manifest, prepare = dataset.manifest, "prepare the old and the new log together"
    if dataset.folder.local is None:
        raise UserError(
            f"'{dataset.path}' is a URL, and a dataset grows on a path of this machine: copy it there"
        )
    if manifest.blocks[0].first_hash is None:
        raise UserError(f"'{dataset.path}' keeps its log's own order and has no place for more: {prepare}")
    if extra := [c.name for c in manifest.columns if c.of == "users" and c.name != USER_ID]:
        raise UserError(
            f"'{dataset.path}' has the column '{extra[0]}' of users, which a log doesn't say: {prepare}"
        )
    asked = options.model_dump(mode="json", include=POLICIES)
    before = {**asked, **{k: v for k, v in manifest.provenance.get("options", {}).items() if k in POLICIES}}
    if any(Filter().model_dump() != policy["filter"] for policy in (before, asked)):
        raise UserError(
            f"'{dataset.path}' was filtered by counts (filter), which new actions change for actions that are gone: "
            f"{prepare}"
        )
    if other := [key for key in asked if asked[key] != before[key]]:
        key = other[0]
        raise UserError(
            f"'{dataset.path}' was prepared with {key} {before[key]}, which holds for all of it, and not with "
            f"{asked[key]}: leave that as it was, or {prepare}"
        )


POLICIES = {"filter", "duplicates", "max_user_actions"}
"""What is said of all actions of a dataset, and can't be said of those alone that come later."""


class _Appending(Work):
    """Codes of items are rows of the dataset first, then new ones."""

    def __init__(self, dataset: SequenceDataset, executor: InProcess, *rest: Any) -> None:
        super().__init__(executor, *rest)
        self.dataset = dataset
        executor.items.ids = dataset.catalogue.ids
        self.late = 0
        self.old_type_names = dataset.manifest.action_type_names

    def run(self, provenance: dict[str, Any]) -> SequenceDataset:
        self.say()
        self.read()
        self.say()
        described = self.describe()
        rows_C, ids = self._numbering()
        self.writer.action_type_names, types = self._types()
        step = Writing(
            self.options.model_copy(update={"max_user_actions": None}),  # a user's actions of both logs count
            len(self.items),
            raw=True,
            rows_C=rows_C,
            types=types,
            catalogue=len(ids),
            ticks_per_second=self.actions.ticks_per_second,
        )
        written = Found.nothing(len(ids))
        with self.progress.stage("merging", self.dataset.users, "users") as stage:
            for merged, old_users in self._merged(step):
                written.items_C += np.bincount(merged.items_A, minlength=len(ids))
                written.users += len(merged)
                written.actions += len(merged.items_A)
                for block in blocks(merged):
                    self.writer.add(block)
                stage.advance(old_users)
        catalogue, unlisted = join(ids, pa.array(written.items_C), described)
        self.say_undescribed(unlisted, len(ids))
        told = self.dataset.manifest.provenance
        entry = {
            **provenance,
            **self.actions.facts(),
            "rows": self.actions.rows_read,
            "actions": written.actions - self.dataset.actions,
            "new_users": written.users - self.dataset.users,
            "new_items": len(ids) - self.dataset.items,
            "late": self.late,
        }
        if self.late:
            self.progress.note(
                f"{self.late:,} actions are older than others of their user: put in their place"
            )
        quarantine = self.executor.quarantine
        quarantine.publish(self.writer.scratch / f"quarantine{suffix(self.writer.generation)}")
        return self.writer.finish(
            catalogue,
            {
                **told,
                "stages": [asdict(s) for s in self.stages(written, len(ids))],
                "quarantined": dict(
                    sorted((quarantine.reasons + Counter(told.get("quarantined", {}))).items())
                ),
                "items_not_described": unlisted,
                "appended": [*told.get("appended", []), entry],
            },
        )

    def describe(self) -> pa.Table | None:
        """The catalogue that was given, and what the dataset knows of items that it doesn't list."""
        given, catalogue = super().describe(), self.dataset.catalogue
        names = [n for n in catalogue.column_names if n not in RESERVED]
        if given is not None:
            names = [n for n in names if n in given.column_names]
        if not names:
            return given
        kept = pa.table({"item_id": catalogue.ids, **{name: catalogue[name] for name in names}})
        known = reduce(pc.or_, (pc.is_valid(kept[name]) for name in names))
        if given is None:
            return kept.filter(known)
        listed = pc.is_in(kept["item_id"], value_set=given["item_id"].combine_chunks())
        kept = kept.filter(pc.and_(known, pc.invert(listed)))
        if not len(kept):
            return given
        self.progress.note(
            f"{len(kept):,} items of '{self.dataset.path}' are not in the catalogue any more: they keep what was known "
            "of them"
        )
        for number, name in enumerate(kept.column_names):
            kept = kept.set_column(
                number, name, _as_far_as_it_goes(kept[name], given.schema.field(name).type)
            )
        return joined([given, kept], ["the catalogue", f"{self.dataset.path}"], "catalogue")

    def _numbering(self) -> tuple[np.ndarray, pa.Array]:
        """Code -> int32 row, and raw ids by row: old items as they are, new ones in the order of their ids."""
        assert self.items.ids is not None
        old = self.dataset.items
        new = self.items.ids[old:]
        order = pc.sort_indices(new).to_numpy()
        rows = np.arange(len(self.items), dtype=np.int32)
        rows[old + order] = np.arange(old, len(self.items), dtype=np.int32)
        return rows, pa.concat_arrays([self.items.ids[:old], new.take(pa.array(order))])

    def _types(self) -> tuple[list[str], np.ndarray]:
        """Names of action types, new ones behind the old, and code -> number."""
        known = {name: number for number, name in enumerate(self.old_type_names)}
        names, codes = self.action_types()  # codes: in the order of the raw values
        numbers = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
        if new := list(known)[len(self.old_type_names) :]:
            self.progress.note(f"action types that '{self.dataset.path}' had not: {', '.join(new)}")
        return list(known), numbers[codes]

    def _merged(self, step: Writing) -> Iterator[tuple[Sequences, int]]:
        """Users of both streams in their order, and how many of them the dataset had."""
        stream = _Stream(self._arrived(step))
        for block in range(len(self.dataset.manifest.blocks)):
            old = canonical(self.dataset.read_block(block))
            arrived = stream.until(old.users_R[-1])
            merged = old if arrived is None else self._together(old, arrived)
            yield merged, len(old)
        for part in stream.rest():
            yield self._capped(part), 0

    def _arrived(self, step: Writing) -> Iterator[Sequences]:
        """The new actions, a partition at a time."""
        found = Found.nothing(step.catalogue)
        for partition in range(len(self.executor.store.rows)):
            part = step(self.executor.store, partition, found)
            if part is None:
                continue
            part = canonical(part)
            if self.options.duplicates == "drop_exact":
                part = without_repeats(part)
            self._check_columns(part)
            yield part
        self.take(found)

    def _check_columns(self, part: Sequences) -> None:
        there = {info.name: info for info in self.dataset.manifest.columns}
        come = {info.name: info for info in described(part)}
        for name in sorted(there.keys() | come.keys()):
            if there.get(name) != come.get(name):
                has, gives = (c[name].type if name in c else "none" for c in (there, come))
                raise UserError(
                    f"column '{name}' of '{self.dataset.path}' is of type {has}, and the log gives {gives}: give the "
                    "schema that the dataset was prepared with"
                )

    def _together(self, old: Sequences, arrived: Sequences) -> Sequences:
        merged, late, from_old_A = merge(old, arrived)
        self.late += late
        if self.options.duplicates == "drop_exact":
            # of what the dataset has nothing is a repeat, though it may have been told apart by parts of a second
            merged = without_repeats(merged, from_old_A)
        return self._capped(merged)

    def _capped(self, rows: Sequences) -> Sequences:
        most = self.options.max_user_actions
        if most is None or (rows.lengths_R <= most).all():
            return rows
        return rows.take(np.arange(len(rows)), np.maximum(rows.lengths_R - most, 0))


def without_repeats(rows: Sequences, kept_A: np.ndarray | None = None) -> Sequences:
    """The rows without exact repeats of a user's action, but for those that are ``kept_A`` (A, bool)."""
    columns = {"item": pa.array(rows.items_A), "time": pa.array(rows.timestamps_A)}
    again_A = duplicates(Grouped(pa.array(rows.users_R), rows.offsets_R1, columns))
    return rows.keep(~again_A if kept_A is None else ~again_A | kept_A)


def merge(old: Sequences, arrived: Sequences) -> tuple[Sequences, int, np.ndarray]:
    """Users of both in the order of (hash64(id), id), each with all actions in the order of time, those of ``old``
    first where times are equal; how many of the others come before one of ``old``; and which actions are of ``old``
    (A, bool)."""
    rows = Sequences.concatenate([old, arrived])
    by_hash = pc.sort_indices(
        pa.table(
            {
                "hash": hash_ids(rows.users_R),
                "id": pa.array(rows.users_R.tolist()),
                "row": np.arange(len(rows)),
            }
        ),
        sort_keys=[("hash", "ascending"), ("id", "ascending"), ("row", "ascending")],
    ).to_numpy()
    users = rows.users_R[by_hash]
    first = np.ones(len(users), bool)
    first[1:] = users[1:] != users[:-1]
    rank_R = np.empty(len(rows), np.int64)
    rank_R[by_hash] = np.cumsum(first) - 1
    rank_A, count = rank_R[rows.owner_A], int(first.sum())
    order = time_order(rank_A, rows.timestamps_A, count)
    from_old = order < len(old.items_A)
    # an action that arrived is late where one of its user's old ones follows
    last_old_U = np.full(count, -1)
    np.maximum.at(last_old_U, rank_A[order][from_old], np.flatnonzero(from_old))
    late = int((~from_old & (np.arange(len(order)) < last_old_U[rank_A[order]])).sum())
    merged = Sequences(
        offsets_R1=np.concatenate([[0], np.cumsum(np.bincount(rank_A, minlength=count))]).astype(np.int64),
        ordinals_R=np.arange(count),
        columns={name: gather(column, order) for name, column in rows.columns.items()},
        user_columns={USER_ID: users[first]},
    )
    return merged, late, from_old


def _as_far_as_it_goes(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """The column as ``kind``, or as it is where that would lose something."""
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return column


class _Stream:
    """Rows in the order of (hash64(id), id), taken up to a user at a time."""

    def __init__(self, parts: Iterator[Sequences]) -> None:
        self._parts, self._part = parts, next(parts, None)
        self._done = 0
        self._hash()

    def until(self, user: Any) -> Sequences | None:
        """The rows of users up to ``user``; None if there are none."""
        hash_of = hash_ids(np.array([user], object if isinstance(user, str) else np.int64))[0]
        taken = []
        while self._part is not None:
            stop = int(np.searchsorted(self._hashes, hash_of, "left"))
            while (
                stop < len(self._part) and self._hashes[stop] == hash_of and self._part.users_R[stop] <= user
            ):
                stop += 1
            if stop > self._done:
                taken.append(self._part.slice(self._done, stop))
            self._done = stop
            if stop < len(self._part):
                break
            self._next()
        return Sequences.concatenate(taken) if taken else None

    def rest(self) -> Iterator[Sequences]:
        while self._part is not None:
            if self._done < len(self._part):
                yield self._part.slice(self._done, len(self._part))
            self._next()

    def _next(self) -> None:
        self._part, self._done = next(self._parts, None), 0
        self._hash()

    def _hash(self) -> None:
        self._hashes = np.empty(0, np.uint64) if self._part is None else hash_ids(self._part.users_R)
