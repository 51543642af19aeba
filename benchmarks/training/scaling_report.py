"""What a person reads of steps shared out to processes: a table a number of them, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], console: Console) -> None:
    """The table of one number of processes."""
    shape = result["shape"]
    several = result["processes"] > 1
    console.print(
        f"\n[bold]{result['processes']} processes[/bold]  {shape['name']}: {shape['items']:,} items x {shape['dim']}, "
        f"{shape['batch']} sequences a step; {result['rounds']} rounds, {result['device']}, "
        f"{result['threads']} threads a process"
    )
    table = Table(
        "table, engine",
        "samples/s p10 / p50 / p90",
        "tokens/s",
        "step",
        "exposed ms\nmean, least",
        "CPU ms",
        "peak MiB\n(added)",
        "MiB of table\n+ moments",
        "view KiB sent\n(least)",
    )
    for name, case in result["cases"].items():
        exposed = f"{case['exposed_ms']:.1f}, {case['exposed_least_ms']:.1f}" if several else "-"
        least = case["view_least_bytes"]
        sent = f"{case['view_sent_bytes'] / 2**10:,.1f} ({least / 2**10:,.1f})" if least else "-"
        table.add_row(
            name,
            " / ".join(f"{v:,.0f}" for v in case["samples_per_s"]),
            f"{case['tokens_per_s'][1]:,.0f}",
            f"x {case['ratio']['median']:.2f}",
            exposed,
            f"{case['cpu_ms']:,.0f} (x {case['cpu_ratio']:.2f})",
            f"{max(case['peak_mib']):,.0f} ({max(case['added_mib']):,.0f})",
            f"{max(case['table_bytes']) / 2**20:,.2f} + {max(case['moment_bytes']) / 2**20:,.2f}",
            sent,
        )
    console.print(table)
    console.print(
        "step: its time beside the first case's in the same round, median. exposed: waits for exchanges, mean over\n"
        "ranks and the least rank's. CPU: of all processes, and beside the first case's. peak, table, moments: the\n"
        "rank that has most. view: a rank's mean."
    )


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """A panel a number of processes: each case's step, and what of it is exposed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = sum(len(result["cases"]) for result in results)
    heights = [len(result["cases"]) for result in results]
    figure, axes = pyplot.subplots(
        len(results), 1, figsize=(8, 1.2 + 0.32 * bars + 0.5 * len(results)), squeeze=False,
        sharex=True, height_ratios=heights,
    )  # fmt: skip
    for axis, result in zip(axes[:, 0], results, strict=True):
        names = list(result["cases"])[::-1]
        for row, name in enumerate(names):
            case = result["cases"][name]
            exposed = case["exposed_ms"] if result["processes"] > 1 else 0.0
            axis.barh(row, case["step_ms"] - exposed, color="C0", label="compute" if not row else None)
            axis.barh(
                row, exposed, left=case["step_ms"] - exposed, color="C1",
                label="exposed communication" if not row else None,
            )  # fmt: skip
            axis.text(case["step_ms"], row, f" {case['samples_per_s'][1]:,.0f}/s", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        many = "process" if result["processes"] == 1 else "processes"
        axis.set_title(f"{result['processes']} {many}, {result['shape']['name']}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[-1, 0].set_xlabel("ms a step (median), and samples/s")
    axes[0, 0].legend(ncols=2, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
