"""The loss alone, forward and backward, on queries that stand for the encoder's output.

Shapes: T queries, K negatives, I catalogue size, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.training.padded_baseline import PaddedHSTU
from benchmarks.training.shapes import Shape, model
from gr.batch import SequenceBatch
from gr.models.step import StepContext
from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.dispatch import explain
from gr_kernels.sampled_softmax.scores import cross_entropy_of_first

SLOW = 8.0  # a way this many times slower than the chosen one is timed once, cold


def measure(shape: Shape, targets: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way of scoring T = ``targets`` positions, and the one that gr picks by their cost.

    The ways take turns; the gradient of the table is in the time, the optimiser is not.
    """
    ours = _Ours(shape, targets)
    ways = {"auto": ours.step, "dense": lambda: ours.scored("dense"), "gather": lambda: ours.scored("gather")}
    ways["baseline"] = _baseline(shape, targets)
    first = {way: _seconds(run) for way, run in ways.items()}  # the first run warms up
    slow = {way for way in ways if way not in ("auto", "baseline") and first[way] > SLOW * first["auto"]}
    times: dict[str, list[float]] = {way: [first[way]] if way in slow else [] for way in ways}
    for _ in range(rounds):
        for way in (way for way in ways if way not in slow):
            times[way].append(_seconds(ways[way]))
    ratios = np.divide(times["baseline"], times["auto"])
    return {
        "targets": targets,
        "candidates": 1 + shape.negatives,
        "catalogue": shape.items,
        "picked": ours.why.split()[0],
        "why": ours.why,
        "ms": {way: float(np.median(seconds)) * 1e3 for way, seconds in times.items()},
        "ratio": {"median": float(np.median(ratios)), "min": float(ratios.min()), "max": float(ratios.max())},
    }


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class _Ours:
    """The objective of gr's config, and the same loss from scores computed in a given way."""

    def __init__(self, shape: Shape, targets: int) -> None:
        self.model = model(shape)
        self.items = self.model.items
        lengths = (targets + 1,)
        batch = SequenceBatch(
            offsets_B1=torch.tensor([0, *lengths]),
            columns={"item": torch.randint(shape.items, lengths)},
            ordinals_B=torch.zeros(1, dtype=torch.int64),
            lengths=lengths,
        )
        self.supervision = self.model.supervise(batch, 1)
        self.queries_TD = torch.randn(targets, shape.dim, requires_grad=True)
        self.negatives = shape.negatives
        rows = torch.zeros(targets, 1 + shape.negatives, dtype=torch.int32)
        self.why = explain(candidate_scores, self.queries_TD, self.items.weight, rows)

    def step(self) -> None:
        """Forward and backward, as training runs it."""
        context = StepContext(1, views={"items": self.items.view()})
        self._backward(self.model.objective(self.queries_TD, self.supervision, context, self.items))

    def scored(self, way: str) -> None:
        """Forward and backward through ``candidate_scores`` in that way."""
        similarity = self.model.similarity
        rows = self.model.objective.sampler.own(1, self.supervision, self.negatives)
        queries_TD = F.normalize(self.queries_TD, dim=-1) * similarity.scoring.scale
        eps = similarity.scoring.normalize_eps
        scores = candidate_scores(queries_TD, self.items.weight, rows, normalize_eps=eps, implementation=way)
        self._backward(cross_entropy_of_first(scores, rows, rows[:, :1]))

    def _backward(self, loss: torch.Tensor) -> None:
        self.items.weight.grad = self.queries_TD.grad = None
        (loss / len(self.queries_TD)).backward()


def _baseline(shape: Shape, targets: int) -> Callable[[], None]:
    baseline = PaddedHSTU(**shape.baseline())
    targets_T = torch.randint(1, shape.items + 1, (targets,))
    queries_TD = torch.randn(targets, shape.dim, requires_grad=True)

    def run() -> None:
        baseline.embedding.weight.grad = queries_TD.grad = None
        baseline.loss(queries_TD, targets_T).backward()

    return run
