"""A sweep for people: a table, a picture, a page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gr.scaling.laws import Fit
from gr.train.sweep.plan import FitSection, SweepConfig
from gr.train.sweep.results import Laws, Row

COLUMNS = ("member", "parameters", "steps", "tokens", "PFLOP-days")
COLOURS = ("#1f5a99", "#d98032", "#3a8f5c", "#8a4f9e")


def quantity(fit: FitSection) -> str:
    """What the law is of, in words."""
    if fit.of == "loss":
        return f"training loss (last {fit.share:.0%} of the steps)"
    return f"1 - {fit.of} (test)"


def table(sweep: SweepConfig, rows: Sequence[Row]) -> list[list[str]]:
    """The members, a heading first."""
    found = [[*COLUMNS, quantity(sweep.fit)]]
    for row in rows:
        if row.why:
            found.append([row.name, "", "", "", "", f"failed: {row.why}"])
            continue
        figures = [f"{row.parameters:,}", f"{row.steps:,}", f"{row.tokens:,}", f"{row.pflop_days:.3e}"]
        found.append([row.name, *figures, f"{row.value:.4f}"])
    return found


def law_lines(law: Laws) -> list[str]:
    """A family's laws in sentences."""
    lines = []
    for kind, fit in law.compute.items():
        mark = " (lower AICc)" if fit is law.chosen and len(law.compute) > 1 else ""
        lines.append(f"L(C) {kind}{mark}, {len(law.fitted)} members: {_fit(fit)}")
    if law.size_and_data is not None:
        lines.append(f"L(N, D): {_fit(law.size_and_data)}")
    if law.optima:
        last = law.optima[-1]
        lines.append(
            f"by L(N, D), {last.compute:.3g} operations are best spent on {last.parameters:,.0f} parameters and "
            f"{last.tokens:,.0f} tokens (loss {last.loss:.4f})"
        )
    for held in law.held_out:
        p = held.predicted
        lines.append(
            f"{held.name}, held out: predicted {p.value:.4f} ({p.low:.4f} to {p.high:.4f}), measured "
            f"{held.measured:.4f}, {'inside' if held.inside else 'outside'}"
        )
    return [*lines, *law.why]


def _fit(fit: Fit) -> str:
    ends = fit.intervals
    coefficients = [
        f"{n} = {v:.4g} [{ends[n][0]:.4g}, {ends[n][1]:.4g}]" for n, v in fit.coefficients.items()
    ]
    return f"{', '.join(coefficients)}; R² {fit.r2:.4f}, AIC {fit.aic:.1f}, AICc {fit.aicc:.1f}"


def show(sweep: SweepConfig, rows: Sequence[Row], laws: Sequence[Laws]) -> None:
    heading, *lines = table(sweep, rows)
    view = Table(title="sweep", title_justify="left")
    for i, name in enumerate(heading):
        view.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for line in lines:
        view.add_row(*line)
    console = Console()
    console.print(view)
    for law in laws:
        for sentence in law_lines(law):
            console.print(f"{law.family}: {sentence}", highlight=False, markup=False)


def plot(sweep: SweepConfig, rows: Sequence[Row], laws: Sequence[Laws], folder: Path) -> Path | None:
    """Draw ``scaling.png`` and ``scaling.svg``; None where no member finished."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    if not any(not row.why for row in rows):
        return None
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for law, colour in zip(laws, [COLOURS[i % len(COLOURS)] for i in range(len(laws))]):
        done = [row for row in rows if row.family == law.family and not row.why]
        held = {h.name: h for h in law.held_out}
        for kind, face, chosen in (
            ("members", "none", [r for r in done if r.name not in law.fitted and r.name not in held]),
            ("fitted", colour, [r for r in done if r.name in law.fitted]),
            ("held out", "white", [r for r in done if r.name in held]),
        ):
            if chosen:
                axes.scatter(
                    [r.pflop_days for r in chosen],
                    [r.value or 0.0 for r in chosen],
                    marker="D" if kind == "held out" else "o",
                    s=28,
                    facecolors=face,
                    edgecolors=colour,
                    label=f"{law.family}: {kind}",
                    zorder=3,
                )
        if (fit := law.chosen) is not None:
            _draw_law(axes, fit, [row.pflop_days for row in done], law, colour)
    axes.set(xscale="log", yscale="log", xlabel="training compute, PFLOP-days", ylabel=quantity(sweep.fit))
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"scaling.{kind}", dpi=130)
        figure.set_layout_engine("none")  # found once, for both
    return folder / "scaling.png"


def _draw_law(axes, fit: Fit, computes: Sequence[float], law: Laws, colour: str) -> None:
    places = np.geomspace(min(computes), max(computes) * 2, 100)
    kind = next(kind for kind, found in law.compute.items() if found is fit)
    exponent = f"{fit.coefficients['alpha']:.3f}"
    axes.plot(
        places, fit.loss(places), color=colour, linewidth=1.4, label=f"{law.family}: {kind}, α = {exponent}"
    )
    low, high = fit.band(places)
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    for held in law.held_out:
        p = held.predicted
        axes.errorbar(
            held.pflop_days,
            p.value,
            [[p.value - p.low], [p.high - p.value]],
            color=colour,
            capsize=3,
            linewidth=1,
        )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
.wide {{ overflow-x: auto; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<p>Fitted: {quantity}. Intervals are 95 %, of a bootstrap over residuals; C is in PFLOP-days.</p>
{picture}
<h2>Laws</h2>
{laws}
<h2>Members</h2>
<div class="wide"><table>{members}</table></div>
</body></html>
"""


def page(sweep: SweepConfig, rows: Sequence[Row], laws: Sequence[Laws], folder: Path, title: str) -> Path:
    """Write ``report.html``, with the picture of ``plot`` inside."""
    svg = folder / "scaling.svg"
    picture = svg.read_text() if svg.is_file() else ""
    heading, *lines = table(sweep, rows)
    members = _line("th", heading) + "".join(_line("td", line) for line in lines)
    laws_in_words = "".join(
        f"<h3>{html.escape(law.family)}</h3><ul>"
        + "".join(f"<li>{html.escape(line)}</li>" for line in law_lines(law))
        + "</ul>"
        for law in laws
    )
    content = PAGE.format(
        title=html.escape(title),
        quantity=html.escape(quantity(sweep.fit)),
        picture=picture[picture.find("<svg") :] if picture else "<p>No member has finished.</p>",
        laws=laws_in_words,
        members=members,
    )
    (folder / "report.html").write_text(content, encoding="utf-8")
    return folder / "report.html"


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
