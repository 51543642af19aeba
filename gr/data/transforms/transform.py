"""What a transform is: a pure function of sequences, and where it draws, of (seed, epoch, ordinal).

A **filter** says which actions there are for a run at all: training, evaluation, counts and recommendations see these
alone (:meth:`gr.data.dataset.SequenceDataset.filtered`).  A **sampler** makes a training example of a sequence, another
one each epoch; evaluation never meets it.  ``gr.registry.TRANSFORMS`` has the kinds.

Shapes: R rows, A actions of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gr.config import ComponentConfig
from gr.data.hashing import derive, keyed, uniform
from gr.data.sequences import Sequences

if TYPE_CHECKING:
    from gr.data.dataset import SequenceDataset
    from gr.data.manifest import Manifest


class Transform:
    """Interface.  ``needs``: the columns of actions that it looks at, beside ``item``."""

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config: ComponentConfig = config

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.config == self.config  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(type(self))

    def check_dataset(self, dataset: SequenceDataset) -> None:
        """Refuse a dataset that it can't be applied to, as far as its manifest tells."""
        dataset.require(sorted(self.needs), f"data.transforms '{self.config.name}'")


class Filter(Transform):
    """Which actions there are."""

    def kept(self, rows: Sequences, manifest: Manifest) -> np.ndarray:
        """(A,) bool.  It hangs on each action alone."""
        raise NotImplementedError


class Sampler(Transform):
    """A training example of each sequence.  ``whole``: of a sequence that is a user's whole history so far; else it may
    also be given one of which only the last actions are targets."""

    whole = False

    def apply(self, rows: Sequences, draws: Draws, max_length: int) -> Sequences:
        """The same rows with some of their actions, in their order.  max_length: inputs that a model takes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Draws:
    """Random numbers of one sampler in one epoch: functions of counters."""

    key: int

    @staticmethod
    def of(seed: int, epoch: int, number: int, name: str) -> Draws:
        """``number``: the sampler's place among the run's."""
        return Draws(derive("transform", number, name, seed, epoch))

    def a_row(self, rows: Sequences) -> np.ndarray:
        """(R,) float64 in (0, 1)."""
        return uniform(self._bits(rows))

    def an_action(self, rows: Sequences) -> np.ndarray:
        """(A,) float64 in (0, 1), that hang on an action's place in its sequence."""
        return uniform(keyed(rows.places_A, self._bits(rows)[rows.owner_A] + np.uint64(1)))

    def _bits(self, rows: Sequences) -> np.ndarray:
        return keyed(rows.ordinals_R, self.key)


def filters(transforms: Iterable[Transform]) -> tuple[Filter, ...]:
    """Those that say which actions there are."""
    return tuple(t for t in transforms if isinstance(t, Filter))


def samplers(transforms: Iterable[Transform]) -> tuple[Sampler, ...]:
    """Those that make a training example of a sequence."""
    return tuple(t for t in transforms if isinstance(t, Sampler))
