"""Rebuilding a published table: prepare the data, train every row, print published beside measured.

A table is configs/DATASET/table.yaml.  Each row trains in a process of its own; a finished run is not repeated, an
interrupted one goes on.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.config import Section, load, read_yaml
from gr.errors import UserError, nearest
from gr.train import checkpoint
from gr.train.folder import RunFolder
from gr.train.job import differences, within
from gr.train.selection import best_validation

ROOT = Path(__file__).resolve().parents[2]
NOT_THE_RESULT = (
    *(
        "run",
        "data.path",
        "data.prefetch",
        "checkpoint",
        "log",
        "eval.batch",
        "eval.max_scores",
        "eval.buckets",
    ),
    *("train.device", "train.threads", "train.kernels", "train.micro_batch_actions"),
)
"""Keys in which a run that is there may differ from the one asked for."""


class Row(Section):
    """A model of the table.  ``valid``: its own protocol holds a validation action out and lets it choose the epoch."""

    name: str
    config: str
    published: dict[str, float]
    source: str
    valid: bool = False


class PublishedTable(Section):
    """``options``: of a generated dataset.  ``oracle``: also print each row's share of the oracle's metric."""

    dataset: str
    columns: list[str]
    rows: list[Row]
    options: dict[str, Any] = {}
    oracle: bool = False


@dataclass
class Measured:
    """One row's evaluations, a value a seed: at the last epoch, and at the one that validation chose."""

    row: Row
    last: list[dict[str, Any]] = field(default_factory=list)
    chosen: list[dict[str, Any]] = field(default_factory=list)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)

    def add(self, rows: list[dict[str, Any]], chosen_only: bool = False) -> None:
        """Take a finished run's metrics in."""
        tests = {r["step"]: r for r in rows if r["kind"] == "eval" and r["split"] == "test"}
        if not chosen_only:
            self.last.append(tests[max(tests)])
            self.digests.append([r["data_digest"] for r in rows if r["kind"] == "train"][-1])
        if (best := best_validation(rows)) is not None:
            self.chosen.append(tests[best["step"]])
        self.baselines.update(
            {r["name"]: r for r in rows if r["kind"] == "baseline" and r["split"] == "test"}
        )


def table_names() -> list[str]:
    return sorted(p.parent.name for p in (ROOT / "configs").glob("*/table.yaml"))


def read_table(dataset: str) -> PublishedTable:
    file = ROOT / "configs" / dataset / "table.yaml"
    if not file.is_file():
        raise UserError(f"no published table for '{dataset}': {nearest(dataset, table_names())}")
    return PublishedTable.model_validate(read_yaml(file))


def reproduce(
    dataset: str,
    source: str | None,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    processes: int = 1,
    out: str = "runs/reproduce",
    data: str | None = None,
    selection: bool = True,
    overrides: Sequence[str] = (),
) -> list[Measured]:
    """Prepare ``dataset`` and train the rows (all of them, or those whose config is named) for every seed."""
    table = read_table(dataset)
    chosen = [r for r in table.rows if not rows or Path(r.config).stem in rows]
    for name in rows:
        if name not in [Path(r.config).stem for r in table.rows]:
            raise UserError(f"no row '{name}': {nearest(name, (Path(r.config).stem for r in table.rows))}")
    path = data or f"data/{dataset}"
    if not (Path(path) / "manifest.json").is_file():
        _prepare(table, source, path)
    measured = []
    for row in chosen:
        result = Measured(row)
        for seed in seeds:
            stem = f"{out}/{dataset}/{Path(row.config).stem}-seed{seed}"
            base = [f"data.path={path}", f"train.seed={seed}", *overrides]
            if table.oracle:
                base.append("eval.baselines=[popularity, last_item, oracle]")
            result.add(_train(dataset, row, stem, base, processes))
            if selection and not row.valid and not table.oracle:
                extra = [*base, "data.split.holdout=2", "eval.splits=[valid, test]"]
                result.add(_train(dataset, row, f"{stem}-holdout2", extra, processes), chosen_only=True)
        measured.append(result)
    return measured


def print_table(table: PublishedTable, measured: Sequence[Measured]) -> None:
    """Published beside measured; means over seeds, with the spread where there are several."""
    view = Table(title=f"{table.dataset}: published beside measured", title_justify="left")
    view.add_column("model, epoch")
    for column in table.columns:
        view.add_column(column, justify="right")
    for result in measured:
        view.add_row(
            f"[bold]{result.row.name}[/] published",
            *(_number(result.row.published.get(c)) for c in table.columns),
        )
        for label, rows in (("last epoch", result.last), ("chosen on valid", result.chosen)):
            if rows:
                epochs = "/".join(str(r["epoch"] + 1) for r in rows)
                view.add_row(f"  {label} ({epochs})", *(_spread([r[c] for r in rows]) for c in table.columns))
        if table.oracle:
            oracle = result.baselines["oracle"]
            shares = [statistics.mean(r[c] for r in result.last) / oracle[c] for c in table.columns]
            view.add_row("  share of the oracle", *(f"{s:.1%}" for s in shares))
        view.add_section()
    for name, row in (measured[0].baselines if measured else {}).items():
        view.add_row(name, *(_number(row[c]) for c in table.columns))
    console = Console()
    console.print(view)
    for result in measured:
        digests = ", ".join(dict.fromkeys(result.digests))
        console.print(
            f"{result.row.name}: data digest {digests}; published: {result.row.source}", highlight=False
        )


def _prepare(table: PublishedTable, source: str | None, path: str) -> None:
    command = [sys.executable, str(ROOT / "launch/prepare.py"), table.dataset, "--out", path]
    if source is not None:
        command += ["--source", source]
    for key, value in table.options.items():
        command += ["--set", f"{key}={value}"]
    if subprocess.run(command).returncode:
        raise UserError(f"preparing '{table.dataset}' failed (see above): give its raw files with --source")


def _train(
    dataset: str, row: Row, folder: str, overrides: Sequence[str], processes: int
) -> list[dict[str, Any]]:
    """Metrics of the finished run in ``folder``: trained now, gone on with, or there already."""
    run = RunFolder(folder)
    config = ROOT / "configs" / dataset / row.config
    arguments = ["--config", str(config), f"run.dir={folder}", *overrides]
    if run.config.is_file():
        arguments = ["--resume", folder]
        for key, found, wanted in differences(load(run.config), load(config, overrides)):
            if not within(key, NOT_THE_RESULT):
                raise UserError(
                    f"'{folder}' is there and was trained with {key}={found}, not {wanted}: choose another --out, "
                    "or move that run away"
                )
    newest = checkpoint.newest(run.checkpoints)
    if newest is None or not checkpoint.read_state(newest)["cursor"]["finished"]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        print(f"\n{row.name}: {folder}", flush=True)
        if subprocess.run([*launcher, str(ROOT / "launch/train.py"), *arguments]).returncode:
            raise UserError(f"training '{row.name}' failed (see above); run the same command again to go on")
        newest = checkpoint.newest(run.checkpoints)
        if newest is None or not checkpoint.read_state(newest)["cursor"]["finished"]:
            raise UserError(f"training '{row.name}' was stopped; run the same command again to go on")
    return run.read_metrics()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else "")
