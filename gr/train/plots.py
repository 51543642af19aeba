"""Pictures of a run: training loss, and the evaluations' metrics over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gr.train.folder import RunFolder


def plot_run(folder: RunFolder, metrics: Sequence[str]) -> Path | None:
    """Draw ``plots/training.png`` (and ``.svg``) from metrics.jsonl, the first two of ``metrics`` that were evaluated
    beside the loss; baselines are dashed lines.  None: no rows."""
    rows = folder.read_metrics()
    train = [r for r in rows if r["kind"] == "train"]
    evaluations = [r for r in rows if r["kind"] == "eval"]
    if not train:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    baselines = {r["name"]: r for r in rows if r["kind"] == "baseline" and r["split"] == "test"}
    names = [name for name in metrics if any(name in row for row in evaluations)][:2]
    figure = Figure(figsize=(4.6 * (1 + len(names)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, *metric_axes = figure.subplots(1, 1 + len(names), squeeze=False)[0]

    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    loss_axes.plot(steps, losses, color="#9db7d5", linewidth=0.8)
    loss_axes.plot(steps, _smooth(losses), color="#1f5a99", linewidth=1.6)
    loss_axes.set(xlabel="step", ylabel="training loss", title="loss (smoothed in dark)")
    for axes, name in zip(metric_axes, names, strict=True):
        for split, color in (("valid", "#d98032"), ("test", "#1f5a99")):
            points = [(r["step"], r[name]) for r in evaluations if r["split"] == split and name in r]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=split)
        for i, (label, row) in enumerate((n, r) for n, r in baselines.items() if name in r):
            axes.axhline(row[name], linestyle=("--", ":", "-.")[i % 3], color="grey", linewidth=1)
            axes.annotate(
                label, (1, row[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8
            )
        axes.set(xlabel="step", title=name.upper())
        if "@" in name:  # a share of hits; AUC begins at a half, a loss nowhere
            axes.set_ylim(0, None)
        if len({r["split"] for r in evaluations}) > 1:
            axes.legend(loc="center right", frameon=False)
    for axes in (loss_axes, *metric_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    folder.plots.mkdir(exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(folder.plots / f"training.{kind}", dpi=130)
        figure.set_layout_engine("none")  # found once, for both
    return folder.plots / "training.png"


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    keep = max(0.0, 1 - 20 / len(values))
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed
