"""How long the sequences are that a run's batches hold: what its operations are counted from."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from gr.config import RunConfig
from gr.errors import UserError
from gr.processes import Processes
from gr.train.parts import build_batches, open_data


@dataclass(frozen=True)
class Lengths:
    """batches: of each global batch (int64 input lengths of its sequences, number of targets).  items: I."""

    batches: tuple[tuple[np.ndarray, int], ...]
    items: int


def batch_lengths(config: RunConfig, steps: int) -> tuple[Lengths, int]:
    """Those of the first ``steps`` batches of a run (fewer where it has no more), and how many it has in all.

    They are read again, in this process, without the model: the order of samples is a function of data and seed.
    """
    if config.model.task.name != "next_item":
        raise UserError(
            f"operations are counted for model.task next_item, and it is {config.model.task.name}: use next_item",
        )
    train = config.train
    return _lengths(
        _Key(config, config.data.model_dump_json(), train.seed, train.epochs, train.global_batch), steps
    )


class _Key:
    """A config, equal to another where their batches are."""

    def __init__(self, config: RunConfig, *parts: object) -> None:
        self.config, self.parts = config, parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


@lru_cache(maxsize=32)
def _lengths(key: _Key, steps: int) -> tuple[Lengths, int]:
    config = key.config
    processes = Processes(torch.device("cpu"))
    data = open_data(config)
    batches = build_batches(config, data, frozenset({"item"}), processes)
    epochs = range(batches.epochs or config.train.epochs)
    found: list[tuple[np.ndarray, int]] = []
    with batches.opened(processes):
        for epoch in epochs:
            if len(found) == steps:
                break
            with closing(batches.epoch(epoch)) as reading:
                for batch in islice(reading, steps - len(found)):
                    inputs_B = np.maximum(np.asarray(batch.share.lengths, np.int64) - 1, 0)
                    found.append((inputs_B, int(inputs_B.sum())))
    return Lengths(tuple(found), data.dataset.items), sum(map(batches.in_epoch, epochs))
