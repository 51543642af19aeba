"""A sweep in pictures: its laws against compute, its curves of equal compute, what the laws leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gr.scaling.laws import Fit
from gr.train.selection import falls
from gr.train.sweep.plan import TRAINING, SweepConfig
from gr.train.sweep.results import Laws, Quantity, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5a99", "#d98032", "#3a8f5c", "#8a4f9e")
COMPUTE = "training compute, PFLOP-days"
PANEL = (6.4, 4.4)


def in_words(quantity: Quantity, rows: Sequence[Row], share: float) -> str:
    """What a law is of."""
    above = f", above {quantity.floor:.4g}" if quantity.floor else ""
    if quantity.metric == TRAINING:
        objectives = " or ".join(sorted({row.objective for row in rows if row.objective}))
        return f"training loss ({objectives}; last {share:.0%} of the steps){above}"
    if quantity.metric == "loss":
        return f"held-out loss, whole catalogue{above}"
    return f"test {quantity.metric}" if falls(quantity.metric) else f"1 - test {quantity.metric}"


def draw(sweep: SweepConfig, rows: Sequence[Row], laws: Sequence[Laws], folder: Path) -> list[Path]:
    """``scaling``, ``equal-compute`` and ``residuals``, each as PNG and SVG, as far as there is something to show; the
    SVGs."""
    done = [row for row in rows if not row.why]
    if not done:
        return []
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sweep.families)}
    quantities = list(dict.fromkeys(law.quantity for law in laws))
    of = {quantity: [law for law in laws if law.quantity == quantity] for quantity in quantities}
    words = {quantity: in_words(quantity, done, sweep.fit.share) for quantity in quantities}

    figure, panels = _figure(len(quantities))
    for axes, quantity in zip(panels, quantities):
        for law in of[quantity]:
            _scaling(axes, law, [row for row in done if row.family == law.family], colours[law.family])
        _logarithmic(axes, COMPUTE, words[quantity])
    found = [_save(figure, folder, "scaling")]

    curved = [law for law in of[quantities[0]] if law.valleys]
    if curved:
        figure, panels = _figure(len(curved))
        for axes, law in zip(panels, curved):
            _equal_compute(axes, law, [row for row in done if row.family == law.family])
            _logarithmic(axes, "parameters of the encoder", words[quantities[0]])
            axes.set_title(law.family, fontsize=10)
        found.append(_save(figure, folder, "equal-compute"))

    # what is above a known floor, where there is one: that is the law that predicts best
    last = [quantity for quantity in quantities if quantity.metric == sweep.fit.of][-1]
    fitted = [law for law in of[last] if law.chosen is not None]
    if fitted:
        figure, panels = _figure(1, height=3.2)
        for law in fitted:
            _residuals(panels[0], law, colours[law.family])
        panels[0].axhline(0, color="#888", linewidth=0.8, zorder=1)
        panels[0].set(xscale="log", xlabel=COMPUTE, ylabel="measured over the law, %")
        panels[0].set_title(words[last], fontsize=10)
        _tidy(panels[0])
        found.append(_save(figure, folder, "residuals"))
    return found


def _scaling(axes: Axes, law: Laws, rows: Sequence[Row], colour: str) -> None:
    """Members, the points that were fitted, the law with its band, and held-out points with their predictions."""
    fit = law.chosen
    axes.scatter(
        [row.pflop_days for row in rows],
        [law.quantity.of(row) for row in rows],
        label=None if fit is not None else f"{law.family}: too few points for a law",
        s=14,
        facecolors="none",
        edgecolors=colour,
        alpha=0.5,
        linewidths=0.8,
        zorder=2,
    )
    if law.fitted:
        places, values = zip(*((p.pflop_days, p.value) for p in law.fitted))
        axes.scatter(places, values, s=26, color=colour, zorder=4)
    if fit is None:
        return
    computes = [row.pflop_days for row in rows]
    across = np.geomspace(min(computes), max(computes) * 2, 100)
    axes.plot(across, fit.loss(across), color=colour, linewidth=1.4, label=f"{law.family}: {_law(law, fit)}")
    low, high = fit.band(across)
    axes.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
    for held in law.held_out:
        p = held.predicted
        axes.errorbar(
            held.pflop_days,
            p.value,
            [[p.value - p.low], [p.high - p.value]],
            color=colour,
            capsize=4,
            linewidth=1.2,
            zorder=3,
        )
        axes.scatter(
            held.pflop_days, held.measured, marker="D", s=34, facecolors="white", edgecolors=colour, zorder=5
        )


def _law(law: Laws, fit: Fit) -> str:
    low, high = fit.intervals["alpha"]
    floor = f", E = {fit.coefficients['E']:.3g}" if fit.floor else ""
    return f"α = {fit.coefficients['alpha']:.3f} [{low:.3f}, {high:.3f}]{floor}, R² {fit.r2:.3f}"


def _equal_compute(axes: Axes, law: Laws, rows: Sequence[Row]) -> None:
    """A budget a colour, from the smallest (dark) to the largest: its members, its parabola and the lowest point."""
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0, 0.9, len(law.valleys)))
    for valley, shade in zip(law.valleys, shades):
        same = [row for row in rows if row.values.get("flops") == valley.compute]
        axes.scatter(
            [row.parameters or 0 for row in same],
            [law.quantity.of(row) for row in same],
            s=18,
            color=shade,
            zorder=3,
        )
        across = np.geomspace(valley.sizes[0] / 1.2, valley.sizes[1] * 1.2, 60)
        axes.plot(
            across, valley.at(across), color=shade, linewidth=1.1, label=f"{valley.compute:.2g} operations"
        )
        if valley.inside:
            axes.scatter(
                valley.parameters, valley.loss, marker="*", s=70, color=shade, edgecolors="white", zorder=4
            )


def _residuals(axes: Axes, law: Laws, colour: str) -> None:
    fit = law.chosen
    assert fit is not None
    axes.scatter(
        [point.pflop_days for point in law.fitted],
        100 * np.expm1(fit.residuals_M),
        s=24,
        color=colour,
        label=law.family,
        zorder=3,
    )
    for held in law.held_out:
        p = held.predicted
        axes.errorbar(
            held.pflop_days,
            0,
            [[100 * (1 - p.low / p.value)], [100 * (p.high / p.value - 1)]],
            color=colour,
            capsize=4,
            linewidth=1.2,
        )
        off = 100 * (held.measured / p.value - 1)
        axes.scatter(held.pflop_days, off, marker="D", s=34, facecolors="white", edgecolors=colour, zorder=4)


def _figure(panels: int, height: float = PANEL[1]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    columns = min(panels, 2)
    lines = -(-panels // columns)
    figure = Figure(figsize=(PANEL[0] * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for spare in axes[panels:]:
        spare.set_visible(False)
    return figure, axes[:panels]


def _logarithmic(axes: Axes, below: str, beside: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=below, ylabel=beside)
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(_plain)
    axes.yaxis.set_tick_params(which="both", labelsize=8)
    _tidy(axes)


def _plain(value: float, _: Any) -> str:
    return f"{value:.3g}"


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _save(figure: Figure, folder: Path, name: str) -> Path:
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=110)
        figure.set_layout_engine("none")  # found once, for both
    return folder / f"{name}.svg"
