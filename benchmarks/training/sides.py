"""The two trainers behind one face: a step from rows of in-memory sequences to moved parameters.

Parts of a step are marked with ``record_function("region:...")``; outside a profile a mark costs about a microsecond.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch.profiler import record_function

from benchmarks.training import padded_baseline
from benchmarks.training.shapes import Shape, config, model
from gr.data.collate import collate
from gr.data.sequences import Sequences
from gr.models.step import StepContext
from gr.processes import Processes
from gr_kernels.counter_random import derive_key


class Side(Protocol):
    """``step`` trains on the given rows of ``samples`` and returns the mean loss."""

    def step(self, rows: np.ndarray) -> float: ...


class Ours:
    """The step of gr.train.Trainer: supervise, forward, backward, move.  ``overrides``: of the shape's config.
    ``processes``: this one alone, on its CPU, or one of several that step together, each on rows of its own."""

    def __init__(
        self,
        shape: Shape,
        samples: Sequences,
        seed: int = 1,
        overrides: Iterable[str] = (),
        processes: Processes | None = None,
    ):
        self.samples, self.seed, self.steps = samples, seed, 0
        self.processes = processes or Processes(torch.device("cpu"))
        run = config(shape, list(overrides))
        self.model = model(shape, run, self.processes)
        self.engine = run.train.engine.build(
            self.model,
            run.optimizer.build(),
            self.processes,
            clip_norm=run.train.clip_norm,
            bf16=run.train.precision == "bf16",
        )
        _mark(self.model.objective, "region:loss")

    def step(self, rows: np.ndarray) -> float:
        """Returns this process's part of the mean loss."""
        with record_function("region:data"):
            batch = collate(self.samples.take(rows)).to(self.processes.device)
        key, rank = derive_key(self.seed, "step", self.steps), self.processes.data.rank
        torch.manual_seed(derive_key(self.seed, "dropout", self.steps, rank))
        supervision = self.model.supervise(batch, key, derive_key(key, "dropout", rank, 0))
        (targets,) = self.processes.world.sum([supervision.count], dtype=torch.int64)
        loss = self.engine.forward_backward([supervision], StepContext(key), targets)
        with record_function("region:optimiser"):
            self.engine.step(1.0)
        self.steps += 1
        return loss.item() / max(targets, 1)


class Baseline:
    def __init__(self, shape: Shape, samples: Sequences, seed: int = 1):
        torch.manual_seed(seed)
        self.samples, self.length = samples, shape.length
        self.model = padded_baseline.PaddedHSTU(**shape.baseline())
        self.optimizer = padded_baseline.optimizer(self.model)

    def step(self, rows: np.ndarray) -> float:
        with record_function("region:data"):
            batch = padded_baseline.pad([self._sample(row) for row in rows], self.length)
        loss = self.model(batch)
        loss.backward()
        with record_function("region:optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def _sample(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = self.samples
        one = slice(samples.offsets_R1[row], samples.offsets_R1[row + 1])
        assert samples.timestamps_A is not None
        return torch.from_numpy(samples.items_A[one]), torch.from_numpy(samples.timestamps_A[one])


SIDES: dict[str, type[Ours] | type[Baseline]] = {"ours": Ours, "baseline": Baseline}


def _mark(module: torch.nn.Module, name: str) -> None:
    """Mark the forward of ``module`` as a region of the profile."""
    open_marks: list[Any] = []

    def enter(*_: Any) -> None:
        open_marks.append(record_function(name))
        open_marks[-1].__enter__()

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
