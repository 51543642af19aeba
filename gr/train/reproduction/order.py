"""Whether the order of the published figures is found again: each row against the one published just below it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.train.reproduction.table import Measured, PublishedTable
from gr.train.selection import better

ERRORS = 2.0
"""Standard errors that a difference must be away from nothing to be called one."""


@dataclass(frozen=True)
class Step:
    """``better`` than ``worse`` by what is published; ``published`` and ``measured``: by how much in the table's first
    column, positive where better is; ``error``: the standard error of the latter over seeds, None for one seed.
    ``verdict``: confirmed, refuted or undecided."""

    protocol: str
    worse: str
    better: str
    published: float
    measured: float
    error: float | None
    verdict: str


def steps_of(table: PublishedTable, measured: Sequence[Measured]) -> list[Step]:
    """The steps of each protocol of the table (or of the table, if it has one protocol), from the lowest figure up."""
    return [step for protocol in [*table.protocols] or [""] for step in _steps(table, measured, protocol)]


def _steps(table: PublishedTable, measured: Sequence[Measured], protocol: str) -> Iterator[Step]:
    metric = table.columns[0]
    sign = 1.0 if better(metric, 1.0, 0.0) else -1.0
    published = {row.config: row.published[metric] for row in table.rows if metric in row.published}
    found = [m for m in measured if m.row.protocol == protocol and m.row.config in published]
    found.sort(key=lambda m: sign * published[m.row.config])
    for below, above in zip(found, found[1:]):
        pairs = zip(below.result, above.result)  # the same seeds in the same order
        differences = [sign * (high[metric] - low[metric]) for low, high in pairs]
        mean = statistics.mean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        verdict = "undecided"
        if error is not None and abs(mean) > ERRORS * error:
            verdict = "confirmed" if mean > 0 else "refuted"
        gap = sign * (published[above.row.config] - published[below.row.config])
        yield Step(protocol, below.row.name, above.row.name, gap, mean, error, verdict)


def print_steps(steps: Sequence[Step], metric: str) -> None:
    view = Table(
        title=f"the published order, {metric}: by {ERRORS:g} standard errors over seeds, or undecided",
        title_justify="left",
    )
    for column in ("worse", "better", "published gap", "measured gap", "verdict"):
        view.add_column(column, justify="right" if "gap" in column else "left")
    for step in steps:
        off = "" if step.error is None else f" ±{step.error:.4f}"
        view.add_row(
            step.worse, step.better, f"{step.published:.4f}", f"{step.measured:+.4f}{off}", step.verdict
        )
    Console().print(view)


def to_json(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [asdict(step) for step in steps]
