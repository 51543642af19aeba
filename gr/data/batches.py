"""Batches: what training reads, and how it is cut, whoever reads it.

Windows, global batches and shares are pure functions of a :class:`Plan`, a dataset and numbers; an engine of ingest
(``registry.INGEST``) calls them where and when it likes, and yields the same batches as every other:

    window of the order -> rows of global batches -> each rank's share

Shapes: R users of a block, G samples of a global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gr.batch import SequenceBatch
from gr.data.collate import collate
from gr.data.dataset import SequenceDataset
from gr.data.deal import deal
from gr.data.order import Order
from gr.data.sequences import ITEM, Sequences
from gr.data.split import Split
from gr.data.stores import in_order


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


class Batches(Protocol):
    """The training batches of one rank."""

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """Batches ``start``, ``start + 1``, ... of an epoch."""
        ...


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut.

    global_batch: G.  max_length: inputs kept of a sequence, the latest.  tail: what becomes of a short last batch:
    "keep" or "drop".  columns: of actions (or users) that batches carry beside ``item``; None: every one of numbers.
    """

    split: Split
    order: Order
    global_batch: int
    max_length: int
    tail: str = "keep"
    columns: frozenset[str] | None = None

    @property
    def per_epoch(self) -> int:
        whole, rest = divmod(self.order.rows, self.global_batch)
        return whole + (1 if rest and self.tail == "keep" else 0)

    @property
    def read_columns(self) -> frozenset[str] | None:
        """The columns to read: what batches carry, and what the split looks at."""
        return None if self.columns is None else self.columns | self.split.needs | {ITEM}


def samples(plan: Plan, rows: Sequences) -> Sequences:
    """A block's rows cut to what training may see, and to the latest max_length inputs and their targets."""
    stop_R = plan.split.train_stop(rows)
    first_R = np.maximum(stop_R - (plan.max_length + 1), 0)
    kept = rows if plan.columns is None else rows.select({ITEM, *plan.columns})
    return kept.take(np.arange(len(rows)), first_R, stop_R)


def window(plan: Plan, read: Callable[[int], Sequences], epoch: int, number: int, skip: int = 0) -> Sequences:
    """The samples of a window in the order of their positions, without its first ``skip``.  ``read``: block number ->
    the block's samples."""
    blocks, ordinals = plan.order.window(epoch, number)
    rows = Sequences.concatenate(read(block) for block in blocks.tolist())
    # blocks are sorted, hence so are the ordinals of the concatenated rows
    return rows.take(np.searchsorted(rows.ordinals_R, ordinals[skip:]))


def windows(plan: Plan, read: Callable[[int], Sequences], epoch: int, position: int) -> Iterator[Sequences]:
    """The samples of an epoch from ``position`` on, a window at a time."""
    order = plan.order
    for number in range(order.window_of(position), order.windows):
        yield window(plan, read, epoch, number, max(position - number * order.window_rows, 0))


def global_batches(plan: Plan, parts: Iterable[Sequences], start: int) -> Iterator[tuple[int, Sequences]]:
    """(k, rows of global batch k) from ``start`` on; ``parts``: consecutive samples from position start * G on."""
    index, size = start, plan.global_batch
    pending: Sequences | None = None
    for part in parts:
        pending = part if pending is None or not len(pending) else Sequences.concatenate([pending, part])
        cut = 0
        while len(pending) - cut >= size:
            yield index, pending.slice(cut, cut + size)
            index, cut = index + 1, cut + size
        pending = pending.slice(cut, len(pending))
    if pending is not None and len(pending) and plan.tail == "keep":
        yield index, pending


def share(plan: Plan, index: int, rows: Sequences, rank: int, ranks: int) -> GlobalBatch:
    """What ``rank`` of ``ranks`` trains on of the global batch ``index``, whose rows are given."""
    digest = hashlib.blake2b(rows.ordinals_R.astype("<i8").tobytes(), digest_size=8)
    digest.update(rows.items_A.astype("<i4").tobytes())
    count = len(rows)
    if ranks > 1:
        rows = rows.take(np.flatnonzero(deal(rows.lengths_R, ranks) == rank))
    return GlobalBatch(index, count, digest.hexdigest(), collate(rows, plan.columns))


def read_samples(plan: Plan, dataset: SequenceDataset, block: int) -> Sequences:
    """A block of the dataset, read as far as the plan needs it, and cut."""
    return samples(plan, dataset.read_block(block, plan.read_columns))


def epoch_batches(
    plan: Plan,
    dataset: SequenceDataset,
    epoch: int,
    start: int,
    rank: int,
    ranks: int,
    threads: bool = True,
) -> Iterator[GlobalBatch]:
    """All of the above in one process, block after block; of a store some blocks ahead, where ``threads`` may be."""
    order, position = plan.order, start * plan.global_batch
    numbers = range(order.window_of(position), order.windows)
    blocks = (block for number in numbers for block in order.blocks(epoch, number).tolist())
    read = in_order(  # as windows ask for them
        lambda block: read_samples(plan, dataset, block), blocks, dataset.ahead if threads else 0
    )
    parts = windows(plan, lambda block: next(read), epoch, position)
    for index, rows in global_batches(plan, parts, start):
        yield share(plan, index, rows, rank, ranks)
