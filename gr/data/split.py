"""Splits: which actions train, and which one of a user is held out to be predicted.

Shapes: R users.  A split answers from lengths and times alone; nothing is copied or stored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from gr.batch import TARGETS_FROM
from gr.config import FRACTION, SEED, ComponentConfig
from gr.data.sequences import TIME, Sequences, Stretches, runs
from gr.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from gr.data.dataset import SequenceDataset
    from gr.processes import Processes


class Counted(Protocol):
    """Items whose training actions are counted."""

    @property
    def training_counts(self) -> Tensor:
        """(I,) int64."""


class Split:
    """Interface.  ``names``: the held-out splits that can be evaluated.  ``needs``: the columns of actions that it
    looks at, beside the lengths of sequences.  ``without``: what to do where nobody has a target."""

    names: tuple[str, ...] = ("valid", "test")
    without = "take it out of eval.splits, or change data.split"
    least = 2
    """Actions of a training example: an input and its target."""
    needs: frozenset[str] = frozenset()
    config: ComponentConfig

    @property
    def description(self) -> dict[str, Any]:
        """Its config as JSON has it: what is counted under a split is kept under this."""
        return self.config.model_dump(mode="json")

    def check_dataset(self, dataset: SequenceDataset) -> None:
        """Refuse a dataset that can't be cut this way, as far as its manifest tells."""

    def on(self, dataset: SequenceDataset, processes: Processes | None = None) -> Split:
        """Itself, knowing what it has to know of the dataset; several processes ask together."""
        return self

    def at(self, epoch: int) -> Split:
        """What is held out of an epoch and trained in it, where that is not the same in all of them."""
        return self

    def describe(self) -> dict[str, Any]:
        """What a row of metrics.jsonl says of it, where it holds out other targets in each epoch."""
        return {}

    def training_rows(self, users: int) -> int:
        """How many of the dataset's first users take part in training."""
        return users

    def examples(self, rows: Sequences, whole: bool, max_length: int) -> Stretches:
        """The training samples of ``rows``: cut to what training may see, and unless they are wanted ``whole`` to the
        latest max_length inputs and their targets."""
        stop_R = self.train_stop(rows)
        first_R = np.zeros_like(stop_R) if whole else np.maximum(stop_R - (max_length + 1), 0)
        return Stretches.of(rows).cut(first_R, stop_R)

    def before(self) -> Split:
        """What was trained on before its held-out targets are asked for."""
        return self

    def seen(self, catalogue: Counted) -> np.ndarray:
        """(I,) above zero where an item is a training action before the held-out targets are asked for."""
        return catalogue.training_counts.numpy()

    def blocks(self, dataset: SequenceDataset) -> Sequence[int]:
        """The blocks that may hold users with a target."""
        return range(len(dataset.manifest.blocks))

    def train_stop(self, rows: Sequences) -> np.ndarray:
        """(R,) number of leading actions of each user that training may see, targets included."""
        raise NotImplementedError

    def target(self, rows: Sequences, name: str, users: int) -> np.ndarray:
        """(R,) index in each sequence of the action that split ``name`` predicts, -1 where a user has none.

        Everything before that action is the user's history.  ``users``: size of the dataset.
        """
        raise NotImplementedError

    several = False
    """Whether a user may have several targets in a held-out split."""

    def targets(self, rows: Sequences, name: str, users: int) -> tuple[np.ndarray, np.ndarray]:
        """(S,) each: the row of each target that split ``name`` predicts, ascending, and its index in the sequence,
        ascending within the row."""
        index_R = self.target(rows, name, users)
        who_S = np.flatnonzero(index_R >= 0)
        return who_S, index_R[who_S]

    def check(self, name: str) -> None:
        """Refuse a name that is not held out."""
        if name not in Split.names:
            raise UserError(f"unknown split '{name}': {nearest(name, Split.names)}")
        if name not in self.names:
            raise UserError(
                f"split '{name}' is not held out by data.split (held out: {', '.join(self.names)}): "
                "training would have seen its targets; change eval.splits or data.split"
            )


class LeaveOneOut(Split):
    """The last action of each user is the test target; with ``holdout: 2`` the second to last validates and
    neither trains.  With ``holdout: 1``, the public HSTU protocol, there is no validation target."""

    class Config(ComponentConfig):
        name: Literal["leave_one_out"] = "leave_one_out"
        holdout: Annotated[int, Field(ge=1, le=2)] = 2

    def __init__(self, config: Config):
        self.config, self.holdout = config, config.holdout
        self.names = ("test",) if config.holdout == 1 else ("valid", "test")

    def train_stop(self, rows: Sequences) -> np.ndarray:
        return np.maximum(rows.lengths_R - self.holdout, 0)

    def target(self, rows: Sequences, name: str, users: int) -> np.ndarray:
        self.check(name)
        index = rows.lengths_R - (1 if name == "test" else 2)
        return np.where(index >= 1, index, -1)  # a target without history cannot be predicted from a sequence


class GlobalTime(Split):
    """Actions before ``valid_from`` train; each user's first action from then on (and before ``test_from``)
    validates, the first one from ``test_from`` on is the test target.  Times are seconds, as in the log."""

    class Config(ComponentConfig):
        """held_out: of such a period each user's ``first`` action, or ``all`` of them, each asked for by itself with
        every action before it known.  train_from: actions before are inputs alone."""

        name: Literal["global_time"] = "global_time"
        valid_from: SEED
        test_from: SEED
        train_from: SEED | None = None
        held_out: Literal["first", "all"] = "first"

    needs = frozenset({TIME})
    config: Config

    def __init__(self, config: Config):
        if config.valid_from > config.test_from:
            raise UserError("data.split.valid_from is after data.split.test_from: swap them")
        if config.train_from is not None and config.train_from >= config.valid_from:
            raise UserError("data.split.train_from is not before data.split.valid_from: nothing would train")
        self.config = config
        self.several = config.held_out == "all"

    @property
    def description(self) -> dict[str, Any]:
        """Without what a config of before it had this key didn't say: what is counted hangs on neither."""
        return {k: v for k, v in super().description.items() if k not in ("train_from", "held_out")}

    def examples(self, rows: Sequences, whole: bool, max_length: int) -> Stretches:
        """With ``train_from``, its sample of a user without a later training action is empty."""
        samples = super().examples(rows, whole, max_length)
        if self.config.train_from is None:
            return samples
        stop_R = self.train_stop(rows)
        first_R = stop_R - samples.lengths_R
        from_R = np.maximum(actions_before(rows, self.config.train_from), 1)
        nothing_R = from_R >= stop_R
        samples = samples.cut(None, np.where(nothing_R, 0, samples.lengths_R))
        return samples.with_users(**{TARGETS_FROM: np.where(nothing_R, 1, np.maximum(from_R - first_R, 1))})

    def check_dataset(self, dataset: SequenceDataset) -> None:
        """Bounds lie after the log's first action and up to its last one (a second later if nothing is to be tested):
        others are in another unit, or of another log."""
        first, last = dataset.manifest.first_time, dataset.manifest.last_time
        if not dataset.has_timestamps:
            raise UserError(
                f"data.split 'global_time' needs timestamps, and dataset '{dataset.path}' has none: use leave_one_out"
            )
        if first is None or last is None:
            return
        for name, bound, latest in (
            ("valid_from", self.config.valid_from, last),
            ("test_from", self.config.test_from, last + 1),
        ):
            if not first < bound <= latest:
                side = "before" if bound <= first else "at or after"
                raise UserError(
                    f"no action of '{dataset.path}' is {side} data.split.{name} {bound} ({date(bound)}), they are "
                    f"from {first} ({date(first)}) to {last} ({date(last)}): {likely(bound, first, last)}"
                )

    def train_stop(self, rows: Sequences) -> np.ndarray:
        return actions_before(rows, self.config.valid_from)

    def target(self, rows: Sequences, name: str, users: int) -> np.ndarray:
        self.check(name)
        start = self.config.valid_from if name == "valid" else self.config.test_from
        index = actions_before(rows, start)
        return np.where((index >= 1) & (index < self._stop(rows, name)), index, -1)

    def targets(self, rows: Sequences, name: str, users: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.several:
            return super().targets(rows, name, users)
        self.check(name)
        start = self.config.valid_from if name == "valid" else self.config.test_from
        # an action without any before it can't be predicted from a sequence
        first_R, stop_R = np.maximum(actions_before(rows, start), 1), self._stop(rows, name)
        offsets, index_S = runs(first_R, stop_R)
        return np.repeat(np.arange(len(rows)), np.diff(offsets)), index_S

    def _stop(self, rows: Sequences, name: str) -> np.ndarray:
        """(R,) where the actions of a held-out period end."""
        return actions_before(rows, self.config.test_from) if name == "valid" else rows.lengths_R


class Records(Split):
    """Whole sequences: the first ``train`` share of the users trains, the next ``valid`` share validates, the rest
    tests; the target is the last action (synthetic streams)."""

    class Config(ComponentConfig):
        name: Literal["records"] = "records"
        train: FRACTION = 0.9
        valid: FRACTION = 0.0

    config: Config

    def __init__(self, config: Config):
        self.config = config
        self.names = ("valid", "test") if config.valid else ("test",)

    def training_rows(self, users: int) -> int:
        return round(self.config.train * users)

    def train_stop(self, rows: Sequences) -> np.ndarray:
        return rows.lengths_R

    def target(self, rows: Sequences, name: str, users: int) -> np.ndarray:
        self.check(name)
        first, second = self.training_rows(users), round((self.config.train + self.config.valid) * users)
        inside = (rows.ordinals_R >= first) & (rows.ordinals_R < second)
        if name == "test":
            inside = rows.ordinals_R >= second
        return np.where(inside & (rows.lengths_R >= self.least), rows.lengths_R - 1, -1)


class Impressions(Records):
    """Of a dataset whose rows are impressions, in random order: each row's one action (or last) is to be judged, and
    nothing has to come before it.  Shares as in ``records``.

    Where a dataset was made for a split (its columns are counted from what trains), it says so and no other is taken;
    the protocol that it names stands in each row of metrics."""

    least = 1

    class Config(Records.Config):
        name: Literal["impressions"] = "impressions"  # type: ignore[assignment]
        train: FRACTION = 0.64
        valid: FRACTION = 0.16

    protocol: str | None = None

    def check_dataset(self, dataset: SequenceDataset) -> None:
        made_for = dataset.manifest.provenance.get("split")
        asked = {"train": self.config.train, "valid": self.config.valid}
        if made_for is not None and made_for != asked:
            raise UserError(
                f"columns of '{dataset.path}' were counted from its first {made_for.get('train')} of rows, the next "
                f"{made_for.get('valid')} validate: set data.split.train and data.split.valid to these, or prepare it "
                "for another split"
            )

    def on(self, dataset: SequenceDataset, processes: Processes | None = None) -> Impressions:
        split = type(self)(self.config)
        split.protocol = dataset.manifest.provenance.get("protocol")
        return split

    def describe(self) -> dict[str, Any]:
        return {} if self.protocol is None else {"protocol": self.protocol}


def actions_before(rows: Sequences, time: int) -> np.ndarray:
    """(R,) how many of each user's actions come before ``time``."""
    if rows.timestamps_A is None:
        raise UserError("data.split needs timestamps, and this dataset has none: use leave_one_out")
    count = np.concatenate([[0], np.cumsum(rows.timestamps_A < time)])
    return count[rows.offsets_R1[1:]] - count[rows.offsets_R1[:-1]]


def date(seconds: int) -> str:
    """Seconds since 1970 as date and time in UTC, for people."""
    return str(np.datetime64(seconds, "s")).replace("T", " ") if abs(seconds) < 2**60 else "beyond all dates"


def likely(bound: int, first: int, last: int) -> str:
    """What to do about a bound outside of a log's times: the unit in which it would be inside, if there is one."""
    text = str(bound)
    if re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", text):
        day = f"{text[:4]}-{text[4:6]}-{text[6:]}"
        try:
            seconds = int(np.datetime64(day, "s").astype(np.int64))
        except ValueError:  # there is no 31st of that month
            seconds = first
        if first < seconds <= last:
            return f"it looks like the day {day}, give it in seconds since 1970 ({seconds})"
    for unit, ticks in (("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)):
        if first < bound // ticks <= last:
            return f"it looks like {unit}, give it in seconds ({bound // ticks})"
    for unit, seconds in (("minutes", 60), ("hours", 3600), ("days", 86400)):
        if first < bound * seconds <= last:
            return f"it looks like {unit} since 1970, give it in seconds ({bound * seconds})"
    return "give a time between the two, in seconds since 1970"
