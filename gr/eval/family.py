"""Metric families: what a kind of model is judged by.  ``gr.registry.METRICS`` has them, a model names its own
(``judged_by``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, Self

from torch import Tensor

from gr.config import RunConfig
from gr.eval.protocols import Request
from gr.labels import Described
from gr.processes import Axis


class Catalogue(Protocol):
    """What a family may know of the data: the number of items, the training actions of each (counted when first asked
    for), and what the dataset says of its columns."""

    @property
    def rows(self) -> int: ...

    @property
    def training_counts(self) -> Tensor: ...

    @property
    def manifest(self) -> Described: ...


class MetricFamily(ABC):
    """Streaming sums over requests that become metrics.

    Sums are exact integers or otherwise independent of the order of users, so that batches and processes change no bit
    of a result.  A metric is called ``KIND``, ``KIND@k``, ``KIND/TASK`` or ``KIND@k/TASK``: tables are laid out by
    that.
    """

    names: list[str]
    """Of the metrics, in the order in which people read them; a result may lack one (:meth:`notes` says why) and have
    figures beside them."""

    shown: list[str]
    """The few that a line, a plot or the table of a run's end have room for, the most telling first."""

    heading: str
    """What was measured, for the caption of a table."""

    eval_keys: frozenset[str] = frozenset()
    """Keys of the config's section ``eval`` that say something to this kind of metrics and not to every kind."""

    @classmethod
    @abstractmethod
    def of(cls, config: RunConfig, catalogue: Catalogue) -> Self:
        """The family, empty, for a run's model and data."""

    @staticmethod
    @abstractmethod
    def names_of(config: RunConfig) -> list[str]:
        """:attr:`names`, known from the config alone."""

    @staticmethod
    @abstractmethod
    def shown_of(config: RunConfig) -> list[str]:
        """:attr:`shown`, known from the config alone."""

    @staticmethod
    def protocol_of(config: RunConfig) -> dict[str, Any]:
        """What else figures mean, by its key in a row: those of another protocol are not compared with them."""
        return {}

    @abstractmethod
    def add(self, scorer: Any, request: Request) -> None:
        """Judge ``scorer`` on the request's users.  Raises UserError for scores that are NaN."""

    @abstractmethod
    def all_reduce(self, axis: Axis) -> None:
        """Add up over the processes."""

    @property
    @abstractmethod
    def users(self) -> int: ...

    @abstractmethod
    def result(self) -> dict[str, float]:
        """All figures by name; empty without users."""

    def by_bucket(self) -> dict[str, list[dict[str, Any]]]:
        """Breakdown -> its buckets: ``from``, ``to`` (inclusive, None for the open one), ``users``, the metrics."""
        return {}

    def notes(self) -> list[str]:
        """Sentences about figures that are missing."""
        return []
