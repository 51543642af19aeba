"""How the tables of a run are cut, for people: what each process holds of which table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table as Shown

from gr.embeddings.planned import PlannedTable
from gr.embeddings.sharded import TorchRecTable
from gr.embeddings.table import Table
from gr.embeddings.topology import GIB
from gr.embeddings.torchrec_plan import Held, TablePlan

LINES = 16


def plans_of(tables: Iterable[Table]) -> list[TablePlan]:
    """Of the tables that TorchRec's planner cut."""
    return [table.plan for table in tables if isinstance(table, TorchRecTable | PlannedTable)]


def shown(plans: list[TablePlan]) -> Shown:
    """A line a part that a process holds, by rank; of many the first ones, and the fullest process."""
    parts = sorted(
        ((part, plan) for plan in plans for part in plan.held if part.rows and part.columns),
        key=lambda pair: (pair[0].rank, pair[1].spec.name),
    )
    table = Shown(title="tables", title_justify="left")
    for heading in ("rank", "table", "cut", "rows x columns", "GiB of rows", "of moments"):
        table.add_column(heading, justify="left" if heading in ("table", "cut") else "right")
    for part, plan in parts[:LINES]:
        weights, moments = plan.bytes_of(part)
        table.add_row(
            str(part.rank),
            plan.spec.name,
            plan.sharding + ("" if plan.wanted.placement == "device" else f", {plan.wanted.placement}"),
            f"{part.rows:,} x {part.columns}",
            f"{weights / GIB:,.3f}",
            f"{moments / GIB:,.3f}",
        )
    if len(parts) > LINES:
        table.caption = f"and {len(parts) - LINES} more; {_fullest(parts)}"
    return table


def _fullest(parts: list[tuple[Held, TablePlan]]) -> str:
    held: dict[int, int] = {}
    for part, plan in parts:
        held[part.rank] = held.get(part.rank, 0) + sum(plan.bytes_of(part))
    rank = max(held, key=lambda rank: held[rank])
    return f"most is on rank {rank}: {held[rank] / GIB:,.3f} GiB"
