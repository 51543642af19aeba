"""Hypotheses that one row of a table is better than another, each tested over the same seeds of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.train.selection import better

ERRORS = 2.0
"""Standard errors that a difference must be away from nothing to be called one."""


@dataclass(frozen=True)
class Hypothesis:
    """That ``high`` is better than ``low`` by ``metric``.  ``where``: the protocol or direction, or "".  ``measured``:
    the mean over seeds of how much better it is, positive where it is, with its standard error (None for one seed);
    ``published``: by how much where both are.  ``verdict``: confirmed, refuted or undecided."""

    where: str
    metric: str
    high: str
    low: str
    measured: float
    error: float | None
    verdict: str
    published: float | None = None


def tested(
    metric: str,
    high: tuple[str, Sequence[Mapping[str, Any]]],
    low: tuple[str, Sequence[Mapping[str, Any]]],
    *,
    where: str = "",
    published: float | None = None,
) -> Hypothesis:
    """Test two rows, each a name and its evaluations, those of the same seeds in the same order."""
    sign = 1.0 if better(metric, 1.0, 0.0) else -1.0
    gaps = [sign * (one[metric] - other[metric]) for one, other in zip(high[1], low[1], strict=True)]
    mean = statistics.mean(gaps)
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    verdict = "undecided"
    if error is not None and abs(mean) > ERRORS * error:
        verdict = "confirmed" if mean > 0 else "refuted"
    return Hypothesis(where, metric, high[0], low[0], mean, error, verdict, published)


def print_hypotheses(hypotheses: Sequence[Hypothesis]) -> None:
    """One table; nothing where there are none."""
    if not hypotheses:
        return
    view = Table(
        title=f"hypotheses, paired by seeds: {ERRORS:g} standard errors decide",
        title_justify="left",
    )
    with_where = any(hypothesis.where for hypothesis in hypotheses)
    with_published = any(hypothesis.published is not None for hypothesis in hypotheses)
    for column, shown in (
        ("of", with_where),
        ("better", True),
        ("than", True),
        ("metric", True),
        ("published", with_published),
        ("measured", True),
        ("verdict", True),
    ):
        if shown:
            view.add_column(column, justify="right" if column in ("published", "measured") else "left")
    for before, one in zip([None, *hypotheses], hypotheses):
        if before is not None and (before.where, before.high, before.low) != (one.where, one.high, one.low):
            view.add_section()
        off = "" if one.error is None else f" ±{one.error:.4f}"
        cells = [one.where] if with_where else []
        cells += [one.high, one.low, one.metric]
        if with_published:
            cells.append("" if one.published is None else f"{one.published:+.4f}")
        view.add_row(*cells, f"{one.measured:+.4f}{off}", one.verdict)
    Console().print(view)


def to_json(hypotheses: Sequence[Hypothesis]) -> list[dict[str, Any]]:
    return [asdict(hypothesis) for hypothesis in hypotheses]
