"""The evaluator: requests in, metrics out, over all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gr.errors import UserError
from gr.eval.family import MetricFamily
from gr.eval.protocols import Request, Requests
from gr.modes import evaluating
from gr.processes import Axis, Processes

Advance = Callable[[int], None]
"""Called after each request with the users that it ranked."""


@dataclass(frozen=True)
class EvalResult:
    """Metrics over all processes' users.  ``population``: users that could have been evaluated, where only a subset
    was; ``seconds``: this process's time, reading and scoring; ``protocol``: what the figures mean (the rule of
    exclusion ...); ``heading``: what was measured, for people; ``shown``: the metrics to show where room is short;
    ``notes``: sentences about those that are missing; ``targets``: shares of kinds of targets."""

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
    failure: UserError | None = None
    with evaluating(scorer):
        try:
            for request in _in_step(requests, scorer, world):
                family.add(scorer, request.to(device))
                if advance is not None:
                    advance(len(request))
        except UserError as error:  # the other processes wait in the sum: tell them, then stop together
            failure = error
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


def _in_step(requests: Requests, scorer: Any, world: Axis) -> Iterator[Request]:
    """The requests; where all processes must ask the scorer together, those that have no more ask empty ones."""
    if world.size == 1 or not getattr(scorer, "collective", False):
        yield from requests
        return
    own = iter(requests)
    while True:
        request = next(own, None)
        if not world.sum([int(request is not None)], dtype=torch.int64)[0]:
            return
        yield requests.empty() if request is None else request


def _stop_together(failure: UserError | None, world: Axis) -> None:
    """Raise on every process when one has failed."""
    (failures,) = world.sum([int(failure is not None)], dtype=torch.int64)
    if failures and failure is None:
        raise UserError(f"the evaluation failed on {failures} other processes: see their messages")
    if failure is not None:
        raise failure
