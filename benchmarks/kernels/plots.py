"""Draws a run: rates over the length where cases differ in it alone, else bars of milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kernels.report import digits

MOST_BARS = 12  # cases


def draw(run: dict[str, Any], file: Path) -> None:
    """Writes the PNG; nothing when no case was timed."""
    import matplotlib

    matplotlib.use("Agg")
    timed = [case for case in run["cases"] if any("both" in way for way in case["ways"])]
    if not timed:
        return
    curves = _curves(timed)
    if curves:
        _lines(run, curves, file)
    else:
        _bars(run, timed[:MOST_BARS], file)


def _curves(cases: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Cases of full length without bias and with the fewest heads, by width, where there are three lengths."""
    full = [case for case in cases if case.get("lengths") == "full" and case.get("bias") == "none"]
    heads = min((case["H"] for case in full), default=0)
    by_width: dict[int, list[dict[str, Any]]] = {}
    for case in sorted(full, key=lambda case: case["N"]):
        if case["H"] == heads:
            by_width.setdefault(case["D"], []).append(case)
    return {width: found for width, found in sorted(by_width.items()) if len(found) >= 3}


def _lines(run: dict[str, Any], curves: dict[int, list[dict[str, Any]]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(curves), figsize=(1 + 4 * len(curves), 6.5), squeeze=False, sharey="row", sharex=True
    )
    ways = list(dict.fromkeys(way["way"] for cases in curves.values() for c in cases for way in c["ways"]))
    ceiling = max(run["ceilings"]["matmul_tflops"].values())
    for column, (width, cases) in enumerate(curves.items()):
        for row, which in enumerate(("forward", "backward")):
            axis = axes[row, column]
            for colour, name in enumerate(ways):
                points = [
                    (case["N"], way[which]["tflops"])
                    for case in cases
                    for way in case["ways"]
                    if way["way"] == name and which in way
                ]
                if points:
                    ours = any(w["way"] == name and w["ours"] for c in cases for w in c["ways"])
                    style = {"marker": "o", "linewidth": 2} if ours else {"marker": ".", "linestyle": "--"}
                    axis.plot(*zip(*points), color=f"C{colour % 10}", label=name, **style)
            axis.axhline(ceiling, color="0.6", linewidth=1)
            axis.text(cases[0]["N"], ceiling, " matmul", color="0.4", fontsize=8, va="bottom")
            axis.set_xscale("log", base=2)
            lengths = [case["N"] for case in cases]
            axis.set_xticks(lengths, [f"{N:,}" for N in lengths], fontsize=8)
            axis.set_ylim(bottom=0)
            axis.set_title(f"{which}, D={width}, H={cases[0]['H']}", fontsize=10, loc="left")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if row == 1:
                axis.set_xlabel("N")
            if column == 0:
                axis.set_ylabel("TFLOP/s")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels())}
    _finish(figure, run, file, handles)


def _bars(run: dict[str, Any], cases: list[dict[str, Any]], file: Path) -> None:
    """Stacked bars, forward and backward, one panel a case, the fastest first."""
    from matplotlib import pyplot

    counts = [sum("both" in way for way in case["ways"]) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases),
        1,
        figsize=(8.5, 1.3 + sum(0.62 + 0.32 * n for n in counts)),
        squeeze=False,
        gridspec_kw={"height_ratios": [0.62 + 0.32 * n for n in counts]},
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        ways = sorted((way for way in case["ways"] if "both" in way), key=lambda w: -w["both"]["ms_p50"])
        best = ways[-1]
        for row, way in enumerate(ways):
            forward, backward = (way.get(which, {}).get("ms_p50", 0.0) for which in ("forward", "backward"))
            axis.barh(row, forward, color="C0", label="forward" if row == 0 else None)
            axis.barh(row, backward, left=forward, color="C1", label="backward" if row == 0 else None)
            text = f" {digits(way['both']['ms_p50'])} ms"
            if way is not best:
                text += f" ({best['both']['speedup_over'][way['way']]:.2f}x)"
            axis.text(forward + backward, row, text, va="center", fontsize=8)
        axis.set_yticks(range(len(ways)), [way["way"] for way in ways], fontsize=8)
        for label, way in zip(axis.get_yticklabels(), ways, strict=True):
            label.set_fontweight("bold" if way["ours"] else "normal")
        axis.set_xlim(0, 1.25 * max(way["both"]["ms_p50"] for way in ways))
        axis.set_title(case["name"], fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    axes[-1, 0].set_xlabel("ms (medians); in brackets: times the fastest")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    _finish(figure, run, file, dict(zip(labels, handles)))


def _finish(figure: Any, run: dict[str, Any], file: Path, handles: dict[str, Any]) -> None:
    from matplotlib import pyplot

    machine = run["environment"]["gpu"] or run["environment"]["cpu"] or "CPU"
    figure.suptitle(f"{run['operator']} on {machine}", x=0.01, ha="left", fontsize=11)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper right",
        ncols=min(5, len(handles)),
        fontsize=8,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97 if len(figure.axes) > 2 else 0.95))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
