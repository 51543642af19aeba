"""What the doctor says of a cluster: the hosts and what they differ in, and what their exchanges bring."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.config import RunConfig
from gr.errors import UserError
from gr.processes import Processes, processes
from gr.train.collectives import Timed, clock_offsets, timed_exchanges
from gr.train.preflight import difference_of, doubts, facts
from gr.train.watch import watching

TIMEOUT_SECONDS, WIDTH = 60, 120
LIMIT = "the doctor's patience"


def examine_cluster(config: RunConfig | None) -> int:
    """Print it, on the first process; 1 where nothing can be trained so, 2 where that is an exchange's fault."""
    device = "auto" if config is None else config.train.device
    with processes(device, timeout=timedelta(seconds=TIMEOUT_SECONDS)) as joined, watching(joined, LIMIT):
        if joined.world.size == 1:
            raise UserError(
                "a cluster is several processes: start it with torchrun, as a training is started"
            )
        everybodys = joined.everybodys(facts(config, joined.device))
        offsets = clock_offsets(joined)
        for one, offset in zip(everybodys, offsets, strict=True):
            one["clock"] = offset
        difference = difference_of(config, joined, everybodys)
        wrong = [difference, _unshared(config, joined), _absent(config, everybodys)]
        found = timed_exchanges(joined)
        if joined.is_main:
            console = Console(width=max(shutil.get_terminal_size().columns, WIDTH))
            console.print(_hosts(everybodys))
            console.print(_exchanges(found, joined))
            for said in doubts(everybodys):
                print(f"worth a look: {said}")
            for said in filter(None, wrong):
                print(f"error: {said}")
            print("" if any(wrong) else "The processes fit together.", flush=True)
        return 1 if any(wrong) else 0


def _absent(config: RunConfig | None, everybodys: Sequence[Mapping[str, Any]]) -> str:
    """Whether nobody finds the dataset; where some do, that is a difference."""
    if config is None or any(one["dataset"] is not None for one in everybodys):
        return ""
    return (
        f"no process finds a dataset at '{config.data.path}' (data.path): prepare it, or mount it under that path on "
        "all hosts"
    )


def _unshared(config: RunConfig | None, joined: Processes) -> str:
    """Why ``run.dir`` can't be the run's, or ""."""
    from gr.train.folder import RunFolder
    from gr.train.preflight import nearest_folder

    if config is None:
        return ""
    folder = nearest_folder(config)
    try:
        joined.check_shared(
            folder if folder is not None else RunFolder(config.run.dir or "runs").path, "run.dir"
        )
    except UserError as error:
        return str(error)
    return ""


def _hosts(everybodys: Sequence[Mapping[str, Any]]) -> Table:
    """A line a host."""
    table = Table(box=None, pad_edge=False, title=f"{len(everybodys)} processes", title_justify="left")
    for column in ("host", "ranks", "gr", "torch", "device", "threads", "clock", "free in run.dir"):
        table.add_column(column)
    for host in dict.fromkeys(one["host"] for one in everybodys):
        ranks = [rank for rank, one in enumerate(everybodys) if one["host"] == host]
        first = everybodys[ranks[0]]
        free = first.get("free GiB")
        table.add_row(
            *(host, _span(ranks), f"{first['gr']} ({first['code of gr']})", str(first["torch"])),
            *(first.get("GPU", f"cpu, {first['instruction set']}"), str(first["threads"])),
            *(f"{first['clock']:+.3f} s", "-" if free is None else f"{free:,.1f} GiB"),
        )
    return table


def _span(ranks: list[int]) -> str:
    whole = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def _exchanges(found: Sequence[Timed], joined: Processes) -> Table:
    table = Table(box=None, pad_edge=False, title="exchanges", title_justify="left")
    for column in ("kind", "device", "KiB a process", "ms", "GB/s of a link"):
        table.add_column(column, justify="left" if column in ("kind", "device") else "right")
    for one in found:
        table.add_row(
            *(
                one.kind,
                one.device,
                f"{one.bytes / 1024:,.0f}" if one.bytes else "-",
                f"{1000 * one.seconds:,.2f}",
            ),
            "-" if one.gb_per_s is None else f"{one.gb_per_s:,.2f}",
        )
    return table
