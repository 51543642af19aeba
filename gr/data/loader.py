"""The embedded engine: carries the order out in one thread beside the training step.

Every rank reads its windows' blocks, keeps its share of each global batch and forgets the rest; memory is two
windows of blocks at most (the one being cut and the one being read).
"""

from __future__ import annotations

import atexit
import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gr.batch import SequenceBatch
from gr.data.collate import collate
from gr.data.dataset import SequenceDataset
from gr.data.deal import deal
from gr.data.order import Order
from gr.data.sequences import Sequences
from gr.data.split import Split

T = TypeVar("T")


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's share of a global batch.

    ``index``: k, the batch's number in its epoch.  ``samples``: sequences over all ranks.  ``digest``: of the
    whole global batch (ordinals and items in order), the same on every rank and for any number of them.
    """

    index: int
    samples: int
    digest: str
    share: SequenceBatch


class TrainingBatches:
    """The training batches of one rank; with pin_memory in memory from which a GPU copies without being waited for."""

    def __init__(
        self,
        dataset: SequenceDataset,
        split: Split,
        order: Order,
        *,
        global_batch: int,
        max_length: int,
        tail: str = "keep",
        rank: int = 0,
        ranks: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ):
        self.dataset, self.split, self.order = dataset, split, order
        self.global_batch, self.max_length, self.tail = global_batch, max_length, tail
        self.rank, self.ranks, self.prefetch, self.pin_memory = rank, ranks, prefetch, pin_memory

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        whole, rest = divmod(self.order.rows, self.global_batch)
        return whole + (1 if rest and self.tail == "keep" else 0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """Batches ``start``, ``start + 1``, ... of an epoch, read ahead in a thread."""
        yield from read_ahead(self._epoch(epoch, start), self.prefetch)

    def _epoch(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        index = start
        pending: Sequences | None = None
        for rows in self._windows(epoch, start * self.global_batch):
            pending = rows if pending is None else Sequences.concatenate([pending, rows])
            cut = 0
            while len(pending) - cut >= self.global_batch:
                yield self._share(index, pending.take(np.arange(cut, cut + self.global_batch)))
                index, cut = index + 1, cut + self.global_batch
            pending = pending.take(np.arange(cut, len(pending)))
        if pending is not None and len(pending) and self.tail == "keep":
            yield self._share(index, pending)

    def _windows(self, epoch: int, position: int) -> Iterator[Sequences]:
        """The training samples from ``position`` on, a window at a time."""
        for window in range(self.order.window_of(position), self.order.windows):
            blocks, ordinals = self.order.window(epoch, window)
            ordinals = ordinals[max(position - window * self.order.window_rows, 0) :]
            rows = Sequences.concatenate(self._samples(block) for block in blocks)
            # blocks are sorted, hence so are the ordinals of the concatenated rows
            yield rows.take(np.searchsorted(rows.ordinals_R, ordinals))

    def _samples(self, block: int) -> Sequences:
        rows = self.dataset.read_block(int(block))
        stop = self.split.train_stop(rows)
        first = np.maximum(stop - (self.max_length + 1), 0)
        return rows.take(np.arange(len(rows)), first, stop)

    def _share(self, index: int, rows: Sequences) -> GlobalBatch:
        digest = hashlib.blake2b(rows.ordinals_R.astype("<i8").tobytes(), digest_size=8)
        digest.update(rows.items_A.astype("<i4").tobytes())
        samples = len(rows)
        if self.ranks > 1:
            mine = np.flatnonzero(deal(rows.lengths_R, self.ranks) == self.rank)
            rows = rows.take(mine)
        share = collate(rows)
        return GlobalBatch(
            index, samples, digest.hexdigest(), share.pin_memory() if self.pin_memory else share
        )


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """``items``, produced in a thread at most ``depth`` ahead; its errors are raised here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=produce, name="gr-read-ahead", daemon=True)
    thread.start()

    def finish() -> None:
        stop.set()
        thread.join()

    # A daemon thread inside a torch operation when the interpreter ends aborts the process (SIGABRT, "terminate
    # called without an active exception"): none may outlive its reader, nor what still holds one at exit.
    atexit.register(finish)
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        finish()
        atexit.unregister(finish)
