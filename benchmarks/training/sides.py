"""The two trainers behind one face: a step from rows of in-memory sequences to moved parameters.

Parts of a step are marked with ``record_function("region:...")``; outside a profile a mark costs about a microsecond.
"""

from __future__ import annotations

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
    """The step of gr.train.Trainer on one process: supervise, forward, backward, move."""

    def __init__(self, shape: Shape, samples: Sequences, seed: int = 1):
        self.samples, self.seed, self.steps = samples, seed, 0
        settings = config(shape)
        self.model = model(shape)
        alone, optimizer = Processes(torch.device("cpu")), settings.optimizer.build()
        self.engine = settings.train.engine.build(self.model, optimizer, alone, clip_norm=None, bf16=False)
        _mark(self.model.objective, "region:loss")

    def step(self, rows: np.ndarray) -> float:
        with record_function("region:data"):
            batch = collate(self.samples.take(rows))
        key = derive_key(self.seed, "step", self.steps)
        torch.manual_seed(derive_key(self.seed, "dropout", self.steps, 0))
        supervision = self.model.supervise(batch, key)
        loss = self.engine.forward_backward([supervision], StepContext(key), supervision.count)
        with record_function("region:optimiser"):
            self.engine.step(1.0)
        self.steps += 1
        return loss.item() / supervision.count


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
