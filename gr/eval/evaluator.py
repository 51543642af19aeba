"""The evaluator: requests in, metrics out, over all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gr.errors import UserError
from gr.eval.family import MetricFamily
from gr.eval.protocols import Requests
from gr.modes import evaluating
from gr.processes import Axis, Processes

Advance = Callable[[int], None]
"""Called after each request with the users that it ranked."""


@dataclass(frozen=True)
class EvalResult:
    """Metrics over all processes' users.  ``population``: users that could have been evaluated, where only a subset
    was; ``seconds``: this process's time, reading and scoring; ``protocol``: what the figures mean (the rule of
    exclusion ...); ``heading``: what was measured, for people; ``shown``: the metrics to show where room is short;
    ``notes``: sentences about those that are missing; ``targets``: shares of kinds of targets; ``judged``: what they
    are called, "users", "impressions" or "actions"."""

    split: str
    users: int
    metrics: dict[str, float]
    buckets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    population: int | None = None
    seconds: float = 0.0
    protocol: dict[str, Any] = field(default_factory=dict)
    heading: str = ""
    shown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    targets: dict[str, float] = field(default_factory=dict)
    judged: str = "users"

    @property
    def users_per_second(self) -> float:
        return self.users / self.seconds if self.seconds else 0.0

    def row(self) -> dict[str, Any]:
        """What a metrics file keeps: deterministic content only.  ``of_users`` says that only some were asked."""
        subset = {} if self.population in (None, self.users) else {"of_users": self.population}
        return {
            "split": self.split,
            "users": self.users,
            **subset,
            **self.protocol,
            **self.targets,
            **self.metrics,
        }


def evaluate(
    scorer: Any,
    requests: Requests,
    family: MetricFamily,
    *,
    split: str = "test",
    protocol: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    device: torch.device | str = "cpu",
    population: Callable[[], int | None] | None = None,
    advance: Advance | None = None,
) -> EvalResult:
    """Judge ``scorer`` by ``family`` on this process's ``requests`` and add up over all processes.

    protocol: what the figures mean, kept beside them.  population: asked at the end how many users there were to
    evaluate, where ``requests`` may be a subset.  A module is put into evaluation mode for the time, and runs without
    gradients.  Every process of the run must call this; a NaN score on any of them is a UserError on all.
    """
    world, data = (Axis(), Axis()) if processes is None else (processes.world, processes.data)
    start = time.perf_counter()
    with evaluating(scorer):
        failure = _judge(scorer, requests, family, world, device, advance)
    _stop_together(failure, world)
    family.all_reduce(data)
    return EvalResult(
        split=split,
        users=family.users,
        metrics=family.result(),
        buckets=family.by_bucket(),
        population=population() if population is not None else None,
        seconds=time.perf_counter() - start,
        protocol=dict(protocol or {}),
        heading=family.heading,
        shown=family.shown,
        notes=family.notes(),
    )


def _judge(
    scorer: Any,
    requests: Requests,
    family: MetricFamily,
    world: Axis,
    device: torch.device | str,
    advance: Advance | None,
) -> UserError | None:
    """Ask all requests, or until one fails.  Where all processes must ask the scorer together, those that have no more
    ask empty ones, and none goes on when one has failed."""
    together = world.size > 1 and getattr(scorer, "collective", False)
    own, request, failure = iter(requests), None, None
    while True:
        try:
            request = next(own, None)
        except UserError as error:
            failure = error
        if together:
            asking, failing = world.sum(
                [int(request is not None), int(failure is not None)], dtype=torch.int64
            )
            if failing or not asking:
                return failure
        elif failure is not None or request is None:
            return failure
        asked = requests.empty() if request is None else request
        try:
            family.add(scorer, asked.to(device))
        except UserError as error:
            failure = error
        else:
            if advance is not None:
                advance(len(asked))


def _stop_together(failure: UserError | None, world: Axis) -> None:
    """Raise on every process when one has failed."""
    (failures,) = world.sum([int(failure is not None)], dtype=torch.int64)
    if failures and failure is None:
        raise UserError(f"the evaluation failed on {failures} other processes: see their messages")
    if failure is not None:
        raise failure
