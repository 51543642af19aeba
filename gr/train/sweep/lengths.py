"""How long the sequences are that a run's batches hold: what its operations are counted from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from gr.config import RunConfig
from gr.data.batches import Batches
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
    read = _known(_Key(config, config.data.model_dump_json(), train.seed, train.epochs, train.global_batch))
    return Lengths(tuple(read.first(steps)), read.data.dataset.items), read.available


class _Key:
    """A config, equal to another where their batches are."""

    def __init__(self, config: RunConfig, *parts: object) -> None:
        self.config, self.parts = config, parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


class _Read:
    """What has been read of a run's batches so far.  available: how many there are."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.processes = config, Processes(torch.device("cpu"))
        self.data = open_data(config)
        batches = self._source()
        self.epochs = range(batches.epochs or config.train.epochs)
        self.available = sum(map(batches.in_epoch, self.epochs))
        self._found: list[tuple[np.ndarray, int]] = []

    def first(self, steps: int) -> list[tuple[np.ndarray, int]]:
        if len(self._found) < min(steps, self.available):
            # twice as many: members of a sweep want more and more of the same
            self._found = list(self._batches(max(steps, 2 * len(self._found))))
        return self._found[:steps]

    def _source(self) -> Batches:
        return build_batches(self.config, self.data, frozenset({"item"}), self.processes)

    def _batches(self, steps: int) -> Iterator[tuple[np.ndarray, int]]:
        batches, left = self._source(), steps
        with batches.opened(self.processes):
            for epoch in self.epochs:
                with closing(batches.epoch(epoch)) as reading:
                    for batch in islice(reading, left):
                        inputs_B = np.maximum(np.asarray(batch.share.lengths, np.int64) - 1, 0)
                        yield inputs_B, int(inputs_B.sum())
                        left -= 1
                if not left:
                    return


@lru_cache(maxsize=32)
def _known(key: _Key) -> _Read:
    return _Read(key.config)
