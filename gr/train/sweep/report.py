"""A sweep for people: tables, and a page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gr.scaling.laws import Fit
from gr.train.sweep.figures import in_words
from gr.train.sweep.plan import TRAINING, SweepConfig
from gr.train.sweep.results import Laws, Row

COLUMNS = ("member", "parameters", "steps", "tokens", "PFLOP-days")
LAW_COLUMNS = ("family", "law", "points", "coefficients, with 95 % intervals", "R²", "AIC", "AICc")
HELD_COLUMNS = ("family", "held out", "PFLOP-days", "predicted", "95 % interval", "± %", "measured", "")


def table(sweep: SweepConfig, rows: Sequence[Row], *, reasons: bool = True) -> list[list[str]]:
    """The members, a heading first.  reasons: with why members failed."""
    names = list(dict.fromkeys((sweep.fit.of, *sweep.fit.also, TRAINING)))
    found = [[*COLUMNS, *(name.replace("_", " ") for name in names)]]
    for row in rows:
        if row.why:
            failed = f"failed: {row.why}" if reasons else "failed"
            found.append([row.name, *[""] * (len(COLUMNS) - 1), failed, *[""] * (len(names) - 1)])
            continue
        figures = [f"{row.parameters:,}", f"{row.steps:,}", f"{row.tokens:,}", f"{row.pflop_days:.3e}"]
        found.append([row.name, *figures, *(f"{row.measured[name]:.4f}" for name in names)])
    return found


def law_table(laws: Sequence[Laws]) -> list[list[str]]:
    """The fits of one quantity, a heading first; the one that predicts is marked."""
    found = [list(LAW_COLUMNS)]
    for law in laws:
        for kind, fit in law.compute.items():
            mark = " *" if fit is law.chosen and len(law.compute) > 1 else ""
            found.append([law.family, f"L(C) {kind}{mark}", str(len(law.fitted)), *_figures(fit)])
        if law.size_and_data is not None:
            fit = law.size_and_data
            found.append([law.family, "L(N, D)", str(len(fit.residuals_M)), *_figures(fit)])
    return found


def held_table(laws: Sequence[Laws]) -> list[list[str]]:
    """Predictions of one quantity, a heading first."""
    found = [list(HELD_COLUMNS)]
    for law in laws:
        for held in law.held_out:
            p = held.predicted
            interval = f"{p.low:.4f} to {p.high:.4f}"
            where = "inside" if held.inside else "outside"
            found.append(
                [
                    *(law.family, held.name, f"{held.pflop_days:.3e}", f"{p.value:.4f}", interval),
                    *(f"{held.percent:.1f}", f"{held.measured:.4f}", where),
                ]
            )
    return found


def sentences(law: Laws) -> list[str]:
    """What else there is to say of a family."""
    found = []
    if law.best_size is not None:
        k, a = law.best_size
        found.append(f"curves of equal compute: the best size grows with C^{a:.2f}, N* = {k:.3g} C^{a:.3f}")
    edges = [v for v in law.valleys if not v.inside]
    if edges:
        budgets = ", ".join(f"{v.compute:.3g}" for v in edges)
        found.append(f"the best size lies beyond those that were trained at {budgets} operations")
    if law.optima:
        last = law.optima[-1]
        found.append(
            f"by L(N, D), {last.compute:.3g} operations are best spent on {last.parameters:,.0f} parameters and "
            f"{last.tokens:,.0f} tokens ({last.loss:.4f})"
        )
    return [*found, *law.why]


def _figures(fit: Fit) -> list[str]:
    ends = fit.intervals
    coefficients = ", ".join(
        f"{n} = {v:.4g} [{ends[n][0]:.4g}, {ends[n][1]:.4g}]" for n, v in fit.coefficients.items()
    )
    return [coefficients, f"{fit.r2:.4f}", f"{fit.aic:.1f}", f"{fit.aicc:.1f}"]


def show(sweep: SweepConfig, rows: Sequence[Row], laws: Sequence[Laws]) -> None:
    """Tables on the terminal; why members failed stands beneath theirs, each reason once."""
    console = Console()
    console.print(_view("sweep", table(sweep, rows, reasons=False)))
    for why in dict.fromkeys(row.why for row in rows if row.why):
        failed = [row.name for row in rows if row.why == why]
        more = f" and {len(failed) - 4} more" if len(failed) > 4 else ""
        said = f"{', '.join(failed[:4])}{more} failed: {why}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    for title, group in _by_quantity(sweep, rows, laws):
        for name, lines in ((title, law_table(group)), (f"{title}: predictions", held_table(group))):
            if len(lines) > 1:
                console.print(_view(name, lines))
        for law in group:
            for sentence in sentences(law):
                console.print(f"{law.family}: {sentence}", highlight=False, markup=False)


def _by_quantity(
    sweep: SweepConfig, rows: Sequence[Row], laws: Sequence[Laws]
) -> list[tuple[str, list[Laws]]]:
    """(what the laws are of, the families' laws)."""
    return [
        (in_words(quantity, rows, sweep.fit.share), [law for law in laws if law.quantity == quantity])
        for quantity in dict.fromkeys(law.quantity for law in laws)
    ]


def _view(title: str, lines: Sequence[Sequence[str]]) -> Table:
    view = Table(title=title, title_justify="left")
    for i, name in enumerate(lines[0]):
        view.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for line in lines[1:]:
        view.add_row(*line)
    return view


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin-bottom: .2rem; }} h2 {{ margin-top: 2.2rem; }} p {{ max-width: 60rem; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
th {{ border-bottom-color: #888; }}
th:first-child, td:first-child {{ text-align: left; white-space: nowrap; }}
.wide {{ overflow-x: auto; margin: .6rem 0; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<p>C is in PFLOP-days. Intervals are 95 %, of a bootstrap over residuals. Filled points are those that the laws are
fitted to, rings are the other members; a diamond was held out, and the bar beside it is its predicted interval.
Of two laws the one with the lower AICc is drawn and predicts (*).</p>
{scaling}
{laws}
{curves}
{residuals}
<h2>Members</h2>
{members}
</body></html>
"""


def page(
    sweep: SweepConfig,
    rows: Sequence[Row],
    laws: Sequence[Laws],
    pictures: Sequence[Path],
    folder: Path,
    title: str,
) -> Path:
    """Write ``report.html``, with the ``pictures`` (SVG) inside."""
    drawn = {file.stem: _picture(file) for file in pictures}
    parts = []
    for words, group in _by_quantity(sweep, rows, laws):
        parts.append(f"<h2>{html.escape(words[0].upper() + words[1:])}</h2>")
        parts += [_table(lines) for lines in (law_table(group), held_table(group)) if len(lines) > 1]
        said = [f"{law.family}: {sentence}" for law in group for sentence in sentences(law)]
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in said) + "</ul>")
    content = PAGE.format(
        title=html.escape(title),
        scaling=drawn.get("scaling", "<p>No member has finished.</p>"),
        laws="\n".join(parts),
        curves=_section("Curves of equal compute", drawn.get("equal-compute")),
        residuals=_section("What the laws leave", drawn.get("residuals")),
        members=_table(table(sweep, rows)),
    )
    (folder / "report.html").write_text(content, encoding="utf-8")
    return folder / "report.html"


def _section(title: str, picture: str | None) -> str:
    return f"<h2>{title}</h2>\n{picture}" if picture else ""


def _picture(file: Path) -> str:
    text = file.read_text()
    return text[text.find("<svg") :]


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = _line("th", lines[0]) + "".join(_line("td", line) for line in lines[1:])
    return f'<div class="wide"><table>{rows}</table></div>'


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
