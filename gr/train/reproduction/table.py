"""A published table beside what was measured: its files, the printed form, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.config import Section, read_yaml, validate
from gr.shipped import find_table
from gr.train.cells import Trained
from gr.train.selection import best_validation, selection_metric

COSTS = ("parameters", "s an epoch", "peak MiB")


class Row(Section):
    """A model of the table.  ``valid``: its own protocol holds a validation action out and lets it choose the epoch.
    ``protocol``: of the table's, under which it is trained; "" in a file, where a row stands for all of them."""

    name: str
    config: str
    published: dict[str, float]
    source: str
    valid: bool = False
    protocol: str = ""


class PublishedTable(Section):
    """``dataset``: the folder of the data.  ``name``: of the folder the table stands in, where that is another.
    ``prepares``: what gr prepare calls its data, where that isn't the dataset's name.  ``options``: of a generated
    dataset.  ``oracle``: also print each row's share of the oracle's metric.  ``protocols``: by name, options of the
    datasets on each of which all rows are trained; ``published_under``: the one whose figures are compared with the
    published ones.  ``costs``: also print what trains, seconds an epoch and the largest memory."""

    dataset: str
    prepares: str | None = None
    columns: list[str]
    rows: list[Row]
    options: dict[str, Any] = {}
    oracle: bool = False
    costs: bool = False
    protocols: dict[str, dict[str, Any]] = {}
    published_under: str | None = None
    name: str | None = None

    @property
    def title(self) -> str:
        """What it is called by."""
        return self.name or self.dataset

    def under(self, protocol: str, row: Row) -> Row:
        """A row of the file as it is trained under a protocol."""
        if not protocol:
            return row
        published = row.published if protocol == self.published_under else {}
        return row.model_copy(
            update={"name": f"{row.name}, {protocol}", "protocol": protocol, "published": published}
        )


@dataclass
class Measured:
    """One row's evaluations, a value a seed: at the last epoch, and at the one that validation chose by the run's own
    metric, ``selection``.  ``costs``: what each epoch cost, of all seeds (rows of timing.jsonl)."""

    row: Row
    last: list[dict[str, Any]] = field(default_factory=list)
    chosen: list[dict[str, Any]] = field(default_factory=list)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    selection: str = ""

    @property
    def result(self) -> list[dict[str, Any]]:
        """What the row's protocol reports."""
        return self.chosen if self.row.valid else self.last

    def add(self, trained: Trained, last: bool = True) -> None:
        """Take a finished run in; without ``last`` for the epoch that validation chose alone."""
        rows = trained.metrics
        tests = {r["step"]: r for r in rows if r["kind"] == "eval" and r["split"] == "test"}
        if last:
            self.last.append(tests[max(tests)])
            self.digests.append([r["data_digest"] for r in rows if r["kind"] == "train"][-1])
            self.costs += [row for row in trained.timing if "epoch_s" in row]
        metric = selection_metric(trained.config)
        if (best := best_validation(rows, metric)) is not None:
            self.chosen.append(tests[best["step"]])
            self.selection = metric
        self.baselines.update(
            {r["name"]: r for r in rows if r["kind"] == "baseline" and r["split"] == "test"}
        )


def read_table(dataset: str) -> PublishedTable:
    return validate(PublishedTable, read_yaml(find_table(dataset), PublishedTable), "")


def print_table(table: PublishedTable, measured: Sequence[Measured]) -> None:
    """Published beside measured; means over seeds, with the spread where there are several."""
    view = Table(title=f"{table.title}: published beside measured", title_justify="left")
    view.add_column("model, epoch")
    for column in [*table.columns, *(COSTS if table.costs else ())]:
        view.add_column(column, justify="right")
    for result in measured:
        published = [_number(result.row.published.get(c)) for c in table.columns]
        known = " published" if any(published) else ""
        view.add_row(f"[bold]{result.row.name}[/]{known}", *published, *_costs(table, result))
        chosen = f"chosen by valid {result.selection}"
        for label, rows in (("last epoch", result.last), (chosen, result.chosen)):
            if rows:
                epochs = "/".join(str(r["epoch"] + 1) for r in rows)
                view.add_row(
                    f"  {label} ({epochs})", *(_spread([r[c] for r in rows if c in r]) for c in table.columns)
                )
        if table.oracle:
            oracle = result.baselines["oracle"]
            shares = [statistics.mean(r[c] for r in result.last) / oracle[c] for c in table.columns]
            view.add_row("  share of the oracle", *(f"{s:.1%}" for s in shares))
        view.add_section()
    for name, row in (measured[0].baselines if measured else {}).items():
        view.add_row(name, *(_number(row.get(c)) for c in table.columns))
    console = Console()
    console.print(view)
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

    names = [m.row.name for m in measured]
    figure = Figure(figsize=(2.2 + 1.3 * len(names), 3.6), layout="constrained")
    axes = figure.subplots()
    metric = table.columns[0]
    published = [m.row.published.get(metric, 0.0) for m in measured]
    values = [m.result for m in measured]
    means = [statistics.mean(r[metric] for r in rows) for rows in values]
    spreads = [statistics.stdev(r[metric] for r in rows) if len(rows) > 1 else 0.0 for rows in values]
    places = range(len(names))
    axes.bar([p - 0.2 for p in places], published, 0.4, color="#c9ced6", label="published")
    bars = axes.bar([p + 0.2 for p in places], means, 0.4, yerr=spreads, color="#1f5a99", label="measured")
    axes.bar_label(bars, [f"{mean:.4f}" for mean in means], padding=2, size=8)
    if table.oracle:
        oracle = measured[0].baselines["oracle"][metric]
        axes.axhline(oracle, linestyle="--", color="grey", linewidth=1, label="oracle on this stream")
    axes.set_xticks(list(places), [n.replace(" (", "\n(").replace(", ", ",\n") for n in names], size=8)
    axes.set(title=f"{table.title}: {metric.upper()}", ylim=(0, None))
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(folder / "table.png", dpi=130)
    return folder / "table.png"


def _costs(table: PublishedTable, result: Measured) -> list[str]:
    """What trains, the median seconds of an epoch, and the largest memory."""
    if not (table.costs and result.costs):
        return []
    seconds = statistics.median(row["epoch_s"] for row in result.costs)
    peak = max(row["peak_mib"] for row in result.costs)
    return [f"{result.costs[-1]['trained']:,}", f"{seconds:,.1f}", f"{peak:,.0f}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else "")
