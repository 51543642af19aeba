"""What a person reads: tables on the terminal and a bar plot of the shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.training.shares import PARTS


def show(result: dict[str, Any], console: Console) -> None:
    """The tables of one shape."""
    data, ratio = result["data"], result["ratio"]
    console.print(
        f"\n[bold]{result['shape']['name']}[/bold]  {data['source']}: {data['users']:,} training users, "
        f"{data['mean_inputs']:.1f} inputs on average (at most {result['shape']['length']}), "
        f"{result['shape']['items']:,} items; {result['pairs']} pairs of steps, {result['threads']} threads"
    )
    table = Table("", "ours", "baseline", title="speed and memory", title_justify="left")
    both = [result["sides"][side] for side in ("ours", "baseline")]
    for name, label in (("samples_per_s", "samples/s"), ("tokens_per_s", "real tokens/s")):
        table.add_row(f"{label}  p10 / p50 / p90", *(" / ".join(f"{v:,.0f}" for v in b[name]) for b in both))
    table.add_row("step ms  p50", *(f"{b['step_ms']:,.1f}" for b in both))
    table.add_row("CPU seconds a step  p50", *(f"{b['cpu_s']:,.2f}" for b in both))
    table.add_row("peak memory MiB", *(f"{b['peak_mib']:,.0f}" for b in both))
    table.add_row("  of it the step's own", *(f"{b['step_mib']:,.0f}" for b in both))
    console.print(table)
    table = Table("share of the step", "ours", "ms", "baseline", "ms", title_justify="left")
    for part in PARTS:
        cells = []
        for b in both:
            share = b["profile"]["shares"][part]
            cells += [f"{share:.1%}", f"{share * b['step_ms']:,.1f}"]
        table.add_row(part, *cells)
    console.print(table)
    console.print(
        f"ratio ours / baseline: [bold]{ratio['median']:.2f}x[/bold] "
        f"(min {ratio['min']:.2f}, max {ratio['max']:.2f} over pairs); "
        f"of CPU seconds {result['cpu_ratio']['median']:.2f}x"
    )
    _show_loss(result["loss_alone"], console)


def _show_loss(loss: dict[str, Any], console: Console) -> None:
    table = Table("way", "ms, forward and backward", title_justify="left")
    table.title = f"the loss alone: {loss['targets']:,} targets x {loss['candidates']} candidates"
    for way, ms in loss["ms"].items():
        label = f"ours, auto ({loss['picked']})" if way == "auto" else way
        label = f"ours, forced {way}" if way in ("dense", "gather") else label
        table.add_row(label, f"{ms:,.1f}")
    console.print(table)
    console.print(f"picked {loss['why']}")
    ratio = loss["ratio"]
    console.print(
        f"loss alone, ours / baseline: [bold]{ratio['median']:.2f}x[/bold] "
        f"(min {ratio['min']:.2f}, max {ratio['max']:.2f})"
    )


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Bars of the shares, one a trainer, one panel a shape; a part is named where there is room for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 1, figsize=(8, 1.2 + 1.3 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        sides = {side: result["sides"][side] for side in ("baseline", "ours")}
        for row, side in enumerate(sides.values()):
            left = 0.0
            for colour, part in enumerate(PARTS):
                share = 100 * side["profile"]["shares"][part]
                axis.barh(row, share, left=left, color=f"C{colour}", label=part if row == 0 else None)
                if share >= 4:
                    axis.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center", fontsize=8)
                left += share
        axis.set_yticks([0, 1], [f"{name}\n{side['step_ms']:,.0f} ms" for name, side in sides.items()])
        axis.set_title(
            f"{result['shape']['name']}: {result['ratio']['median']:.1f}x", fontsize=10, loc="left"
        )
        axis.set_xlim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("% of a step")
    axes[0, 0].legend(ncols=len(PARTS), fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
