"""A rehearsal: everything built, one step taken, nothing written."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table

from gr.batch import SequenceBatch
from gr.config import RunConfig
from gr.embeddings.planned import planning_for
from gr.errors import UserError
from gr.processes import Processes
from gr.progress import Progress, clock, default_progress
from gr.scaling.machine import here
from gr.scaling.plan import Planner
from gr.train.cursor import Cursor
from gr.train.engines.engine import parameters
from gr.train.folder import RunFolder
from gr.train.job import running
from gr.train.log import StepProgress
from gr.train.memory import peak_bytes
from gr.train.parts import Parts, build, build_model, open_data
from gr.train.planning import OfDataset
from gr.train.plans import plans_of, shown
from gr.train.trainer import Trainer
from gr.train.watch import Watch, watching

TIMED_STEPS = 3


def dry_run(config: RunConfig) -> None:
    """Build ``config``, take a step (and time two more), print shapes, memory and an estimate of the whole."""
    with running(config, config.train.context) as processes, watching(processes) as watch:
        parts = processes.together(lambda: build(config, processes))
        planned = _planned(config, parts, processes)
        taken = _take_steps(config, parts, processes, watch)
        if processes.is_main:
            Console().print(_table(parts, processes, taken, planned))
            if plans := plans_of(parts.model.tables.values()):
                Console().print(shown(plans))


@dataclass(frozen=True)
class _Taken:
    """seconds: of each step.  loss: of the first one.  share: this rank's of the first batch.  steps, first: how many
    there would be, and how many in the first epoch that has some."""

    seconds: list[float]
    loss: float
    share: SequenceBatch
    steps: int
    first: int


def _take_steps(config: RunConfig, parts: Parts, processes: Processes, watch: Watch) -> _Taken:
    quiet = config.log.model_copy(update={"tensorboard": False, "prometheus": None})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            config.model_copy(update={"log": quiet}),
            parts,
            processes,
            RunFolder(scratch),
            Cursor(parts.data.dataset.manifest.generation),
            watch=watch,
        )
        trainer.progress.close()
        trainer.progress = StepProgress(trainer.total_steps, 0, active=False)
        first_epoch = _first_epoch(trainer)
        seconds, losses, shares = [], [], []
        # a step of a tuned encoder can take a minute
        said = default_progress() if processes.is_main else Progress()
        with (
            parts.batches.opened(processes),
            closing(parts.batches.epoch(first_epoch)) as batches,
            said.stage("rehearsing", min(TIMED_STEPS, trainer.total_steps), "steps") as stage,
        ):
            for batch in islice(batches, TIMED_STEPS):
                started = time.perf_counter()
                trainer.step(batch)
                if processes.device.type == "cuda":
                    torch.cuda.synchronize(processes.device)
                seconds.append(time.perf_counter() - started)
                losses.append(trainer.last_loss)
                shares.append(batch.share)
                stage.advance(1)
        trainer.metrics.close()
    in_first = parts.batches.in_epoch(first_epoch)
    return _Taken(seconds, losses[0], shares[0], trainer.total_steps, in_first)


def _table(parts: Parts, processes: Processes, taken: _Taken, planned: str) -> Table:
    share, per_step = taken.share, min(taken.seconds)
    table = Table(title="dry run", show_header=False, title_justify="left")
    table.add_row("dataset", parts.data.dataset.manifest.counts)
    table.add_row("processes, device", f"{processes.world.size}, {processes.device}")
    table.add_row("first batch of this rank", f"{share.sequences} sequences, {share.actions:,} actions, "
                                              f"longest {share.max_length}")  # fmt: skip
    named = parameters(parts.model)  # rows of tables that keep them to themselves, too
    total = sum(values.numel() for values in named.values())
    table.add_row("parameters", f"{total:,} ({4 * total / 2**20:.1f} MiB; "
                                f"AdamW holds twice as much more)")  # fmt: skip
    for name, values in named.items():
        table.add_row(f"  {name.removeprefix('model/')}", " x ".join(map(str, values.shape)))
    table.add_row("peak memory", f"{peak_bytes(processes.device) / 2**20:,.0f} MiB")
    table.add_row("memory as planned", planned)
    table.add_row("loss of the first step", f"{taken.loss:.4f}")
    table.add_row("seconds a step", f"{per_step:.3f} (first {taken.seconds[0]:.3f})")
    table.add_row("steps", f"{taken.steps:,} ({taken.first:,} in the first epoch)")
    table.add_row("estimated training time", f"{clock(per_step * taken.steps)}, evaluations not counted")
    return table


def _planned(config: RunConfig, parts: Parts, processes: Processes) -> str:
    """What launch/plan.py would say: what a step's tensors take on the fullest process, without interpreter and
    libraries."""
    if not processes.is_main:
        return ""
    try:
        machine = here(processes)
        plan = Planner(config, OfDataset(parts.data), machine).plan(
            config, processes.world.size, {}, advise=False
        )
    except UserError as error:
        return f"not known: {error}"
    named = sorted(plan.memory.parts.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in named[:4])
    return f"{plan.memory.peak / 2**20:,.1f} MiB of tensors: {largest}"


def _first_epoch(trainer: Trainer) -> int:
    """The first one that has batches."""
    for epoch in range(trainer.epochs):
        if trainer.batches.in_epoch(epoch):
            return epoch
    raise UserError(
        "no period is over yet (data.split.last is wait): there is nothing to train on", everywhere=True
    )


def plan_only(config: RunConfig, count: int) -> None:
    """Print how the tables of ``config`` would be cut for ``count`` processes; nothing but the dense part is built, and
    on one process."""
    with running(config) as processes:
        data = open_data(config)
        data.catalogue.count_once(processes)
        with planning_for(count):
            model = build_model(config, data, processes)
    plans = plans_of(model.tables.values())
    if not plans:
        raise UserError(
            "no table of this config is cut among processes: use model.table=torchrec to plan for some"
        )
    Console().print(shown(plans))
