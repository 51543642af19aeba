"""The evaluator: requests in, metrics out, over all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed as dist

from gr.errors import UserError
from gr.eval.metrics import HISTORY_EDGES, POPULARITY_EDGES, RankMetrics, communication_device
from gr.eval.protocols import Request, Scorer
from gr.eval.ranking import ranks_of
from gr.modes import evaluating

Advance = Callable[[int], None]
"""Called after each request with the users that it ranked."""


@dataclass(frozen=True)
class EvalResult:
    """Metrics over all processes' users.  ``population``: users that could have been evaluated, where only a subset
    was; ``seconds``: this process's time, reading and scoring."""

    split: str
    users: int
    metrics: dict[str, float]
    buckets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    population: int | None = None
    seconds: float = 0.0

    @property
    def users_per_second(self) -> float:
        return self.users / self.seconds if self.seconds else 0.0

    def row(self) -> dict[str, Any]:
        """What a metrics file keeps: deterministic content only.  ``of_users`` says that only some were asked."""
        subset = {} if self.population in (None, self.users) else {"of_users": self.population}
        return {"split": self.split, "users": self.users, **subset, **self.metrics}


def evaluate(
    scorer: Scorer,
    requests: Iterable[Request],
    *,
    items: int,
    ks: Sequence[int],
    split: str = "test",
    max_scores: int = 2**24,
    device: torch.device | str = "cpu",
    item_counts: Tensor | None = None,
    buckets: bool = True,
    population: Callable[[], int | None] | None = None,
    advance: Advance | None = None,
) -> EvalResult:
    """Rank the whole catalogue of ``items`` for this process's ``requests`` and add up over all processes.

    item_counts: (I,) training actions of each item; without them there is no breakdown by popularity.
    population: asked at the end how many users there were to evaluate, where ``requests`` may be a subset.
    A module is put into evaluation mode for the time, and runs without gradients.  Every process of the group must
    call this; a NaN score on any of them is a UserError on all.
    """
    breakdowns: dict[str, Sequence[int]] = {"history": HISTORY_EDGES} if buckets else {}
    if buckets and item_counts is not None:
        item_counts = item_counts.cpu()
        breakdowns["popularity"] = POPULARITY_EDGES
    metrics = RankMetrics(ks, breakdowns)
    start = time.perf_counter()
    failure: UserError | None = None
    with evaluating(scorer):
        try:
            for request in requests:
                values = {"history": request.history_lengths_B} if buckets else {}
                if "popularity" in breakdowns and item_counts is not None:
                    values["popularity"] = item_counts[request.targets_B]
                metrics.add(ranks_of(scorer, request.to(device), items, max_scores), **values)
                if advance is not None:
                    advance(len(request))
        except UserError as error:  # the other processes wait in the sum: tell them, then stop together
            failure = error
    _stop_together(failure)
    metrics.all_reduce()
    return EvalResult(
        split=split,
        users=metrics.users,
        metrics=metrics.result(),
        buckets=metrics.by_bucket(),
        population=population() if population is not None else None,
        seconds=time.perf_counter() - start,
    )


def _stop_together(failure: UserError | None) -> None:
    """Raise on every process when one has failed."""
    if dist.is_initialized():
        failures = torch.tensor(int(failure is not None), device=communication_device())
        dist.all_reduce(failures)
        if failures and failure is None:
            raise UserError(f"the evaluation failed on {int(failures)} other processes: see their messages")
    if failure is not None:
        raise failure
