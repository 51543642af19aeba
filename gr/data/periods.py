"""The chronological split: a log in the order in which it happened, period after period, once.

The actions of a period are its targets, and all that its users did before are inputs; the first of them that each user
has is held out, and asked for before the period is trained on (progressive validation).  So a period is an epoch: its
number is the cursor's.

Shapes: R rows, A actions of all rows, I items, P periods, S samples of all periods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from gr.batch import TARGETS_FROM
from gr.config import SEED, ComponentConfig
from gr.data.sequences import ITEM, TIME, Sequences, runs
from gr.data.split import Split, actions_before, date, likely
from gr.errors import UserError

if TYPE_CHECKING:
    from gr.data.dataset import SequenceDataset
    from gr.processes import Processes

SECONDS = {"m": 60, "h": 3600, "d": 86400}


def _seconds(value: Any) -> Any:
    """A moment as text, such as 2024-05-01 or 2024-05-01T06:00, in UTC, as seconds since 1970."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d)?)?", value):
        raise ValueError(
            "write a moment in UTC, such as '2024-05-01' or '2024-05-01T06:00', or seconds since 1970"
        )
    return int(np.datetime64(value, "s").astype(np.int64))


class Chronological(Split):
    """Training goes through the log once, from ``start`` on; actions before it are inputs alone."""

    class Config(ComponentConfig):
        """period: minutes, hours or days, such as 30m, 1h, 7d.  start: of the first period, in seconds since 1970 or as
        text in UTC.  last: whether the last period that has actions is trained on, or waits until later actions show
        that it's over."""

        name: Literal["chronological"] = "chronological"
        period: Annotated[str, Field(pattern=r"^[1-9]\d{0,5}[mhd]$")] = "1d"
        start: Annotated[SEED, BeforeValidator(_seconds)]
        last: Literal["train", "wait"] = "train"

    names = ("test",)
    without = "what was held out of a period has been trained on since, so append newer actions to it first"
    needs = frozenset({TIME})
    config: Config
    periods: Periods | None = None
    period: int | None = None
    epochs: int = 0
    """Periods to train on."""

    def __init__(self, config: Config):
        self.config = config
        self.seconds = int(config.period[:-1]) * SECONDS[config.period[-1]]

    def check_dataset(self, dataset: SequenceDataset) -> None:
        if not dataset.has_timestamps:
            raise UserError(
                f"data.split 'chronological' needs timestamps, and dataset '{dataset.path}' has none: use leave_one_out"
            )
        first, last, start = dataset.manifest.first_time, dataset.manifest.last_time, self.config.start
        if first is None or last is None:
            return
        if start > last:
            raise UserError(
                f"no action of '{dataset.path}' is at or after data.split.start {start} ({date(start)}), they are from "
                f"{first} ({date(first)}) to {last} ({date(last)}): {likely(start, first, last)}"
            )
        if (count := (last - start) // self.seconds + 1) > MOST:
            raise UserError(
                f"data.split 'chronological' makes {count:,} periods of {self.config.period} from {date(start)} to "
                f"{date(last)}, more than {MOST:,}: choose a later start or a longer period"
            )

    def on(self, dataset: SequenceDataset, processes: Processes | None = None) -> Chronological:
        """With the table of who has targets when, read once for all processes."""
        self.check_dataset(dataset)
        other = copy(self)
        if processes is None:
            other.periods = Periods.of(dataset, self.config.start, self.seconds)
        else:
            main = processes.is_main
            found = processes.together(
                lambda: Periods.of(dataset, self.config.start, self.seconds) if main else None
            )
            other.periods = processes.broadcast(found)
        assert other.periods is not None
        other.epochs = other.periods.count
        last_time = dataset.manifest.last_time
        if self.config.last == "wait" and last_time is not None:
            other.epochs = min(other.epochs, max(last_time - self.config.start, 0) // self.seconds)
        return other

    def at(self, epoch: int) -> Chronological:
        other = copy(self)
        other.period = epoch
        return other

    def bounds(self) -> tuple[int, int]:
        """Of the period, in seconds: its beginning, and the next one's."""
        assert self.period is not None
        begin = self.config.start + self.period * self.seconds
        return begin, begin + self.seconds

    def describe(self) -> dict[str, Any]:
        """What rows of metrics.jsonl say of the period."""
        return {"period": str(np.datetime64(self.bounds()[0], "s"))}

    def train_stop(self, rows: Sequences) -> np.ndarray:
        return rows.lengths_R if self.period is None else actions_before(rows, self.bounds()[1])

    def examples(self, rows: Sequences, whole: bool, max_length: int) -> Sequences:
        """A sample a user with a target in the period; several where there are more targets than a model takes inputs,
        one after the other."""
        first_R, stop_R = self._targets(rows)
        row_S, piece_S = _pieces(stop_R - first_R, max_length)
        from_S = first_R[row_S] + piece_S * max_length
        stop_S = np.minimum(from_S + max_length, stop_R[row_S])
        base_S = np.maximum(stop_S - (max_length + 1), 0)
        samples = rows.take(row_S, base_S, stop_S)
        return samples.with_users(**{TARGETS_FROM: from_S - base_S})

    def target(self, rows: Sequences, name: str, users: int) -> np.ndarray:
        self.check(name)
        if self.period is None:  # whoever has one in some period: what is counted once
            return np.where(rows.lengths_R >= 2, 1, -1)
        first_R, stop_R = self._targets(rows)
        return np.where(first_R < stop_R, first_R, -1)

    def before(self) -> Split:
        return self if self.period is None else self.at(self.period - 1)

    def seen(self, catalogue: Any) -> np.ndarray:
        if self.period is None or self.periods is None:
            return super().seen(catalogue)
        return (self.periods.first_I < self.period).astype(np.int64)

    def blocks(self, dataset: SequenceDataset) -> Sequence[int]:
        if self.period is None or self.periods is None:
            return super().blocks(dataset)
        return np.unique(self.periods.users(self.period) // dataset.manifest.block_rows).tolist()

    def _targets(self, rows: Sequences) -> tuple[np.ndarray, np.ndarray]:
        """(R,) each: places of a user's first target in the period, and behind the last."""
        begin, end = self.bounds()
        return np.maximum(actions_before(rows, begin), 1), actions_before(rows, end)


MOST = 1_000_000
"""Periods of a run."""


@dataclass(frozen=True)
class Periods:
    """Who has targets when: 12 bytes for each user and period with some.

    offsets_P1: int64, a run of the others for each period.  ordinals_S: int64, users with targets, ascending in each
    period.  targets_S: int32, how many.  first_I: int32, the period in which training first sees an item: -1 before
    the first one, P where never.
    """

    offsets_P1: np.ndarray
    ordinals_S: np.ndarray
    targets_S: np.ndarray
    first_I: np.ndarray

    @property
    def count(self) -> int:
        """P, up to the last period with a target."""
        return len(self.offsets_P1) - 1

    def users(self, period: int) -> np.ndarray:
        """Ordinals of a period's users with targets, ascending."""
        return self.ordinals_S[self._run(period)]

    def samples(self, period: int, max_length: int) -> np.ndarray:
        """The same, each as often as it has samples: with more than max_length targets several times."""
        return np.repeat(self.users(period), -(-self.targets_S[self._run(period)] // max_length))

    def _run(self, period: int) -> slice:
        inside = 0 <= period < self.count
        return slice(*self.offsets_P1[period : period + 2].tolist()) if inside else slice(0, 0)

    @staticmethod
    def of(dataset: SequenceDataset, start: int, seconds: int) -> Periods:
        """Reads the dataset's items and times, once."""
        first_I = np.full(dataset.items, np.iinfo(np.int32).max, np.int32)
        found: list[tuple[np.ndarray, ...]] = []
        for block in range(len(dataset.manifest.blocks)):
            rows = dataset.read_block(block, {ITEM, TIME})
            assert rows.timestamps_A is not None
            period_A = np.maximum((rows.timestamps_A - start) // seconds, -1)
            np.minimum.at(first_I, rows.items_A, period_A.astype(np.int32))
            target_A = (rows.places_A > 0) & (period_A >= 0)
            # a user's periods ascend, so that equal (user, period) are neighbours
            user_T, period_T = rows.ordinals_R[rows.owner_A[target_A]], period_A[target_A]
            change = np.flatnonzero(np.diff(user_T, prepend=-1) | np.diff(period_T, prepend=-1))
            found.append((period_T[change], user_T[change], np.diff(change, append=len(user_T))))
        period_S, ordinals_S, targets_S = (np.concatenate(parts).astype(np.int64) for parts in zip(*found))
        order = np.argsort(period_S, kind="stable")
        counts = np.bincount(period_S)
        return Periods(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            ordinals_S[order],
            targets_S[order].astype(np.int32),
            np.minimum(first_I, len(counts)).astype(np.int32),
        )


def _pieces(targets_R: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(S,) each: the row and the number in it of every piece of at most ``size`` targets."""
    count_R = -(-np.maximum(targets_R, 0) // size)
    nothing = np.zeros_like(count_R)
    offsets, number_S = runs(nothing, count_R)
    return np.repeat(np.arange(len(count_R)), np.diff(offsets)), number_S
