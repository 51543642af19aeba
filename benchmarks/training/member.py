"""What one process of a group measures: each case's memory, alone; then the steps of all cases, in turns.

All processes call :func:`measure` together, and every figure is of all of them.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.training.cases import Case
from benchmarks.training.exchanges import Meter, exposed_seconds, must_cross
from benchmarks.training.memory import peak_mib, reset_peak
from benchmarks.training.shapes import Shape, batches
from benchmarks.training.sides import Ours
from gr.data.deal import deal
from gr.data.sequences import Sequences
from gr.embeddings.table import Table
from gr.embeddings.torchrec_plan import import_torchrec
from gr.embeddings.view import View
from gr.processes import Processes
from gr.train.engines.engine import Engine
from gr.train.engines.zero import import_deepspeed
from gr.train.memory import give_back_freed_memory

WARM_UP, LEAST_ROUNDS, MEMORY_STEPS, PROFILED = 2, 3, 3, 3


@dataclass
class Taken:
    """Of each step of a case on this process: seconds, seconds in exchanges, CPU seconds of all its threads, bytes sent
    by the views' exchanges and the least that they could be."""

    seconds: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    least: list[int] = field(default_factory=list)


def measure(
    shape: Shape,
    samples: Sequences,
    chosen: Sequence[Case],
    overrides: Sequence[str],
    seconds: float,
    joined: Processes,
) -> dict[str, Any]:
    """A JSON-able dict: the rounds, and of each case what :func:`figures` makes."""
    # packages are nobody's memory but the process's
    if any(case.table != "local" for case in chosen):
        import_torchrec()
    if any(case.engine.startswith("zero") for case in chosen):
        import_deepspeed(joined.device)
    memory = {case.name: _memory(shape, samples, case, overrides, joined) for case in chosen}
    sides = {
        case.name: Ours(shape, samples, overrides=[*case.overrides, *overrides], processes=joined)
        for case in chosen
    }
    taken, rounds = _in_turns(sides, samples, shape, seconds, joined)
    if joined.device.type == "cuda":
        for name, side in sides.items():
            taken[name].exposed = [_profiled(side, samples, shape, joined)] * len(taken[name].seconds)
    actions, sizes = rounds
    found = {name: of_all(vars(each), joined) for name, each in taken.items()}
    first = next(iter(found.values()))
    return {
        "processes": joined.world.size,
        "threads": torch.get_num_threads(),
        "device": joined.device.type,
        "rounds": len(actions),
        "cases": {
            name: figures(ranks, np.array(actions), np.array(sizes), first) | memory[name]
            for name, ranks in found.items()
        },
    }


def figures(
    ranks: list[dict[str, list]], actions: np.ndarray, sizes: np.ndarray, first: list[dict[str, list]]
) -> dict[str, Any]:
    """Of one case, from what each rank took.  A step is as long as its slowest rank's; ``first``: what the first case
    took, round by round."""
    slowest = _slowest(ranks)
    exposed, cpu, sent, least = (
        np.array([rank[key] for rank in ranks]) for key in ("exposed", "cpu", "sent", "least")
    )
    ratio = slowest / _slowest(first)
    cpu_ratio = cpu.sum(0) / np.array([rank["cpu"] for rank in first]).sum(0)
    return {
        "samples_per_s": np.percentile(sizes / slowest, [10, 50, 90]).tolist(),
        "tokens_per_s": np.percentile(actions / slowest, [10, 50, 90]).tolist(),
        "step_ms": float(np.median(slowest)) * 1e3,
        "ratio": {"median": float(np.median(ratio)), "min": float(ratio.min()), "max": float(ratio.max())},
        "cpu_ratio": float(np.median(cpu_ratio)),
        "exposed_ms": float(np.median(exposed.mean(0))) * 1e3,
        "exposed_least_ms": float(np.median(exposed.min(0))) * 1e3,
        "cpu_ms": float(np.median(cpu.sum(0))) * 1e3,
        "view_sent_bytes": float(sent.mean()),
        "view_least_bytes": float(least.mean()),
        "step_s": slowest.round(5).tolist(),
    }


def of_all(value: Any, joined: Processes) -> list[Any]:
    """Everybody's value, by rank."""
    values: list[Any] = [None] * joined.world.size
    if joined.world.size == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def _slowest(ranks: list[dict[str, list]]) -> np.ndarray:
    return np.array([rank["seconds"] for rank in ranks]).max(0)


def _in_turns(
    sides: dict[str, Ours], samples: Sequences, shape: Shape, seconds: float, joined: Processes
) -> tuple[dict[str, Taken], tuple[list[int], list[int]]]:
    """What each step took, and of each round's global batch its targets and its sequences.  A round takes one batch
    through every case, from another one on each time."""
    taken, meter = {name: Taken() for name in sides}, Meter()
    wanted = {name: _watch(side.model.tables.values()) for name, side in sides.items()}
    actions: list[int] = []
    sizes: list[int] = []
    stream = batches(samples, shape.batch)
    finish = time.perf_counter() + seconds
    with meter.running():
        for number in itertools.count(-WARM_UP):
            late = len(actions) >= LEAST_ROUNDS and time.perf_counter() >= finish
            if joined.broadcast(late):
                return taken, (actions, sizes)
            rows = next(stream)
            own = rows[deal(samples.lengths_R[rows], joined.data.size) == joined.data.rank]
            first = number % len(sides)
            for name in [*list(sides)[first:], *list(sides)[:first]]:
                joined.barrier()
                meter.read()
                started, started_cpu = time.perf_counter(), time.process_time()
                sides[name].step(own)
                if joined.device.type == "cuda":
                    torch.cuda.synchronize(joined.device)
                ended = time.perf_counter() - started
                if number >= 0:
                    each, (exposed, sent) = taken[name], meter.read()
                    each.seconds.append(ended)
                    each.exposed.append(exposed)
                    each.cpu.append(time.process_time() - started_cpu)
                    each.sent.append(sent)
                    each.least.append(sum(must_cross(table, view) for table, view in wanted[name].values()))
            if number >= 0:
                actions.append(int((samples.lengths_R[rows] - 1).sum()))
                sizes.append(len(rows))
            elif number == -1:
                finish = time.perf_counter() + seconds
    raise AssertionError("rounds end when time is up")


def _watch(tables: Iterable[Table]) -> dict[str, tuple[Table, Tensor]]:
    """By table's name, the rows of the last view of each table that keeps its rows to itself: filled as views are
    asked for."""
    last: dict[str, tuple[Table, Tensor]] = {}
    for table in tables:
        if table.replicated:
            continue
        view = table.view

        def watched(wanted: Sequence[Tensor] = (), table: Table = table, view: Any = view) -> View:
            made = view(wanted)
            rows_U = torch.arange(table.rows) if made.numbering is None else made.numbering.rows_U
            last[table.name] = table, rows_U
            return made

        table.view = watched  # type: ignore[method-assign]
    return last


def _profiled(side: Ours, samples: Sequences, shape: Shape, joined: Processes) -> float:
    """Seconds of a step on a GPU in which nothing but exchanges runs."""
    stream = batches(samples, shape.batch, seed=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for rows in itertools.islice(stream, PROFILED):
            side.step(rows[deal(samples.lengths_R[rows], joined.data.size) == joined.data.rank])
        torch.cuda.synchronize(joined.device)
    return exposed_seconds(profile) / PROFILED


# -- memory --------------------------------------------------------------------------------------------------------


def _memory(
    shape: Shape, samples: Sequences, case: Case, overrides: Sequence[str], joined: Processes
) -> dict[str, Any]:
    """Of a few steps while no other case exists, rank by rank: MiB of the peak, and what of it the case added; bytes of
    the table and of its moments."""
    gc.collect()
    give_back_freed_memory()
    joined.barrier()
    before = reset_peak(joined.device)
    side = Ours(shape, samples, overrides=[*case.overrides, *overrides], processes=joined)
    for rows in itertools.islice(batches(samples, shape.batch), MEMORY_STEPS):
        side.step(rows[deal(samples.lengths_R[rows], joined.data.size) == joined.data.rank])
    peak = peak_mib(joined.device)
    table, moments = held_bytes(side.engine)
    ranks = of_all([peak, peak - before, table, moments], joined)
    names = ("peak_mib", "added_mib", "table_bytes", "moment_bytes")
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(names)}


def held_bytes(engine: Engine) -> tuple[int, int]:
    """Of all tables, on this process: bytes of their rows (what is padded included) and of the moments beside them."""
    tables = [piece.values_RC for table in engine.model.tables.values() for piece in table.pieces()]
    moments = [
        m for optimizer in engine.row_optimizers.values() for held in optimizer.moments for m in held.values()
    ]
    for name, part in engine.dense.items():
        if name.startswith("tables."):
            moments += part.optimizer.state.get(part.parameters[name], {}).values()
    return _stored(tables), _stored([m for m in moments if isinstance(m, Tensor) and m.dim()])


def _stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors lie in, each once."""
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(memory.values())
