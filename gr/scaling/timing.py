"""How long a training step takes, on paper: each operation as long as its arithmetic or its bytes need, whichever is
more; then what processes exchange, which only the gradients of dense parameters do while something else runs.

Shapes: U rows of a view, R processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gr.embeddings.planned import PlannedTable
from gr.scaling.machine import Machine
from gr.scaling.memory import Sharing
from gr.scaling.rehearsal import Paper, Rehearsal
from gr.scaling.tally import Operation


@dataclass(frozen=True)
class Exchange:
    """A collective of a step.  sent: bytes that each process sends.  all_to_all: else a ring.  hidden: whether the
    backward pass goes on meanwhile."""

    name: str
    sent: float
    all_to_all: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one process.  compute: of operations that arithmetic bounds; memory: of those that bytes
    do, and of moving parameters; calls: that starting operations takes, where that is longer; network: of exchanges
    that nothing hides.  exchanges: seconds of each, hidden ones too."""

    compute: float
    memory: float
    calls: float
    network: float
    exchanges: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.calls + self.network

    @property
    def bound(self) -> str:
        shares = {
            "compute": self.compute,
            "memory": self.memory,
            "starting operations": self.calls,
            "network": self.network,
        }
        return max(shares, key=lambda name: shares[name])


def exchanges(paper: Paper, rehearsal: Rehearsal) -> list[Exchange]:
    """What each process sends in a step."""
    config, processes = paper.config, paper.on.processes
    if processes == 1:
        return []
    sharing = Sharing.of(config, processes)
    others = (processes - 1) / processes
    found = []
    for table in paper.model.tables.values():
        count = rehearsal.rows.get(table.name)
        if count is None:
            continue
        size = count * (table.dim + table.spec.bias)
        if isinstance(table, PlannedTable):
            narrow = getattr(getattr(config.model, "table", None), "communication", "fp32") != "fp32"
            each = 2 if narrow else 4
            found.append(Exchange(f"row numbers of {table.name}", 8.0 * count * others, all_to_all=True))
            found.append(Exchange(f"rows of {table.name}", each * size * others, all_to_all=True))
            found.append(Exchange(f"gradients of {table.name}", each * size * others, all_to_all=True))
        else:  # every process has all rows, and sends the gradients of those that it saw to all
            found.append(Exchange(f"gradients of {table.name}", (8.0 * count + 4.0 * size) * (processes - 1)))
    times = 1 / max(rehearsal.share_of_step, 1e-9)
    found += [Exchange(kind, size * times) for kind, size in rehearsal.exchanged.items()]
    if rehearsal.encoding is not None and paper.tower is not None:
        of = paper.tower.name
        found += [Exchange(f"{s.what} of {of}", s.bytes, s.all_to_all) for s in rehearsal.encoding.sent]
    dense = 4.0 * sum(count for name, count in paper.dense.items() if not name.startswith("tables."))
    tables = 4.0 * sum(count for name, count in paper.dense.items() if name.startswith("tables."))
    ring = dense * others
    if sharing.stage == 3:
        found.append(Exchange("dense parameters, gathered", 2 * ring * rehearsal.micro_batches, hidden=True))
        found.append(Exchange("dense gradients, scattered", ring * rehearsal.micro_batches, hidden=True))
    elif sharing.stage:
        passes = rehearsal.micro_batches if sharing.stage == 2 else 1
        found.append(Exchange("dense gradients, scattered", ring * passes, hidden=True))
        found.append(Exchange("dense parameters, gathered", ring))
    else:
        found.append(Exchange("dense gradients", 2 * ring, hidden=sharing.engine == "ddp"))
    if tables:
        found.append(Exchange("gradients of whole tables", 2 * tables * others))
    return found


def step_time(paper: Paper, rehearsal: Rehearsal, machine: Machine) -> StepTime:
    """Of the process with the most work."""
    compute = memory = backward = 0.0
    times = 1 / max(rehearsal.share_of_step, 1e-9)
    done = [(operation, times) for operation in rehearsal.operations]
    done += [(operation, 1.0) for operation in rehearsal.once]
    beside = [] if rehearsal.encoding is None else rehearsal.encoding.work
    for operation, often in [*done, *beside]:
        seconds, by_arithmetic = _seconds(operation, machine)
        compute += often * seconds if by_arithmetic else 0.0
        memory += 0.0 if by_arithmetic else often * seconds
    backward = 2 / 3 * (compute + memory)
    memory += _moving(paper, rehearsal) / (machine.speed * machine.moved)
    count = len(rehearsal.operations) * rehearsal.micro_batches + len(rehearsal.once) + len(beside)
    started = count * machine.call
    # on a CPU nothing is started ahead
    calls = started if machine.device == "cpu" else max(started - compute - memory, 0.0)
    found = exchanges(paper, rehearsal)
    taken = {
        e.name: machine.seconds_together(e.sent, paper.on.processes, all_to_all=e.all_to_all) for e in found
    }
    hidden = sum(taken[e.name] for e in found if e.hidden)
    network = sum(taken[e.name] for e in found if not e.hidden) + max(hidden - backward, 0.0)
    return StepTime(compute, memory, calls, network, taken)


def _seconds(operation: Operation, machine: Machine) -> tuple[float, bool]:
    """Of an operation, and whether its arithmetic takes them."""
    share = machine.attention if operation.attends else machine.products
    arithmetic = operation.flops / (machine.peak(operation.dtype) * share)
    moving = operation.bytes / (machine.speed * machine.moved)
    return max(arithmetic, moving), arithmetic > moving


def _moving(paper: Paper, rehearsal: Rehearsal) -> float:
    """Bytes that are read and written while parameters move: values, moments, gradients; of tables the rows that this
    process owns, or all of them."""
    config, processes = paper.config, paper.on.processes
    sharing = Sharing.of(config, processes)
    optimizer = config.optimizer.build()
    passes = 2 * (1 + len(optimizer.moments)) + 1
    dense = 4.0 * sum(paper.dense.values()) * passes
    if sharing.stage:
        dense *= sharing.part(1)
    moved = dense
    for table in paper.model.tables.values():
        count = rehearsal.rows.get(table.name)
        if count is None:
            continue
        spec, width = table.spec, table.dim + table.spec.bias
        rows = count
        if spec.maths is not None and spec.maths.all_rows:
            rows = table.rows // processes if isinstance(table, PlannedTable) else table.rows
        moved += 4.0 * (count * width * 6 + rows * (width * (2 + 2 * spec.moments) + 2 * spec.row_moments))
    return moved
