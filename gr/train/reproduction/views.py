"""A published table beside what was measured, for people: printed, and as a picture with its JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.train.reproduction.table import Measured, PublishedTable

COSTS = ("parameters", "s an epoch", "peak MiB")
PANELS = 3
"""Metrics side by side in the picture."""

Line = tuple[str, list[str]]
"""A row's name, and a cell a column."""


def print_table(table: PublishedTable, measured: Sequence[Measured]) -> None:
    """Published beside measured; means over seeds, with the spread where there are several.  Columns that don't fit
    beside each other stand in a further table."""
    console, header = Console(), [*table.columns, *(COSTS if table.costs else ())]
    sections = [_lines(table, result) for result in measured]
    baselines = measured[0].baselines if measured else {}
    sections.append(
        [(name, [_number(row.get(column)) for column in table.columns]) for name, row in baselines.items()]
    )
    title: str | None = f"{table.title}: published beside measured"
    for columns in _fitting(header, [line for lines in sections for line in lines], console.width):
        view = Table(title=title, title_justify="left")
        view.add_column("model, epoch", no_wrap=True)
        for column in columns:
            view.add_column(header[column], justify="right", no_wrap=True)
        for lines in sections:
            for name, cells in lines:
                bold = "" if name.startswith(" ") else "bold"
                view.add_row(
                    f"[{bold}]{name}[/]" if bold else name, *(cells[c] for c in columns if c < len(cells))
                )
            view.add_section()
        console.print(view)
        title = None
    for result in measured:
        digests = ", ".join(dict.fromkeys(result.digests))
        console.print(
            f"{result.row.name}: data digest {digests}; published: {result.row.source}", highlight=False
        )


def save_table(table: PublishedTable, measured: Sequence[Measured], folder: str | Path) -> Path:
    """Write ``table.json`` and ``table.png`` into ``folder``; returns the picture's path."""
    folder = Path(folder)
    content = [{**asdict(m), "row": m.row.model_dump()} for m in measured]
    (folder / "table.json").write_text(json.dumps(content, indent=1) + "\n")

    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    columns = table.columns
    wide, high = min(len(columns), PANELS), math.ceil(len(columns) / PANELS)
    figure = Figure(
        figsize=(2.6 + 2.6 * wide, 0.9 + high * (0.7 + 0.24 * len(measured))), layout="constrained"
    )
    panels = figure.subplots(high, wide, squeeze=False, sharey=True).flatten()
    for axes, metric in zip(panels, columns):
        _draw(axes, table, measured, metric)
    for axes in panels[len(columns) :]:
        axes.set_axis_off()
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.suptitle(f"{table.title}, test", size=10)
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(folder / "table.png", dpi=130)
    return folder / "table.png"


def _draw(axes: Any, table: PublishedTable, measured: Sequence[Measured], metric: str) -> None:
    """A panel: a line a row, with what is published, each seed, and their mean."""
    for place, result in enumerate(measured):
        values = [row[metric] for row in result.result if metric in row]
        if (published := result.row.published.get(metric)) is not None:
            axes.plot(published, place, "D", color="#9aa3af", markersize=5, label="published")
        if values:
            axes.plot(values, [place] * len(values), "o", color="#9dbce0", markersize=4, label="a seed")
            axes.plot(
                statistics.mean(values),
                place,
                "|",
                color="#1f5a99",
                markersize=13,
                markeredgewidth=2.5,
                label="mean",
            )
    if table.oracle:
        oracle = measured[0].baselines["oracle"][metric]
        axes.axvline(oracle, linestyle="--", color="grey", linewidth=1, label="oracle on this stream")
    axes.set_yticks(range(len(measured)), [result.row.name for result in measured], size=8)
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.set_title(metric, size=9)
    axes.tick_params(axis="x", labelsize=7)
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.1)
    axes.grid(axis="both", color="#eceff3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(table: PublishedTable, result: Measured) -> list[Line]:
    """A row's part of the printed table."""
    published = [_number(result.row.published.get(column)) for column in table.columns]
    known = " published" if any(published) else ""
    lines = [(f"{result.row.name}{known}", [*published, *_costs(table, result)])]
    chosen = f"chosen by valid {result.selection}"
    for label, rows in (("last epoch", result.last), (chosen, result.chosen)):
        if rows:
            epochs = "/".join(str(row["epoch"] + 1) for row in rows)
            means = [
                mean_and_spread([row[column] for row in rows if column in row]) for column in table.columns
            ]
            lines.append((f"  {label} ({epochs})", means))
    if table.oracle:
        oracle = result.baselines["oracle"]
        shares = (statistics.mean(row[c] for row in result.last) / oracle[c] for c in table.columns)
        lines.append(("  share of the oracle", [f"{share:.1%}" for share in shares]))
    return lines


def _fitting(header: Sequence[str], lines: Sequence[Line], width: int) -> Iterator[list[int]]:
    """Columns that fit beside the names in ``width`` characters, and then the next ones: no number is cut."""
    frame = 3  # a border and two spaces
    names = max([len("model, epoch"), *(len(name) for name, _ in lines)]) + frame + 1
    room, fitting = width - names, list[int]()
    for column, title in enumerate(header):
        cells = (len(cells[column]) for _, cells in lines if column < len(cells))
        needed = max([len(title), *cells]) + frame
        if fitting and needed > room:
            yield fitting
            room, fitting = width - names, []
        fitting.append(column)
        room -= needed
    if fitting:
        yield fitting


def _costs(table: PublishedTable, result: Measured) -> list[str]:
    """What trains, the median seconds of an epoch, and the largest memory."""
    if not (table.costs and result.costs):
        return []
    seconds = statistics.median(row["epoch_s"] for row in result.costs)
    peak = max(row["peak_mib"] for row in result.costs)
    return [f"{result.costs[-1]['trained']:,}", f"{seconds:,.1f}", f"{peak:,.0f}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Of a figure's seeds: "" without any, and no spread of one."""
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else "")
