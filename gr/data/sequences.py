"""Sequences: rows of a sequence dataset in memory, jagged numpy columns.

Shapes: R rows (users), A actions of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from gr.batch import UNKNOWN, Jagged

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
    def lengths_R(self) -> np.ndarray:
        return np.diff(self.offsets_R1)

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

    def take(
        self, rows: np.ndarray, first: np.ndarray | None = None, stop: np.ndarray | None = None
    ) -> Sequences:
        """The given rows, each cut to its actions ``first[i]:stop[i]`` (counted within the sequence)."""
        base = self.offsets_R1[rows]
        begin = base if first is None else base + first
        end = self.offsets_R1[rows + 1] if stop is None else base + stop
        return _assembled([self], np.zeros(len(rows), np.int64), rows, begin, end)

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
            offsets_R1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            ordinals_R=np.concatenate([p.ordinals_R for p in parts]),
            columns={name: join([p.columns[name] for p in parts]) for name in parts[0].columns},
            user_columns={
                name: join([p.user_columns[name] for p in parts]) for name in parts[0].user_columns
            },
        )

    @staticmethod
    def assembled(parts: Iterable[Stretches], rows: np.ndarray) -> Sequences:
        """The given rows of all parts' rows, numbered one part after another, cut to what counts of them."""
        parts = list(parts)
        counts = [len(part.rows) for part in parts]
        part = np.repeat(np.arange(len(parts)), counts)[rows]
        base = np.concatenate([part.rows.offsets_R1[:-1] for part in parts])[rows]
        first, stop = (
            np.concatenate([getattr(part, name) for part in parts])[rows] for name in ("first_R", "stop_R")
        )
        row = np.concatenate([np.arange(count) for count in counts])[rows]
        return _assembled([part.rows for part in parts], part, row, base + first, base + stop)

    def _each(self, of_actions: Change, of_users: Change, offsets_R1: np.ndarray) -> Sequences:
        """The rows with every column changed: the one place that goes through all of them."""
        return Sequences(
            offsets_R1,
            of_users(self.ordinals_R),  # type: ignore[arg-type]
            {name: of_actions(column) for name, column in self.columns.items()},
            {name: of_users(column) for name, column in self.user_columns.items()},
        )


@dataclass(frozen=True)
class Stretches:
    """Rows of which a stretch counts, actions ``first_R[i]:stop_R[i]`` of row i, and which nobody has cut yet."""

    rows: Sequences
    first_R: np.ndarray
    stop_R: np.ndarray

    def compact(self) -> Stretches:
        """The same stretches in little more memory than they need: cut where the better part would be dead weight."""
        lengths_R = np.maximum(self.stop_R - self.first_R, 0)
        if 2 * lengths_R.sum() >= len(self.rows.items_A):
            return self
        cut = self.rows.take(np.arange(len(self.rows)), self.first_R, self.stop_R)
        return Stretches(cut, np.zeros_like(lengths_R), lengths_R)


LONG_RUN = 24
"""Mean length from which runs are copied one by one; shorter ones are gathered, value by value."""


def _assembled(
    parts: list[Sequences], part: np.ndarray, row: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> Sequences:
    """Row i: of ``parts[part[i]]`` the row ``row[i]``, with the actions from ``begin[i]`` to ``end[i]`` (exclusive)."""
    lengths = np.maximum(end - begin, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    stretches = None
    if len(lengths) and offsets[-1] >= LONG_RUN * len(lengths):
        stretches = list(zip(part.tolist(), begin.tolist(), (begin + lengths).tolist()))

    def of_actions(columns: list[Column]) -> Column:
        if stretches is not None and isinstance(columns[0], np.ndarray):
            return np.concatenate([columns[p][b:e] for p, b, e in stretches])  # type: ignore[arg-type]
        return gather(join(columns), _elements(_placed(begin, part, columns), lengths, offsets))

    def of_users(columns: list[Column]) -> Column:
        return gather(join(columns), _placed(row, part, columns))

    names, user_names = parts[0].columns, parts[0].user_columns
    return Sequences(
        offsets,
        of_users([rows.ordinals_R for rows in parts]),  # type: ignore[arg-type]
        {name: of_actions([rows.columns[name] for rows in parts]) for name in names},
        {name: of_users([rows.user_columns[name] for rows in parts]) for name in user_names},
    )


def _placed(index: np.ndarray, part: np.ndarray, columns: list[Column]) -> np.ndarray:
    """Indices in columns as indices in these put one after the other."""
    return index + np.concatenate([[0], np.cumsum([len(column) for column in columns])])[part]


def _elements(begin: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Where each element comes from of the runs from ``begin`` on, put one after the other at ``offsets``."""
    # element j of run i comes from begin[i] + j: one arange, shifted run by run
    return np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)


def runs(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the runs ``begin[i]:end[i]`` put one after the other, and where each of their elements comes from."""
    lengths = np.maximum(end - begin, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return offsets, _elements(begin, lengths, offsets)


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
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Jagged(offsets, np.concatenate([column.values for column in lists]))


def _picked(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets, source = runs(begin, end)
    return offsets, values[source]
