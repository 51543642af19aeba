"""Memory of a training step on one process: what stays from step to step, and what a step adds at its peak.

Shapes: U rows of a view, W width of a table as stored, R processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from gr.config import RunConfig
from gr.embeddings.planned import PlannedTable
from gr.embeddings.row_updates import CHUNK_NUMBERS
from gr.embeddings.table import Table, TableSpec
from gr.scaling.rehearsal import Paper, Rehearsal
from gr.scaling.towers import encoded_of

BUCKET = 1 << 26
"""Numbers of DeepSpeed's exchange buffers (gr.train.engines.zero)."""
CHUNK_COPIES = 5
"""Of a chunk of rows, while an optimiser that moves all rows goes through a table: gradient and scratch."""


@dataclass(frozen=True)
class Sharing:
    """How the dense part is shared out: of parameters, gradients and moments each process has all or its part."""

    engine: str
    stage: int
    processes: int

    @staticmethod
    def of(config: RunConfig, processes: int) -> Sharing:
        engine = config.train.engine
        stage = 3 if engine.name == "fsdp" else getattr(engine, "zero", 0)
        return Sharing(engine.name, stage, processes)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients of dense parameters stay where backward forms them: not where they go on to others' shares,
        or into DDP's buckets."""
        return self.stage < 2 and not (self.engine == "ddp" and self.processes > 1)

    def part(self, from_stage: int) -> float:
        """What a process keeps of something that is shared out from a ZeRO stage on."""
        return 1 / self.processes if self.stage >= from_stage else 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    kept: what stays between steps, by kind.  step: what is added while gradients are formed, by kind.  update: what is
    added while parameters move.
    """

    kept: Mapping[str, float]
    step: Mapping[str, float]
    update: float

    @property
    def peak(self) -> float:
        return sum(self.kept.values()) + max(sum(self.step.values()), self.update)

    @property
    def parts(self) -> dict[str, float]:
        """By kind, at the peak."""
        added = dict(self.step) if sum(self.step.values()) >= self.update else {"update": self.update}
        return {**self.kept, **added}


def memory(paper: Paper, rehearsal: Rehearsal) -> Memory:
    """Of the fullest process."""
    config, processes = paper.config, paper.on.processes
    sharing = Sharing.of(config, processes)
    optimizer = config.optimizer.build()
    moments = len(optimizer.moments)
    dense = {name: 4.0 * count for name, count in paper.dense.items()}
    tower = paper.tower
    of_tower = (
        0.0 if tower is None else sum(s for n, s in dense.items() if n.startswith(f"tables.{tower.name}."))
    )
    of_tables = sum(size for name, size in dense.items() if name.startswith("tables.")) - of_tower
    network = sum(dense.values()) - of_tables - of_tower
    kept = {
        "table rows": of_tables,
        "table moments": moments * of_tables,
        "dense parameters": network * sharing.part(3),
        "dense moments": moments * network * sharing.part(1),
        "frozen parameters": _bytes(p for p in paper.model.parameters() if not p.requires_grad),
    }
    if tower is not None:
        kept["item tower's weights"] = _bytes([p for _, p in tower.named_shared("")]) + _bytes(
            tower.buffers()
        )
        kept["item tower's moments"] = moments * of_tower
        kept |= tower.content.keeps(tower.rows, processes)
        encoded = encoded_of(tower)
        if encoded is not None and paper.on.device == "cpu":  # a GPU's tokens stay in the machine's memory
            kept["tokens of items"] = float(encoded.items.held)
    if not sharing.keeps_gradients:
        kept["dense gradients"] = network * sharing.part(2)
    held: dict[int, list[float]] = {0: [0.0, 0.0]}
    moved, rows = 0.0, 0.0
    for table in paper.model.tables.values():
        if table is tower:
            continue
        if isinstance(table, PlannedTable):
            for part in table.plan.held:
                both = held.setdefault(part.rank, [0.0, 0.0])
                for place, size in enumerate(table.plan.bytes_of(part)):
                    both[place] += size
        elif not table.dense:
            size = 4.0 * table.rows * (table.dim + table.spec.bias)
            kept["table rows"] += size
            kept["table moments"] += table.spec.moments * size + 4.0 * table.spec.row_moments * table.rows
        if table.name in rehearsal.rows:
            count = rehearsal.rows[table.name]
            rows += _view(table, count)
            moved += _moving(table.spec, _view(table, count), processes)
    fullest = max(held.values(), key=sum)
    kept["table rows"] += fullest[0]
    kept["table moments"] += fullest[1]
    if sharing.engine == "deepspeed":  # float32 copies of what a process moves, and the buffers of exchanges
        kept["dense parameters"] += network / processes if sharing.stage < 3 else 0.0
        kept["dense buffers"] = 2 * min(4.0 * BUCKET, network)
    step = {"activations and gradients": float(rehearsal.working)}
    if sharing.stage == 3:  # the layer at hand is whole, and the next one is fetched
        step["gathered parameters"] = 2 * network / max(_layers(paper), 1)
    step["views of rows"] = rows
    step["exchanged rows"] = rows if processes > 1 else 0.0  # what others ask for, on its way
    step["indices"] = float(rehearsal.indices)
    gradients = of_tables + of_tower + (network if sharing.keeps_gradients else 0.0)
    return Memory(
        {k: v for k, v in kept.items() if v}, {k: v for k, v in step.items() if v}, gradients + moved
    )


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _view(table: Table, rows: int) -> float:
    return 4.0 * rows * (table.dim + table.spec.bias)


def _moving(spec: TableSpec, view: float, processes: int) -> float:
    """While rows move: the view and its gradient, what came of others', the sums, and rows and moments at hand."""
    found = 2 * view + (2 * view if processes > 1 else view)
    maths = spec.maths
    if maths is None or maths.all_rows:
        return found + CHUNK_COPIES * 4.0 * CHUNK_NUMBERS
    return found + (2 + spec.moments) * view


def _layers(paper: Paper) -> int:
    return sum(len(stack) for stack in paper.model.stacks())
