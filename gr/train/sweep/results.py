"""What a sweep has found: a row for each member, and the laws of each family."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gr.config import RunConfig
from gr.errors import UserError
from gr.scaling.design import told, why_not
from gr.scaling.flops import Accounting
from gr.scaling.isoflop import Valley, best_size, valley
from gr.scaling.laws import Fit, Optimum, Prediction, fit_compute, fit_size_and_data, frontier, optimal
from gr.train.cells import Trained
from gr.train.selection import falls
from gr.train.sweep.lengths import batch_lengths
from gr.train.sweep.plan import TRAINING, FitSection, SweepConfig
from gr.train.sweep.run import Outcome

PFLOP_DAY = 1e15 * 86_400
"""Operations."""


@dataclass(frozen=True)
class Row:
    """A member.  parameters: of the encoder.  tokens: targets trained on.  flops: of the whole training.  measured: the
    metrics of the test split, and the training loss.  Numbers are None where it failed, and ``why`` says so."""

    name: str
    family: str
    values: dict[str, Any]
    folder: str
    why: str = ""
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    objective: str = ""
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def pflop_days(self) -> float:
        return (self.flops or 0.0) / PFLOP_DAY


@dataclass(frozen=True)
class Quantity:
    """What a law is of: a metric, or 1 - metric where it rises, less what is known to be irreducible."""

    metric: str
    floor: float = 0.0

    def of(self, row: Row) -> float:
        value = row.measured[self.metric]
        return (value if falls(self.metric) or self.metric == TRAINING else 1 - value) - self.floor


@dataclass(frozen=True)
class Point:
    """What a law of compute is fitted to: a member, the mean (of logarithms) of those that differ in their seed alone,
    or the lowest point of a curve of equal compute."""

    name: str
    pflop_days: float
    value: float


@dataclass(frozen=True)
class HeldOut:
    """A point that the law had to predict.  percent: half of the interval's width, of the loss."""

    name: str
    pflop_days: float
    predicted: Prediction
    measured: float
    percent: float

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass
class Laws:
    """Of a family and a quantity: with and without an irreducible term, of compute in PFLOP-days; of size and data;
    curves of equal compute, and how the best size grows with it (k, a: of operations).  ``why``: what could not be
    fitted.  fitted: the points that the laws of compute are fitted to."""

    family: str
    quantity: Quantity
    fitted: list[Point] = field(default_factory=list)
    compute: dict[str, Fit] = field(default_factory=dict)
    size_and_data: Fit | None = None
    optima: list[Optimum] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    valleys: list[Valley] = field(default_factory=list)
    best_size: tuple[float, float] | None = None
    why: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> Fit | None:
        """The law of compute with the lower AICc."""
        return min(self.compute.values(), key=lambda law: law.aicc, default=None)


def row_of(outcome: Outcome, sweep: SweepConfig) -> Row:
    member = outcome.member
    known = (member.cell.name, member.family, member.values, member.cell.folder)
    if outcome.trained is None:
        return Row(*known, why=outcome.why)
    try:
        return Row(*known, **_measured(outcome.trained, sweep.fit))
    except UserError as error:
        return Row(*known, why=str(error))


def _measured(trained: Trained, fit: FitSection) -> dict[str, Any]:
    train = [row for row in trained.metrics if row["kind"] == "train"]
    tests = [row for row in trained.metrics if row["kind"] == "eval" and row["split"] == "test"]
    metrics = {k: v for k, v in (tests[-1] if tests else {}).items() if isinstance(v, float)}
    if not train:
        raise UserError(
            f"'{trained.cell.folder}' is finished, and its metrics.jsonl has no row of training: move the folder away, "
            "and start the sweep again"
        )
    last = train[-max(1, round(len(train) * fit.share)) :]
    loss = sum(row["loss"] * row["targets"] for row in last) / sum(row["targets"] for row in last)
    for name in (fit.of, *fit.also):
        if name not in {TRAINING, *metrics}:
            raise UserError(
                f"fit names {name}, and the test split was evaluated by {', '.join(metrics) or 'nothing'}: choose "
                f"one of these, or {TRAINING}"
            )
    steps = train[-1]["step"]
    lengths, _ = batch_lengths(trained.config, steps)
    account = Accounting(trained.config, lengths.items)
    return {
        "parameters": account.parameters,
        "steps": steps,
        "tokens": sum(row["targets"] for row in train),
        "flops": sum(account.step(*batch).total for batch in lengths.batches),
        "objective": objective_of(trained.config),
        "measured": {TRAINING: loss, **metrics},
    }


def objective_of(config: RunConfig) -> str:
    """What a training loss is of, in words: over the catalogue, or over a sample of it."""
    objective = config.objective
    assert objective is not None
    negatives = getattr(objective, "negatives", None)
    return objective.name.replace("_", " ") + (f", {negatives} negatives" if negatives else "")


def laws_of(sweep: SweepConfig, rows: Sequence[Row], floor: float | None = None) -> list[Laws]:
    """The laws of every quantity and family, as far as its members tell them.  floor: what is known to be irreducible
    of fit.of; then what is above it has laws too."""
    first = Quantity(sweep.fit.of)
    above = [] if floor is None else [Quantity(sweep.fit.of, floor)]
    return [
        _laws(name, quantity, sweep.fit, [r for r in rows if r.family == name and not r.why])
        for quantity in (first, *above, *map(Quantity, sweep.fit.also))
        for name in sweep.families
    ]


def _laws(family: str, quantity: Quantity, fit: FitSection, rows: list[Row]) -> Laws:
    found = Laws(family, quantity)
    if not rows:
        found.why.append("no member has finished, so that there is nothing to fit")
        return found
    if below := [row.name for row in rows if quantity.of(row) <= 0]:
        found.why.append(f"{below[0]} lies at or below what is said to be irreducible ({quantity.floor:g})")
        return found
    found.valleys = valleys_of(quantity, rows)
    found.best_size = best_size(found.valleys)
    points = _points(quantity, fit, rows, found.valleys)
    known = points[: len(points) - fit.held_out]
    found.fitted = known
    for kind, free in (("without E", False), ("with E", True)):
        if free and quantity.floor:  # it has been taken away
            continue
        try:
            found.compute[kind] = fit_compute(
                [p.pflop_days for p in known],
                [p.value for p in known],
                floor=free,
                replicates=fit.replicates,
            )
        except UserError as error:
            found.why.append(f"L(C) {kind}: {error}")
    if (law := found.chosen) is not None:
        for point in points[len(known) :]:
            predicted = law.predict(point.pflop_days)
            percent = 50 * (predicted.high - predicted.low) / (predicted.value + quantity.floor)
            found.held_out.append(HeldOut(point.name, point.pflop_days, predicted, point.value, percent))
    if quantity.floor:
        return found
    _size_and_data(found, fit, rows, points)
    return found


def _size_and_data(found: Laws, fit: FitSection, rows: list[Row], points: list[Point]) -> None:
    """L(N, D) where the members tell it; else why not, and which would."""
    sizes, tokens = (
        [float(n or 0) for n in numbers] for numbers in zip(*((r.parameters, r.tokens) for r in rows))
    )
    losses = [found.quantity.of(r) for r in rows]
    law = None
    with suppress(UserError):  # too few, or all alike: said below, with those that are missing
        law = fit_size_and_data(sizes, tokens, losses, replicates=fit.replicates)
    if law is None or not told(law).enough:
        found.why.append(f"L(N, D) isn't told: {why_not(sizes, tokens, law)}")
        return
    found.size_and_data = law
    # operations for each parameter and token, of this family: six and what attention and the loss add
    each = sum((r.flops or 0) / (n * d) for r, n, d in zip(rows, sizes, tokens)) / len(rows)
    found.optima = [optimal(law, p.pflop_days * PFLOP_DAY, each) for p in points]


def _points(
    quantity: Quantity, fit: FitSection, rows: Sequence[Row], valleys: Sequence[Valley]
) -> list[Point]:
    """From the cheapest on."""
    if fit.points == "valleys":
        return [Point(f"{v.compute:.3g} operations", v.compute / PFLOP_DAY, v.loss) for v in valleys]
    alike: dict[str, list[Row]] = {}
    for row in rows:
        alike.setdefault(re.sub(r"-seed\d+", "", row.name), []).append(row)
    points = [
        Point(
            name,
            float(np.mean([row.pflop_days for row in same])),
            float(np.exp(np.mean([np.log(quantity.of(row)) for row in same]))),
        )
        for name, same in alike.items()
    ]
    if fit.points == "frontier":
        # what members of one budget cost differs by less than a step: that makes none of them cheaper
        costs = [same[0].values.get("flops", point.pflop_days) for same, point in zip(alike.values(), points)]
        points = [points[i] for i in frontier(costs, [point.value for point in points])]
    return sorted(points, key=lambda point: point.pflop_days)


def valleys_of(quantity: Quantity, rows: Sequence[Row]) -> list[Valley]:
    """Of each budget that three sizes or more were trained with, from the smallest on."""
    budgets = sorted({row.values["flops"] for row in rows if "flops" in row.values})
    found = []
    for budget in budgets:
        same = [row for row in rows if row.values["flops"] == budget]
        curve = valley(budget, [r.parameters or 0 for r in same], [quantity.of(r) for r in same])
        if curve is not None:
            found.append(curve)
    return found


def save(
    sweep: SweepConfig, rows: Sequence[Row], laws: Sequence[Laws], left_out: Sequence[str], file: Path
) -> None:
    """Everything as JSON: the sweep, its members and who was left out, the laws."""
    content = {
        "sweep": sweep.model_dump(mode="json"),
        "members": [{**asdict(row), "pflop_days": row.pflop_days} for row in rows],
        "left_out": list(left_out),
        "laws": [
            {
                "family": law.family,
                "of": asdict(law.quantity),
                "fitted": [asdict(point) for point in law.fitted],
                "compute": {kind: fit.to_dict() for kind, fit in law.compute.items()},
                "size_and_data": law.size_and_data.to_dict() if law.size_and_data else None,
                "optima": [asdict(optimum) for optimum in law.optima],
                "held_out": [{**asdict(held), "inside": held.inside} for held in law.held_out],
                "equal_compute": [{**asdict(v), "inside": v.inside} for v in law.valleys],
                "best_size": None if law.best_size is None else dict(zip("ka", law.best_size)),
                "why": law.why,
            }
            for law in laws
        ],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
