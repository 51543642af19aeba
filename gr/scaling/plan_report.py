"""Plans for people: tables, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from gr.embeddings.torchrec_plan import TablePlan
from gr.scaling.plan import Plan

GIB = 2**30
DRAWN = 12
"""Plans that a picture has room for."""
COLOURS = (
    "#1f5a99",
    "#9db7d5",
    "#d98032",
    "#f0c49a",
    "#3b7d4f",
    "#a9cdb4",
    "#7a4d8c",
    "#c9b1d4",
    "#8c8c8c",
    "#b02a2a",
)


def shown(plans: Sequence[Plan], tokens: float | None, price: float | None) -> Group:
    """One plan in full; of several a line each, and the first in full."""
    first = plans[0]
    parts: list[Table | None] = [_grid(plans, tokens, price)] if len(plans) > 1 else []
    parts += [_tables(first), _memory(first), _exchanges(first), _step(first, tokens, price)]
    return Group(*[part for part in parts if part is not None])


def _grid(plans: Sequence[Plan], tokens: float | None, price: float | None) -> Table:
    names = list(plans[0].settings)
    table = Table(
        title=f"{len(plans)} plans, best first", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in names:
        table.add_column(name, justify="right")
    headings = ["GiB", "ms", "bound", "M tokens/s", "MFU"]
    headings += ["days"] if tokens else []
    headings += ["cost"] if tokens and price is not None else []
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "bound" else "right")
    for plan in plans:
        row = [str(plan.settings[name]) for name in names]
        row += [f"{plan.memory.peak / GIB:,.1f}" + ("" if plan.fits else " (too much)")]
        row += [f"{1e3 * plan.time.seconds:,.1f}", plan.time.bound]
        row += [f"{plan.tokens_per_second / 1e6:,.2f}", f"{plan.mfu:.1%}"]
        if tokens:
            budget = plan.budget(tokens, price)
            row += [f"{budget['days']:,.2f}", *([f"{budget['cost']:,.0f}"] if "cost" in budget else [])]
        table.add_row(*row)
    return table


def _title(plan: Plan) -> str:
    given = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    return f"{plan.processes} x {plan.machine.name}" + (f" ({given})" if given else "")


def _tables(plan: Plan) -> Table | None:
    if not plan.tables:
        return None
    table = Table(title=f"tables on {_title(plan)}, by TorchRec's planner", title_justify="left")
    for heading in ("table", "rows x columns", "cut", "processes", "rows each", "GiB", "moments"):
        table.add_column(heading, justify="left" if heading in ("table", "cut") else "right")
    for cut in plan.tables:
        table.add_row(*_cut(cut))
    return table


def _cut(cut: TablePlan) -> list[str]:
    parts = [part for part in cut.held if part.rows and part.columns]
    largest = max(parts, key=lambda part: sum(cut.bytes_of(part)))
    weights, moments = cut.bytes_of(largest)
    return [
        cut.spec.name,
        f"{cut.spec.rows:,} x {cut.spec.dim}",
        cut.sharding + ("" if cut.wanted.placement == "device" else f", {cut.wanted.placement}"),
        f"{len({part.rank for part in parts}):,}",
        f"{largest.rows:,}" + ("" if largest.columns == cut.width else f" x {largest.columns}"),
        f"{weights / GIB:,.2f}",
        f"{moments / GIB:,.2f}",
    ]


def _memory(plan: Plan) -> Table:
    room = plan.machine.memory
    table = Table(
        title=f"memory of the fullest process ({plan.parameters:,} parameters in all)", title_justify="left"
    )
    table.add_column("of it")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    for name, size in plan.memory.parts.items():
        table.add_row(name, f"{size / GIB:,.2f}", f"{size / room:.1%}")
    table.add_row(
        "all, at the peak", f"{plan.memory.peak / GIB:,.2f}", f"{plan.memory.peak / room:.1%}", style="bold"
    )
    table.add_row("there is", f"{room / GIB:,.2f}", "")
    if plan.problem:
        said = [f"it doesn't fit: {plan.problem}"]
        said += [f"it fits with {remedy}" for remedy in plan.remedies]
        said += [] if plan.remedies else ["none of the changes that were tried would do alone"]
        table.caption, table.caption_justify = "\n".join(said), "left"
    return table


def _exchanges(plan: Plan) -> Table | None:
    if not plan.exchanges:
        return None
    table = Table(title="what a process sends in a step", title_justify="left")
    for heading in ("exchange", "MiB", "ms", "as"):
        table.add_column(heading, justify="left" if heading in ("exchange", "as") else "right")
    for exchange in plan.exchanges:
        kind = "all to all" if exchange.all_to_all else "ring"
        table.add_row(
            exchange.name,
            f"{exchange.sent / 2**20:,.2f}",
            f"{1e3 * plan.time.exchanges[exchange.name]:,.3f}",
            kind + (", during the backward pass" if exchange.hidden else ""),
        )
    return table


def _step(plan: Plan, tokens: float | None, price: float | None) -> Table:
    time, machine = plan.time, plan.machine
    table = Table(title="a step", title_justify="left", show_header=False)
    table.add_row("real tokens", f"{plan.tokens:,}")
    table.add_row(
        "operations",
        f"{plan.flops / 1e15:,.3f} PFLOP ({plan.flops / max(plan.tokens, 1) / 1e9:,.3f} GFLOP a token)",
    )
    if (encoding := plan.rehearsal.encoding) is not None:
        share = encoding.flops.total / max(plan.flops, 1)
        table.add_row(
            "items encoded, with gradients",
            f"{encoding.items:,}, of which {encoding.own:,} by a process in {encoding.chunks} parts; the item tower "
            f"takes {share:.0%} of the operations",
        )
    table.add_row("micro-batches of a process", str(plan.rehearsal.micro_batches))
    table.add_row("time", f"{1e3 * time.seconds:,.1f} ms, bound by {time.bound}")
    for name, seconds in (
        ("  arithmetic", time.compute),
        ("  the devices' memory", time.memory),
        ("  starting operations", time.calls),
        ("  the network, not hidden", time.network),
    ):
        table.add_row(name, f"{1e3 * seconds:,.2f} ms")
    table.add_row("real tokens a second", f"{plan.tokens_per_second:,.0f}")
    table.add_row("model FLOPs utilization", f"{plan.mfu:.1%} of {machine.bf16 / 1e12:,.0f} TFLOP/s a device")
    if tokens:
        budget = plan.budget(tokens, price)
        table.add_row(f"{tokens:,.3g} tokens", f"{budget['steps']:,.0f} steps, {budget['days']:,.2f} days, "
                                               f"{budget['pflop_days']:,.1f} PFLOP-days")  # fmt: skip
        if "cost" in budget:
            table.add_row("  cost", f"{budget['cost']:,.0f} at {price} an hour of a device")
    table.caption = (
        f"counted on: {machine.products:.0%} of the arithmetic's ceiling in products, {machine.attention:.0%} in "
        f"attention; {machine.moved:.0%} of {machine.speed / 1e12:.2f} TB/s of memory; {machine.exchanged:.0%} of "
        f"{machine.link / 1e9:,.0f} GB/s in a machine and {machine.network / 1e9:,.0f} GB/s a device out of it"
    )
    table.caption_justify = "left"
    return table


def as_json(plan: Plan, tokens: float | None = None, price: float | None = None) -> dict[str, Any]:
    """All of a plan as plain values; bytes and seconds."""
    return {
        "settings": plan.settings,
        "processes": plan.processes,
        "machine": vars(plan.machine),
        "parameters": plan.parameters,
        "tables": [
            {
                "name": cut.spec.name,
                "rows": cut.spec.rows,
                "dim": cut.spec.dim,
                "sharding": cut.sharding,
                "held": [[part.rank, part.row0, part.rows, part.col0, part.columns] for part in cut.held],
            }
            for cut in plan.tables
        ],
        "memory": {"parts": plan.memory.parts, "peak": plan.memory.peak, "room": plan.machine.memory},
        "fits": plan.fits,
        "problem": plan.problem,
        "remedies": plan.remedies,
        "step": {
            "tokens": plan.tokens,
            "flops": plan.flops,
            "micro_batches": plan.rehearsal.micro_batches,
            "rows": plan.rehearsal.rows,
            "encoded": _encoded(plan),
            "exchanges": {
                e.name: {"sent": e.sent, "seconds": plan.time.exchanges[e.name]} for e in plan.exchanges
            },
            "seconds": plan.time.seconds,
            "compute": plan.time.compute,
            "memory": plan.time.memory,
            "calls": plan.time.calls,
            "network": plan.time.network,
            "bound": plan.time.bound,
        },
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "budget": None if tokens is None else plan.budget(tokens, price),
    }


def _encoded(plan: Plan) -> dict[str, Any] | None:
    """Of an item tower."""
    encoding = plan.rehearsal.encoding
    if encoding is None:
        return None
    flops = {name: {"forward": p.forward, "backward": p.backward} for name, p in encoding.flops.parts.items()}
    return {"items": encoding.items, "own": encoding.own, "parts": encoding.chunks, "flops": flops}


def report(
    plans: Sequence[Plan],
    tokens: float | None,
    price: float | None,
    json_file: Path | None,
    plot: Path | None,
    console: Console,
) -> None:
    """Print the plans, and write them where that is asked for."""
    console.print(shown(plans, tokens, price))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([as_json(p, tokens, price) for p in plans], indent=1) + "\n")
        console.print(f"plans in '{json_file}'")
    if plot is not None:
        for file in draw(plans, plot):
            console.print(f"picture in '{file}'")


def draw(plans: Sequence[Plan], plot: Path) -> list[Path]:
    """Memory and time of the first plans as bars: ``plot`` as .png and .svg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    some = list(plans)[:DRAWN][::-1]
    names = [", ".join(f"{k} {v}" for k, v in p.settings.items()) or f"{p.processes} devices" for p in some]
    figure = Figure(figsize=(11, 2.6 + 0.42 * len(some)), layout="constrained")
    FigureCanvasAgg(figure)
    memory_axes, time_axes = figure.subplots(1, 2)
    memory = [{name: size / GIB for name, size in plan.memory.parts.items()} for plan in some]
    time = [
        {
            "arithmetic": 1e3 * p.time.compute,
            "memory": 1e3 * p.time.memory,
            "starting operations": 1e3 * p.time.calls,
            "network, not hidden": 1e3 * p.time.network,
        }
        for p in some
    ]
    for axes, bars in ((memory_axes, memory), (time_axes, time)):
        _stack(axes, names, bars)
    room = some[0].machine.memory / GIB
    memory_axes.axvline(room, color="#b02a2a", linestyle="--", linewidth=1)
    memory_axes.annotate(
        f" {room:,.0f} GiB",
        (room, 1),
        xycoords=("data", "axes fraction"),
        va="bottom",
        ha="center",
        color="#b02a2a",
        size=8,
    )
    memory_axes.set(xlabel="GiB of the fullest process")
    time_axes.set(xlabel="milliseconds a step", yticklabels=[])
    plot.parent.mkdir(parents=True, exist_ok=True)
    files = [plot.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=130)
        figure.set_layout_engine("none")  # found once, for both
    return files


def _stack(axes: Any, names: Sequence[str], bars: Sequence[dict[str, float]]) -> None:
    kinds = list(dict.fromkeys(kind for bar in bars for kind in bar))
    left = [0.0] * len(bars)
    for kind, colour in zip(kinds, COLOURS * 2):
        sizes = [bar.get(kind, 0.0) for bar in bars]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, color=colour, label=kind, height=0.62)
        left = [start + size for start, size in zip(left, sizes)]
    axes.set_yticks(range(len(bars)), names)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.22 if len(bars) < 4 else -0.12),
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
