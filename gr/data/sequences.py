"""Sequences: rows of a sequence dataset in memory, jagged numpy columns.

Shapes: R rows (users), A actions of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from gr.batch import TARGETS_FROM, UNKNOWN, Jagged

ITEM, TIME, TYPE, VALUE, USER_ID = "item", "time", "type", "value", "user_id"
DTYPES = {ITEM: np.int32, TIME: np.int64, TYPE: np.int32, VALUE: np.float32}
"""Of the columns of actions that every dataset may have; declared fields have their own."""

Column = np.ndarray | Jagged
Change = Callable[[Column], Column]


@dataclass(frozen=True)
class Sequences:
    """R users' sequences, each in time order.

    offsets_R1: int64.  ordinals_R: int64, rows' numbers in the dataset's order.
    columns: of actions by name, A each: ``item`` (int32 catalogue rows), perhaps ``time`` (int64 seconds), ``type``
    (int32 codes), ``value`` (float32), and declared fields (numbers, or str objects); a multi-valued one is
    :class:`gr.batch.Jagged`, A lists.  user_columns: of users by name, R each: ``user_id``, raw ids (int64 or str
    objects), and what else is known of users.
    """

    offsets_R1: np.ndarray
    ordinals_R: np.ndarray
    columns: Mapping[str, Column]
    user_columns: Mapping[str, Column] = field(default_factory=dict)

    @staticmethod
    def of(users_R: np.ndarray, offsets_R1: np.ndarray, **columns: Column | None) -> Sequences:
        """The sequences of ``users_R``, numbered from 0; columns that are None are left out."""
        return Sequences(
            np.asarray(offsets_R1, np.int64),
            np.arange(len(users_R)),
            {name: column for name, column in columns.items() if column is not None},
            {USER_ID: np.asarray(users_R)},
        )

    def __len__(self) -> int:
        return len(self.offsets_R1) - 1

    @property
    def targets_from_R(self) -> np.ndarray | None:
        """Which of each row's actions is its first target (gr.batch.TARGETS_FROM); None where it's the second."""
        return self.user_columns.get(TARGETS_FROM)  # type: ignore[return-value]

    @property
    def lengths_R(self) -> np.ndarray:
        return self.offsets_R1[1:] - self.offsets_R1[:-1]

    @property
    def owner_A(self) -> np.ndarray:
        """(A,) int64: the row of each action."""
        return np.repeat(np.arange(len(self)), self.lengths_R)

    @property
    def places_A(self) -> np.ndarray:
        """(A,) int64: the place of each action in its sequence."""
        return np.arange(self.offsets_R1[-1]) - np.repeat(self.offsets_R1[:-1], self.lengths_R)

    @property
    def users_R(self) -> np.ndarray:
        """Raw ids."""
        return self.user_columns[USER_ID]  # type: ignore[return-value]

    @property
    def items_A(self) -> np.ndarray:
        return self.columns[ITEM]  # type: ignore[return-value]

    @property
    def timestamps_A(self) -> np.ndarray | None:
        """None where times are unknown, or were not asked for."""
        return self.columns.get(TIME)  # type: ignore[return-value]

    def select(self, names: Iterable[str]) -> Sequences:
        """Only these columns, of actions or of users; one that is not there stays away."""
        wanted = set(names)
        return replace(
            self,
            columns={name: column for name, column in self.columns.items() if name in wanted},
            user_columns={name: column for name, column in self.user_columns.items() if name in wanted},
        )

    def with_users(self, **columns: Column) -> Sequences:
        """The rows with these columns of users in the place of, or beside, their own."""
        return replace(self, user_columns={**self.user_columns, **columns})

    def take(
        self, rows: np.ndarray, first: np.ndarray | None = None, stop: np.ndarray | None = None
    ) -> Sequences:
        """The given rows, each cut to its actions ``first[i]:stop[i]`` (counted within the sequence)."""
        return Stretches.of(self).take(rows).cut(first, stop).copied()

    def keep(self, kept_A: np.ndarray) -> Sequences:
        """All rows with the actions that are kept (A, bool) alone."""
        source = np.flatnonzero(kept_A)
        offsets = offsets_of(kept_A)[self.offsets_R1]
        return self._each(lambda column: gather(column, source), lambda column: column, offsets)

    def slice(self, start: int, stop: int) -> Sequences:
        """Rows ``start`` to ``stop`` (exclusive), without copies."""
        offsets = self.offsets_R1[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return self._each(
            lambda column: column[first:last], lambda column: column[start:stop], offsets - first
        )

    def append_unknown(self, time: int | None) -> Sequences:
        """Each row with one more action, an unknown item at ``time``.

        What else an action has is as in the row's last one (its time too where ``time`` is None), and 0, "" or an
        empty list where the row has none.
        """
        end, lengths = self.offsets_R1[1:], self.lengths_R
        offsets = self.offsets_R1 + np.arange(len(self) + 1)
        new = offsets[1:] - 1  # places of the appended actions
        # Rows of the result come from these actions; a repeated one stands in for what is to be put in its place.
        source = np.insert(np.arange(end[-1] if len(end) else 0), end, np.maximum(end - 1, 0))
        lone = new[lengths == 0]

        def extend(column: Column) -> Column:
            if isinstance(column, Jagged):
                counts = np.diff(column.offsets)
                starts = column.offsets[:-1][source] if len(counts) else np.zeros(len(source), np.int64)
                counts = counts[source] if len(counts) else np.zeros(len(source), np.int64)
                counts[lone] = 0
                return Jagged(*_picked(column.values, starts, starts + counts))
            blank = "" if column.dtype == object else 0
            if not len(column):
                return np.full(len(source), blank, column.dtype)
            longer = column[source]
            longer[lone] = blank
            return longer

        longer = self._each(extend, lambda column: column, offsets)
        longer.items_A[new] = UNKNOWN
        if time is not None and TIME in longer.columns:
            longer.columns[TIME][new] = time  # type: ignore[index]
        return longer

    @staticmethod
    def concatenate(parts: Iterable[Sequences]) -> Sequences:
        """Parts with the same columns, one after the other."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([p.lengths_R for p in parts])
        return Sequences(
            offsets_R1=offsets_of(lengths),
            ordinals_R=np.concatenate([p.ordinals_R for p in parts]),
            columns={name: join([p.columns[name] for p in parts]) for name in parts[0].columns},
            user_columns={
                name: join([p.user_columns[name] for p in parts]) for name in parts[0].user_columns
            },
        )

    def _each(self, of_actions: Change, of_users: Change, offsets_R1: np.ndarray) -> Sequences:
        """The rows with every column changed: the one place that goes through all of them."""
        return Sequences(
            offsets_R1,
            of_users(self.ordinals_R),  # type: ignore[arg-type]
            {name: of_actions(column) for name, column in self.columns.items()},
            {name: of_users(column) for name, column in self.user_columns.items()},
        )


def latest(rows: Sequences, max_length: int) -> Sequences:
    """The rows cut to their latest ``max_length`` inputs and these inputs' targets."""
    first_R = np.maximum(rows.lengths_R - (max_length + 1), 0)
    if not first_R.any():
        return rows
    cut = rows.take(np.arange(len(rows)), first_R, rows.lengths_R)
    if rows.targets_from_R is None:
        return cut
    return cut.with_users(**{TARGETS_FROM: np.maximum(rows.targets_from_R - first_R, 1)})


@dataclass(frozen=True)
class Stretches:
    """R rows that lie in ``parts``, columns of actions by name: row i is the actions ``begin_R[i]:end_R[i]`` of
    ``parts[part_R[i]]``.  Rows are taken and cut without a copy of any action, until they are :meth:`copied`.

    user_columns and ordinals_R: as :class:`Sequences` has them."""

    parts: Sequence[Mapping[str, Column]]
    part_R: np.ndarray
    begin_R: np.ndarray
    end_R: np.ndarray
    ordinals_R: np.ndarray
    user_columns: Mapping[str, Column]

    @staticmethod
    def of(rows: Sequences) -> Stretches:
        begin_R, end_R = rows.offsets_R1[:-1], rows.offsets_R1[1:]
        part_R = np.zeros(len(rows), np.int64)
        return Stretches([rows.columns], part_R, begin_R, end_R, rows.ordinals_R, rows.user_columns)

    def __len__(self) -> int:
        return len(self.begin_R)

    @property
    def lengths_R(self) -> np.ndarray:
        return self.end_R - self.begin_R

    def select(self, names: Iterable[str]) -> Stretches:
        """Only these columns, of actions or of users; one that is not there stays away."""
        wanted = set(names)

        def chosen(columns: Mapping[str, Column]) -> dict[str, Column]:
            return {name: column for name, column in columns.items() if name in wanted}

        return replace(self, parts=list(map(chosen, self.parts)), user_columns=chosen(self.user_columns))

    def with_users(self, **columns: Column) -> Stretches:
        """The rows with these columns of users in the place of, or beside, their own."""
        return replace(self, user_columns={**self.user_columns, **columns})

    def take(self, rows: np.ndarray) -> Stretches:
        """The given rows."""
        return self._each(lambda column: gather(column, rows))

    def slice(self, start: int, stop: int) -> Stretches:
        """Rows ``start`` to ``stop`` (exclusive)."""
        return self._each(lambda column: column[start:stop])

    def cut(self, first: np.ndarray | None, stop: np.ndarray | None) -> Stretches:
        """Of row i the actions ``first[i]:stop[i]``, counted within it; from its beginning or to its end without."""
        begin_R = self.begin_R if first is None else self.begin_R + first
        end_R = self.end_R if stop is None else self.begin_R + stop
        return replace(self, begin_R=begin_R, end_R=np.maximum(end_R, begin_R))

    @staticmethod
    def concatenate(given: Iterable[Stretches]) -> Stretches:
        """Rows with the same columns, one after the other."""
        given = list(given)
        if len(given) == 1:
            return given[0]
        first_part = np.cumsum([0, *(len(rows.parts) for rows in given)])
        return Stretches(
            [part for rows in given for part in rows.parts],
            np.concatenate([rows.part_R + first for rows, first in zip(given, first_part)]),
            np.concatenate([rows.begin_R for rows in given]),
            np.concatenate([rows.end_R for rows in given]),
            np.concatenate([rows.ordinals_R for rows in given]),
            {name: join([rows.user_columns[name] for rows in given]) for name in given[0].user_columns},
        )

    def ready(self) -> Stretches:
        """The same rows as they are best copied from, some at a time: long ones one by one from where they are; short
        and multi-valued ones by a gather, for which their parts are joined."""
        jagged = any(isinstance(column, Jagged) for column in self.parts[0].values())
        if len(self.parts) == 1 or (self.lengths_R.sum() >= LONG * len(self) and not jagged):
            return self
        sizes = np.cumsum([0, *(len(part[ITEM]) for part in self.parts)])[self.part_R]
        joined = {name: join([part[name] for part in self.parts]) for name in self.parts[0]}
        return replace(
            self,
            parts=[joined],
            part_R=np.zeros_like(self.part_R),
            begin_R=self.begin_R + sizes,
            end_R=self.end_R + sizes,
        )

    def compact(self) -> Stretches:
        """The same rows, copied if that spares more than half of the memory that they are held in."""
        held = sum(len(part[ITEM]) for part in self.parts)
        return self if 2 * self.lengths_R.sum() >= held else Stretches.of(self.copied())

    def copied(self, columns: Iterable[str] | None = None, *, as_batched: bool = False) -> Sequences:
        """The rows in memory of their own; ``columns``: of actions, all without it.  ``as_batched``: numbers of actions
        become what batches hold on the way (:func:`batched_dtype`), which spares a copy."""
        if len(self.parts) > 1 and (ready := self.ready()) is not self:
            return ready.copied(columns, as_batched=as_batched)
        offsets_R1 = offsets_of(self.lengths_R)
        one_by_one = len(self) > 0 and offsets_R1[-1] >= LONG * len(self)
        places = zip(self.part_R.tolist(), self.begin_R.tolist(), self.end_R.tolist())
        stretches = list(places) if one_by_one else []
        elements = None

        def copy(name: str) -> Column:
            nonlocal elements
            arrays = [part[name] for part in self.parts]
            if stretches and not isinstance(arrays[0], Jagged):
                dtype = batched_dtype(arrays[0].dtype) if as_batched else arrays[0].dtype
                out = room(int(offsets_R1[-1]), dtype)
                return np.concatenate([arrays[part][begin:end] for part, begin, end in stretches], out=out)  # type: ignore[arg-type]
            if elements is None:
                elements = runs(self.begin_R, self.end_R)[1]
            return gather(arrays[0], elements)

        names = self.parts[0] if columns is None else columns
        return Sequences(offsets_R1, self.ordinals_R, {name: copy(name) for name in names}, self.user_columns)

    def _each(self, change: Change) -> Stretches:
        """The rows with every value of a row changed."""
        part_R, begin_R, end_R, ordinals_R = (
            change(column) for column in (self.part_R, self.begin_R, self.end_R, self.ordinals_R)
        )
        users = {name: change(column) for name, column in self.user_columns.items()}
        return Stretches(self.parts, part_R, begin_R, end_R, ordinals_R, users)  # type: ignore[arg-type]


LONG = 24
"""Mean length of rows from which they are copied one by one; shorter ones are gathered, value by value."""


def batched_dtype(dtype: np.dtype) -> np.dtype:
    """What numbers of a column become in a batch: whole ones int64, others float32; texts stay as they are."""
    return np.dtype({"i": np.int64, "u": np.int64, "f": np.float32}.get(dtype.kind, dtype))


def room(count: int, dtype: np.dtype) -> np.ndarray:
    """(count,) values to be written: numbers in memory of Arrow's pool, which keeps what is given back, since a page
    that comes from the system costs more than to fill it."""
    if dtype.hasobject:
        return np.empty(count, dtype)
    return np.frombuffer(pa.allocate_buffer(count * dtype.itemsize), dtype)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: where each of n lists of these ``lengths`` begins, put one after the other, and the end."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def runs(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the runs ``begin[i]:end[i]`` put one after the other, and where each of their elements comes from."""
    lengths = np.maximum(end - begin, 0)
    offsets = offsets_of(lengths)
    # element j of run i comes from begin[i] + j: one arange, shifted run by run
    return offsets, np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)


def gather(column: Column, rows: np.ndarray) -> Column:
    """The column's values (or lists) at ``rows``."""
    if isinstance(column, Jagged):
        return Jagged(*_picked(column.values, column.offsets[rows], column.offsets[rows + 1]))
    return column[rows]


def join(columns: list[Column]) -> Column:
    """Columns of one name, one after the other."""
    if len(columns) == 1:
        return columns[0]
    lists = [column for column in columns if isinstance(column, Jagged)]
    if not lists:
        return np.concatenate(columns)  # type: ignore[arg-type]
    lengths = np.concatenate([np.diff(column.offsets) for column in lists])
    offsets = offsets_of(lengths)
    return Jagged(offsets, np.concatenate([column.values for column in lists]))


def _picked(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets, source = runs(begin, end)
    return offsets, values[source]
