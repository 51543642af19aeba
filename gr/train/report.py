"""The end of a run, for the person who started it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gr.train.job import RunResult
from gr.train.selection import best_validation


def final_rows(result: RunResult) -> dict[str, dict[str, Any]]:
    """Evaluations worth reporting: the baselines, the last epoch, and the epoch that the validation split chose."""
    rows = {f"{r['split']}, {r['name']}": r for r in result.metrics if r["kind"] == "baseline"}
    evaluations = [r for r in result.metrics if r["kind"] == "eval"]
    if not evaluations:
        return rows
    for split in dict.fromkeys(r["split"] for r in evaluations):
        rows[f"{split}, last epoch"] = result.evaluation(split)
    best = best_validation(result.metrics, result.selection)
    if best is not None:
        for split in dict.fromkeys(r["split"] for r in evaluations):
            rows[f"{split}, best on valid"] = result.evaluation(split, step=best["step"])
    return rows


def print_result(result: RunResult) -> None:
    """The final table, where things are, and what to do next."""
    if not result.finished:
        print(f"stopped and saved; go on with: python -m gr train --resume {result.path}")
        return
    # without lines between columns, so that names aren't broken where a terminal has 80
    table = Table(
        title=Text(str(result.path)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("")
    table.add_column("epoch", justify="right")
    for name in result.shown:
        table.add_column(name, justify="right")
    for label, row in final_rows(result).items():
        epoch = str(row["epoch"] + 1) if row["kind"] == "eval" else ""
        table.add_row(label, epoch, *(f"{row[name]:.4f}" if name in row else "" for name in result.shown))
    Console().print(table)
    digests = [r["data_digest"] for r in result.metrics if r["kind"] == "train"]
    # plain lines: a console would break long paths, which are there to be copied
    if digests:
        print(f"data digest {digests[-1]}")
    if (picture := result.path / "plots" / "training.png").is_file():
        print(f"plot     {picture}")
    print(f"metrics  {result.path / 'metrics.jsonl'}")
    print(f"next     python -m gr evaluate --run {result.path} --split test")
    if result.model == "retrieval":
        print(f"         python -m gr recommend --run {result.path} --users all --k 100 --out recs.parquet")
