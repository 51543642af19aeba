"""Results of evaluations as tables for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from gr.eval.evaluator import EvalResult


def results_table(results: Mapping[str, EvalResult], title: str) -> Table:
    """Two rows a scorer, HR and NDCG, a column for each k, and MRR; the users in the caption."""
    first = next(iter(results.values()))
    ks = [name.removeprefix("hr") for name in first.metrics if name.startswith("hr@")]
    table = Table(
        title=title,
        title_justify="left",
        caption=_caption(first),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # six k and MRR beside a long name fit 80 columns
    )
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in (*ks, "mrr"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, result in results.items():
        for kind, mrr in (("hr", f"{result.metrics['mrr']:.4f}"), ("ndcg", "")):
            values = (f"{result.metrics[kind + k]:.4f}" for k in ks)
            table.add_row(label if mrr else "", kind, *values, mrr)
    return table


def buckets_tables(result: EvalResult, label: str) -> list[Table]:
    """One table a breakdown: a row a bucket."""
    titles = {
        "history": f"{label}, by actions in the user's history",
        "popularity": f"{label}, by training actions of the target item",
    }
    shown = [name for name in ("hr@10", "ndcg@10", "hr@50", "hr@200") if name in result.metrics]
    tables = []
    for name, buckets in result.buckets.items():
        table = Table(title=titles.get(name, f"by {name}"), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("actions", no_wrap=True)
        for heading in ("users", *shown, "mrr"):
            table.add_column(heading, justify="right", no_wrap=True)
        for bucket in buckets:
            values = (f"{bucket[metric]:.4f}" for metric in (*shown, "mrr"))
            table.add_row(_range(bucket["from"], bucket["to"]), f"{bucket['users']:,}", *values)
        tables.append(table)
    return tables


def _caption(result: EvalResult) -> str:
    subset = "" if result.population in (None, result.users) else f" of {result.population:,}"
    return f"{result.users:,} users{subset}, {result.heading}"


def _range(low: int, top: int | None) -> str:
    if top is None:
        return f"{low:,} and more"
    return f"{low:,}" if top == low else f"{low:,} to {top:,}"
