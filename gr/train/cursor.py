"""Cursor: where a run is.  With the parameters and moments it is the whole state of a run, for every random draw
is a function of the seed and the step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Cursor:
    """``generation``: the dataset's.  ``epoch``, ``batch``: the next global batch.  ``step``: optimiser steps done.
    ``data_digest``: chained over all global batches so far, the same for any number of processes.
    ``metrics_rows``: rows of metrics.jsonl so far.  ``best``: the best validation so far (gr.train.selection.best_of).
    ``stale``: validations since.  ``flops``, ``tokens``: the model's operations, and real tokens, of all steps."""

    generation: str
    epoch: int = 0
    batch: int = 0
    step: int = 0
    data_digest: str = ""
    metrics_rows: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    finished: bool = False
    flops: int = 0
    tokens: int = 0

    def advance(self, batch_digest: str) -> None:
        self.batch += 1
        self.step += 1
        self.data_digest = hashlib.blake2b(
            (self.data_digest + batch_digest).encode(), digest_size=8
        ).hexdigest()

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
