"""A dataset and a plan whose windows tests make on a cluster; its workers import this, so it does without torch."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr.data.batches import Plan
from gr.data.dataset import SequenceDataset
from gr.data.order import Order
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.writing import DatasetWriter

ROWS, BLOCK_ROWS = 203, 8


def write_dataset(path: Path) -> SequenceDataset:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 30, ROWS))])
    items = rng.integers(0, 40, offsets[-1]).astype(np.int32)
    kinds = np.array(["view", "buy", "wish"], object)[rng.integers(0, 3, offsets[-1])]
    writer = DatasetWriter(path, "t", block_rows=BLOCK_ROWS)
    writer.add(Sequences.of(np.arange(ROWS), offsets, item=items, time=np.arange(offsets[-1]), kind=kinds))
    return writer.finish(pa.table({"item_id": np.arange(40), "count": np.bincount(items, minlength=40)}))


class Odd(LeaveOneOut):
    """A split whose tasks take any time, or end in the middle of it.

    naps: seconds at most that a block takes.  killer: a file; the first who finds it missing makes it and dies.
    """

    naps: float = 0.0
    killer: str | None = None

    def train_stop(self, rows: Sequences) -> np.ndarray:
        first = int(rows.ordinals_R[0])
        time.sleep(self.naps * (first * 2654435761 % 101) / 100)
        if self.killer is not None and first == 5 * BLOCK_ROWS and not os.path.exists(self.killer):
            Path(self.killer).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_stop(rows)


def plan_of(dataset: SequenceDataset, naps: float = 0.0, killer: Path | None = None, **changed) -> Plan:
    split = Odd(LeaveOneOut.Config())
    split.naps, split.killer = naps, None if killer is None else str(killer)
    order = Order(dataset.manifest.fingerprint, 3, dataset.users, BLOCK_ROWS, window_blocks=3)
    # 24 rows of a window, 10 of a batch: most windows have pieces at both ends
    return replace(
        Plan(split, order, global_batch=10, max_length=12, columns=frozenset({"time", "kind"})), **changed
    )
