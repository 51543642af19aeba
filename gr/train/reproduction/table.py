"""A published table: its file, what was measured of its rows, and the hypotheses that it tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gr.config import Section, read_yaml, validate
from gr.shipped import find_table
from gr.train.cells import Trained
from gr.train.reproduction.hypotheses import Hypothesis, tested
from gr.train.selection import best_validation, better, selection_metric


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
    published ones.  ``costs``: also print what trains, seconds an epoch and the largest memory.  ``hypotheses``: pairs
    of rows, by their configs' names, of which the first is held to be better in every column."""

    dataset: str
    prepares: str | None = None
    columns: list[str]
    rows: list[Row]
    options: dict[str, Any] = {}
    oracle: bool = False
    costs: bool = False
    hypotheses: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
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


def hypotheses_of(table: PublishedTable, measured: Sequence[Measured]) -> list[Hypothesis]:
    """For each protocol: where the table has several, each row against the one published just below it, by the first
    column; and the table's own pairs, by every column.  Rows that weren't trained are in none."""
    return [one for protocol in [*table.protocols] or [""] for one in _hypotheses(table, measured, protocol)]


def _hypotheses(table: PublishedTable, measured: Sequence[Measured], protocol: str) -> Iterator[Hypothesis]:
    metric = table.columns[0]
    rows = {Path(m.row.config).stem: m for m in measured if m.row.protocol == protocol}
    figures = {Path(row.config).stem: row.published[metric] for row in table.rows if metric in row.published}

    def test(metric: str, high: str, low: str, published: float | None = None) -> Hypothesis:
        named = (
            (next(r.name for r in table.rows if Path(r.config).stem == n), rows[n].result)
            for n in (high, low)
        )
        return tested(metric, *named, where=protocol, published=published)

    if table.protocols:
        sign = 1.0 if better(metric, 1.0, 0.0) else -1.0
        ladder = sorted((name for name in rows if name in figures), key=lambda name: sign * figures[name])
        for low, high in zip(ladder, ladder[1:]):
            yield test(metric, high, low, sign * (figures[high] - figures[low]))
    for high, low in table.hypotheses:
        if high in rows and low in rows:
            for column in table.columns:
                # of data without a cold target there is no figure of these
                if all(column in figures for name in (high, low) for figures in rows[name].result):
                    yield test(column, high, low)
