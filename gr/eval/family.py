"""Metric families: what a kind of model is judged by.  ``gr.registry.METRICS`` has them, a model names its own
(``judged_by``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from gr.eval.protocols import Request
from gr.processes import Axis


class MetricFamily(ABC):
    """Streaming sums over requests that become metrics.

    Made as ``family(config.eval, model_or_its_like, item_counts)``; sums are exact integers or otherwise independent
    of the order of users, so that batches and processes change no bit of a result.
    """

    names: list[str]
    """Of the metrics, in the order in which people read them."""

    heading: str
    """What was measured, for the caption of a table."""

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
        """All metrics by name; empty without users."""

    def by_bucket(self) -> dict[str, list[dict[str, Any]]]:
        """Breakdown -> its buckets: ``from``, ``to`` (inclusive, None for the open one), ``users``, the metrics."""
        return {}
