"""Results of evaluations as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from gr.eval.evaluator import EvalResult

LEFT_OUT = {
    "none": "nothing left out",
    "kept": "the shown history left out",
    "all": "the whole history left out",
}
"""Of a ranking, by ``eval.exclude``."""
BREAKDOWNS = {
    "history": ("actions in the user's history", "actions"),
    "popularity": ("training actions of the target item", "actions"),
}
"""Breakdown -> (what puts a user in a bucket, the heading of the buckets)."""


def results_table(results: Mapping[str, EvalResult], title: str) -> Table:
    """The figures of each scorer; users, rules and kinds of targets in the caption.

    Rows are KIND for metrics KIND@k, TASK for KIND/TASK and both for KIND@k/TASK, columns the k and the KINDs; a metric
    of a plain name has a column of its own.
    """
    names = list(dict.fromkeys(name for result in results.values() for name in result.metrics))
    columns = list(dict.fromkeys(_cell(name)[1] for name in names))
    rows = list(dict.fromkeys(_cell(name)[0] for name in names if _cell(name)[0])) or [""]
    cells = {(_cell(name)[0] or rows[0], _cell(name)[1]): name for name in names}
    table = Table(
        title=title,
        title_justify="left",
        caption=_caption(list(results.values())[-1]),  # the model, beside baselines
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,  # six k, MRR and the loss beside a long name fit 80 columns
    )
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, result in results.items():
        for row in rows:
            values = (_shown(result.metrics.get(cells.get((row, column), ""))) for column in columns)
            table.add_row(label if row == rows[0] else "", row, *values)
    return table


def buckets_tables(result: EvalResult, label: str) -> list[Table]:
    """One table a breakdown: a row a bucket, the metrics that are shown where room is short."""
    tables = []
    for name, buckets in result.buckets.items():
        title, heading = BREAKDOWNS.get(name, (name, name))
        table = Table(
            title=f"{label}, by {title}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.add_column(heading, no_wrap=True)
        counted = "judged" if result.judged == heading else result.judged
        for column in (counted, *result.shown):
            table.add_column(column, justify="right", no_wrap=True)
        for bucket in buckets:
            values = (_shown(bucket.get(metric)) for metric in result.shown)
            table.add_row(_range(bucket["from"], bucket["to"]), f"{bucket['users']:,}", *values)
        tables.append(table)
    return tables


def _cell(name: str) -> tuple[str, str]:
    """(row, column) of a metric in its table; no row for a plain name."""
    first, _, task = name.partition("/")
    kind, at, k = first.partition("@")
    return (f"{kind} {task}".rstrip(), f"@{k}") if at else (task, kind)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _caption(result: EvalResult) -> str:
    """Who was asked, what was measured under which rule, and what share of the targets is of which kind."""
    subset = "" if result.population in (None, result.users) else f" of {result.population:,}"
    parts = [f"{result.users:,} {result.judged}{subset}, {result.heading}"]
    if (exclude := result.protocol.get("exclude")) is not None:
        parts[0] += f", {LEFT_OUT[exclude]} (eval.exclude={exclude})"
    if result.targets:
        parts.append(f"targets: {_kinds(result.targets)}")
    return "; ".join([*parts, *result.notes])


def _kinds(targets: Mapping[str, Any]) -> str:
    words = {
        "cold_targets": "never a training action",
        "repeated_targets": "in the user's history already",
        "tied_targets": "at the time of the action before",
    }
    return ", ".join(f"{share:.2%} {words.get(name, name)}" for name, share in targets.items())


def _range(low: int, top: int | None) -> str:
    if top is None:
        return f"{low:,} and more"
    return f"{low:,}" if top == low else f"{low:,} to {top:,}"
