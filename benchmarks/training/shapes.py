"""The published hyper-parameters, as gr's config and as the baseline's arguments, and the sequences to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import lengths
from gr.config import RunConfig, from_dict, override
from gr.data.dataset import SequenceDataset
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.errors import UserError
from gr.models.retrieval import Retrieval
from gr.processes import Processes


@dataclass(frozen=True)
class Shape:
    """A row of the table of published settings (Zhai et al., ICML 2024); ``users``: how many are generated."""

    name: str
    items: int
    length: int
    dim: int
    layers: int
    heads: int
    qk_dim: int
    v_dim: int
    negatives: int
    dropout: float
    users: int
    batch: int = 128
    temperature: float = 0.05

    def baseline(self) -> dict[str, Any]:
        """Arguments of PaddedHSTU."""
        names = "items length dim layers heads qk_dim v_dim negatives dropout temperature"
        return {name: getattr(self, name) for name in names.split()}


ML_1M = Shape("ml-1m", 3883, 200, 50, 2, 1, 50, 50, 128, 0.2, users=6040)
BOOKS = Shape("books", 695_762, 50, 64, 4, 4, 16, 16, 512, 0.5, users=20_000)
SHAPES = {shape.name: shape for shape in (ML_1M, BOOKS)}


def config(shape: Shape, overrides: Sequence[str] = ()) -> RunConfig:
    """gr's config of a shape, with dotted overrides."""
    run = from_dict(
        {
            "data": {"path": "unused", "max_length": shape.length},
            "model": {
                "dim": shape.dim,
                "input": {"dropout": shape.dropout},
                "encoder": {
                    "name": "hstu",
                    "layers": shape.layers,
                    "heads": shape.heads,
                    "qk_dim": shape.qk_dim,
                    "v_dim": shape.v_dim,
                    "dropout": shape.dropout,
                },
                "similarity": {"temperature": shape.temperature},
            },
            "objective": {"name": "sampled_softmax", "negatives": shape.negatives},
            "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
            "train": {"global_batch": shape.batch},
        }
    )
    return override(run, overrides) if overrides else run


@dataclass(frozen=True)
class _Items:
    """A catalogue whose items are all alike."""

    rows: int

    @property
    def training_counts(self) -> Tensor:
        return torch.ones(self.rows, dtype=torch.int64)


def model(shape: Shape, run: RunConfig | None = None, processes: Processes | None = None) -> Retrieval:
    """gr's model of a shape, under a config of it; on this process's device, the CPU without ``processes``."""
    run, processes = run or config(shape), processes or Processes(torch.device("cpu"))
    return run.model.build(run, _Items(shape.items), processes).place(processes.device)


def read(path: Path) -> tuple[Sequences, int]:
    """All sequences of a prepared dataset, and the size of its catalogue."""
    dataset = SequenceDataset(path)
    if not dataset.has_timestamps:
        raise UserError(f"'{path}' has no timestamps, and the benchmark's model has a time bias: use ml-1m")
    return dataset.read_rows(0, dataset.users), dataset.items


def generate(shape: Shape, seed: int = 1) -> Sequences:
    """Users with the published data's distribution of lengths, items of a skewed popularity and uneven times."""
    rng = np.random.default_rng(seed)
    uniform_R = rng.random(shape.users)
    lengths_R = lengths.books(uniform_R) if shape.name == "books" else lengths.ml_1m(uniform_R)
    offsets_R1 = np.concatenate([[0], np.cumsum(lengths_R)])
    actions = int(offsets_R1[-1])
    seconds_A = np.cumsum(np.exp(rng.uniform(0, np.log(1e6), actions)).astype(np.int64))
    return Sequences.of(
        np.arange(shape.users),
        offsets_R1,
        item=(shape.items * rng.random(actions) ** 2).astype(np.int32),
        time=seconds_A,
    )


def training_samples(rows: Sequences, length: int) -> Sequences:
    """What training sees: all but each user's last action, the latest ``length`` inputs and their targets."""
    stop = LeaveOneOut(LeaveOneOut.Config(holdout=1)).train_stop(rows)
    kept = np.flatnonzero(stop >= 2)
    return rows.take(kept, np.maximum(stop[kept] - (length + 1), 0), stop[kept])


def batches(samples: Sequences, size: int, seed: int = 1) -> Iterator[np.ndarray]:
    """Rows of batch after batch, epoch after epoch, without end."""
    if len(samples) < size:
        raise UserError(f"the dataset has {len(samples)} users to train on, a batch needs {size}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(samples))
        for start in range(0, len(samples) - size + 1, size):
            yield order[start : start + size]
