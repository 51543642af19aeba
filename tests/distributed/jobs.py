"""Several runs in one group of processes: starting processes takes longer than a tiny run.

A job is {"config": path, "overrides": [...]} or {"resume": run's folder, "overrides": [...]}; with "broken_at": STEP,
that step's gradients are not numbers, though its loss is one; with "dirty": true, new memory has NaN in it until it is
written; with "told": [RANK, STEP], that rank alone gets a SIGTERM after that step; with "killed": [RANKS, STEP], those
ranks get a SIGKILL after it.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessException

from tests.distributed.group import in_group


def run_jobs(folder: Path, jobs: list[dict], processes: int) -> list[list[str | None]]:
    """Run ``jobs`` on so many processes; the sentence that refused each, or None, rank by rank."""
    meeting = Path(tempfile.mkdtemp(dir=folder)) / "group"
    ranks = in_group(refusals, processes, meeting, json.dumps(jobs, default=str), by_hand=processes > 1)
    return [list(of_job) for of_job in zip(*ranks, strict=True)]


def run_killed(folder: Path, job: dict, ranks: list[int], step: int, processes: int) -> None:
    """Run a job to that step, at which ``ranks`` of its processes are killed, and the others end as they can."""
    with pytest.raises(ProcessException):
        run_jobs(folder, [{**job, "killed": [ranks, step]}], processes)


@contextmanager
def breaking(step: int | None) -> Iterator[None]:
    """The gradients of step number ``step`` (one micro-batch each) are NaN: those of sqrt |w - w|, which is 0."""
    from gr.models.retrieval import Retrieval

    real, calls = Retrieval.forward, 0

    def forward(self, part, context):
        nonlocal calls
        calls += 1
        loss = real(self, part, context)
        if calls != step:
            return loss
        weight = self.input.positions
        return loss + (weight - weight.detach()).abs().sqrt().sum()

    Retrieval.forward = forward if step is not None else real
    try:
        yield
    finally:
        Retrieval.forward = real


@contextmanager
def dirty_memory(wanted: bool) -> Iterator[None]:
    """What torch.empty gives to Python code is full of NaN, as it may be."""
    import torch

    real = torch.empty

    def empty(*size, **settings):
        new = real(*size, **settings)
        if new.is_floating_point() and new.device.type == "cpu":
            new.detach().fill_(torch.nan)
        return new

    torch.empty = empty if wanted else real
    try:
        yield
    finally:
        torch.empty = real


def signalling(number: signal.Signals, ranks: list[int], step: int, own: int) -> Callable[[object], None]:
    """What a run calls after each step on rank ``own``."""
    steps = itertools.count(1)

    def on_step(_: object) -> None:
        if next(steps) == step and own in ranks:
            os.kill(os.getpid(), number)

    return on_step


def refusals(jobs: str) -> list[str | None]:
    """What each of ``jobs`` (JSON) was refused with on this process."""
    import torch.distributed as dist

    from gr import config as configs
    from gr.errors import UserError
    from gr.train import job

    rank = dist.get_rank() if dist.is_initialized() else 0
    job.plot_run = lambda folder, shown: None  # pictures take longer than runs
    said: list[str | None] = []
    for asked in json.loads(jobs):
        overrides, refusal = asked.get("overrides", []), None
        on_step = job.nothing
        if "told" in asked:
            told, step = asked["told"]
            on_step = signalling(signal.SIGTERM, [told], step, rank)
        if "killed" in asked:
            on_step = signalling(signal.SIGKILL, *asked["killed"], rank)
        try:
            with breaking(asked.get("broken_at")), dirty_memory(asked.get("dirty", False)):
                if "resume" in asked:
                    job.resume(asked["resume"], overrides)
                else:
                    job.run(configs.load(asked["config"], overrides), on_step=on_step)
        except UserError as error:
            refusal = str(error)
        said.append(refusal)
    return said
