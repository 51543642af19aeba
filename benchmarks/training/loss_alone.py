"""The loss alone, forward and backward, on queries that stand for the encoder's output.

Shapes: T queries, K negatives, I catalogue size, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.training.padded_baseline import PaddedHSTU
from benchmarks.training.shapes import Shape, config
from gr.batch import SequenceBatch
from gr.models.recommender import Recommender
from gr.models.step import StepContext
from gr_kernels.candidate_scores import explain

SLOW = 8.0  # a way this many times slower than the chosen one is timed once, cold


def measure(shape: Shape, targets: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way of scoring T = ``targets`` positions, and the one that gr picks by their cost.

    The ways take turns; the gradient of the table is in the time, the optimiser is not.
    """
    plan = explain(targets, 1 + shape.negatives, shape.items)
    ways = {way: _ours(shape, targets, way) for way in ("auto", "dense", "gather")}
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
        "picked": plan.implementation,
        "why": plan.why,
        "ms": {way: float(np.median(seconds)) * 1e3 for way, seconds in times.items()},
        "ratio": {"median": float(np.median(ratios)), "min": float(ratios.min()), "max": float(ratios.max())},
    }


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _ours(shape: Shape, targets: int, way: str) -> Callable[[], None]:
    model = Recommender(config(shape), shape.items, torch.ones(shape.items))
    model.table.implementation = way
    lengths = (targets + 1,)
    batch = SequenceBatch(
        offsets_B1=torch.tensor([0, *lengths]),
        items_T=torch.randint(shape.items, lengths),
        ordinals_B=torch.zeros(1, dtype=torch.int64),
        lengths=lengths,
    )
    supervision = model.supervise(batch, 1)
    queries_TD = torch.randn(targets, shape.dim, requires_grad=True)

    def run() -> None:
        model.table.weight.grad = queries_TD.grad = None
        (model.objective(queries_TD, supervision, StepContext(1)) / targets).backward()

    return run


def _baseline(shape: Shape, targets: int) -> Callable[[], None]:
    model = PaddedHSTU(**shape.baseline())
    targets_T = torch.randint(1, shape.items + 1, (targets,))
    queries_TD = torch.randn(targets, shape.dim, requires_grad=True)

    def run() -> None:
        model.embedding.weight.grad = queries_TD.grad = None
        model.loss(queries_TD, targets_T).backward()

    return run
