"""What a sweep has found: a row for each member, and the laws of each family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gr.errors import UserError
from gr.scaling.flops import Accounting
from gr.scaling.laws import Fit, Optimum, Prediction, fit_compute, fit_size_and_data, frontier, optimal
from gr.train.cells import Trained
from gr.train.sweep.lengths import batch_lengths
from gr.train.sweep.plan import FitSection, SweepConfig
from gr.train.sweep.run import Outcome

PFLOP_DAY = 1e15 * 86_400
"""Operations."""


@dataclass(frozen=True)
class Row:
    """A member.  parameters: of the encoder.  tokens: targets trained on.  flops: of the whole training.  value: what
    the law is fitted to.  Numbers are None where it failed, and ``why`` says so."""

    name: str
    family: str
    values: dict[str, Any]
    folder: str
    why: str = ""
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def pflop_days(self) -> float:
        return (self.flops or 0.0) / PFLOP_DAY


@dataclass(frozen=True)
class HeldOut:
    """A member that the law had to predict."""

    name: str
    pflop_days: float
    predicted: Prediction
    measured: float

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass
class Laws:
    """Of a family: with and without an irreducible term, of compute in PFLOP-days; of size and data.  ``why``: what
    could not be fitted.  fitted: the names of the members that the laws of compute are fitted to."""

    family: str
    fitted: list[str] = field(default_factory=list)
    compute: dict[str, Fit] = field(default_factory=dict)
    size_and_data: Fit | None = None
    optima: list[Optimum] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> Fit | None:
        """The law of compute with the lower AICc."""
        return min(self.compute.values(), key=lambda law: law.aicc, default=None)


def row_of(outcome: Outcome, fit: FitSection) -> Row:
    member = outcome.member
    known = (member.cell.name, member.family, member.values, member.cell.folder)
    if outcome.trained is None:
        return Row(*known, why=outcome.why)
    try:
        return Row(*known, **_measured(outcome.trained, fit))
    except UserError as error:
        return Row(*known, why=str(error))


def _measured(trained: Trained, fit: FitSection) -> dict[str, Any]:
    train = [row for row in trained.metrics if row["kind"] == "train"]
    tests = [row for row in trained.metrics if row["kind"] == "eval" and row["split"] == "test"]
    metrics = {k: v for k, v in (tests[-1] if tests else {}).items() if isinstance(v, float)}
    steps = train[-1]["step"]
    lengths, _ = batch_lengths(trained.config, steps)
    account = Accounting(trained.config, lengths.items)
    return {
        "parameters": account.parameters,
        "steps": steps,
        "tokens": sum(row["targets"] for row in train),
        "flops": sum(account.step(*batch).total for batch in lengths.batches),
        "value": _value(fit, train, metrics),
        "metrics": metrics,
    }


def _value(fit: FitSection, train: Sequence[dict[str, Any]], metrics: dict[str, float]) -> float:
    if fit.of != "loss":
        if fit.of not in metrics:
            raise UserError(
                f"fit.of is {fit.of}, and the test split was evaluated by {', '.join(metrics) or 'nothing'}: choose "
                "one of these, or loss"
            )
        return 1 - metrics[fit.of]
    last = train[-max(1, round(len(train) * fit.share)) :]
    return sum(row["loss"] * row["targets"] for row in last) / sum(row["targets"] for row in last)


def laws_of(sweep: SweepConfig, rows: Sequence[Row]) -> list[Laws]:
    """The laws of every family, as far as its members tell them."""
    return [
        _laws(name, sweep.fit, [r for r in rows if r.family == name and not r.why]) for name in sweep.families
    ]


def _laws(family: str, fit: FitSection, rows: list[Row]) -> Laws:
    found = Laws(family)
    rows = sorted(rows, key=lambda row: row.pflop_days)
    if fit.points == "frontier":
        best = frontier([r.pflop_days for r in rows], [r.value or 0.0 for r in rows])
        front = [rows[i] for i in best]
    else:
        front = rows
    known = front[: len(front) - fit.held_out] if fit.held_out else front
    found.fitted = [row.name for row in known]
    for kind, floor in (("without E", False), ("with E", True)):
        try:
            found.compute[kind] = fit_compute(
                [r.pflop_days for r in known],
                [r.value or 0.0 for r in known],
                floor=floor,
                replicates=fit.replicates,
            )
        except UserError as error:
            found.why.append(f"L(C) {kind}: {error}")
    if (law := found.chosen) is not None:
        for row in front[len(known) :]:
            found.held_out.append(
                HeldOut(row.name, row.pflop_days, law.predict(row.pflop_days), row.value or 0.0)
            )
    try:
        found.size_and_data = fit_size_and_data(
            [r.parameters or 0 for r in rows],
            [r.tokens or 0 for r in rows],
            [r.value or 0.0 for r in rows],
            replicates=fit.replicates,
        )
        # operations for each parameter and token, of this family: six and what attention and the loss add
        each = sum((r.flops or 0) / ((r.parameters or 1) * (r.tokens or 1)) for r in rows) / len(rows)
        found.optima = [optimal(found.size_and_data, row.flops or 0.0, each) for row in front]
    except UserError as error:
        found.why.append(f"L(N, D): {error}")
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
                "fitted": law.fitted,
                "compute": {kind: fit.to_dict() for kind, fit in law.compute.items()},
                "size_and_data": law.size_and_data.to_dict() if law.size_and_data else None,
                "optima": [asdict(optimum) for optimum in law.optima],
                "held_out": [{**asdict(held), "inside": held.inside} for held in law.held_out],
                "why": law.why,
            }
            for law in laws
        ],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
