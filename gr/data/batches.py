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

from gr.batch import TARGETS_FROM, SequenceBatch
from gr.data.collate import collate
from gr.data.dataset import SequenceDataset
from gr.data.deal import deal
from gr.data.order import Order
from gr.data.periods import Chronological, Periods
from gr.data.sequences import ITEM, Sequences, latest
from gr.data.split import Split
from gr.data.stores import in_order
from gr.data.transforms.transform import Draws, Filter, Sampler


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
    def epochs(self) -> int | None:
        """How many epochs there are, where that is not for the config to say."""
        ...

    def in_epoch(self, epoch: int) -> int:
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
    samplers: what makes a training example of a sequence, one after the other.  filters: of the dataset's actions.
    """

    split: Split
    order: Order
    global_batch: int
    max_length: int
    tail: str = "keep"
    columns: frozenset[str] | None = None
    samplers: tuple[Sampler, ...] = ()
    filters: tuple[Filter, ...] = ()

    @property
    def epochs(self) -> int | None:
        """The periods of a chronological split."""
        return self.split.epochs if isinstance(self.split, Chronological) else None

    def samples(self, epoch: int) -> int:
        """Samples of an epoch: positions of its order."""
        if self._periods is None:
            return self.order.rows
        return len(self._periods.samples(epoch, self.max_length))

    def edges(self, epoch: int) -> np.ndarray:
        """(windows + 1,) the positions at which an epoch's windows begin, and where the last one ends."""
        order = self.order
        if self._periods is None:
            return np.minimum(np.arange(order.windows + 1) * order.window_rows, order.rows)
        samples = self._periods.samples(epoch, self.max_length)
        counts = [0]
        for number in range(order.windows):
            first = order.window(epoch, number)[0] * order.block_rows
            counts.append(
                int(np.diff(np.searchsorted(samples, [first, first + order.block_rows]), axis=0).sum())
            )
        return np.cumsum(counts)

    def in_epoch(self, epoch: int) -> int:
        """Batches of an epoch."""
        rows = self.samples(epoch)
        whole, rest = divmod(rows, self.global_batch)
        return whole + (1 if rest and self.tail == "keep" else 0)

    def window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of a window of the order that hold samples of the epoch, and these samples' ordinals in the order
        of their positions."""
        blocks, ordinals = self.order.window(epoch, number)
        if self._periods is None:
            return blocks, ordinals
        samples = self._periods.samples(epoch, self.max_length)
        counts = np.searchsorted(samples, ordinals, "right") - np.searchsorted(samples, ordinals, "left")
        ordinals = np.repeat(ordinals, counts)
        return np.intersect1d(blocks, ordinals // self.order.block_rows), ordinals

    def blocks(self, epoch: int, number: int) -> np.ndarray:
        """The blocks that :meth:`window` reads."""
        return self.order.blocks(epoch, number) if self._periods is None else self.window(epoch, number)[0]

    @property
    def read_columns(self) -> frozenset[str] | None:
        """The columns to read: what batches carry, and what the split and the samplers look at."""
        if self.columns is None:
            return None
        return self.columns.union({ITEM}, self.split.needs, *(sampler.needs for sampler in self.samplers))

    @property
    def _periods(self) -> Periods | None:
        return self.split.periods if isinstance(self.split, Chronological) else None


def samples(plan: Plan, rows: Sequences, epoch: int) -> Sequences:
    """The training examples of a block's rows: cut to what training may see, transformed, and at most the latest
    max_length inputs and their targets."""
    read = plan.read_columns
    rows = rows if read is None else rows.select(read)
    whole = any(sampler.whole for sampler in plan.samplers)
    rows = plan.split.at(epoch).examples(rows, whole, plan.max_length)
    for number, sampler in enumerate(plan.samplers):
        draws = Draws.of(plan.order.seed, epoch, number, sampler.config.name)
        rows = sampler.apply(rows, draws, plan.max_length)
    rows = latest(rows, plan.max_length)
    return rows if plan.columns is None else rows.select({ITEM, TARGETS_FROM, *plan.columns})


def window(plan: Plan, read: Callable[[int], Sequences], epoch: int, number: int, skip: int = 0) -> Sequences:
    """The samples of a window in the order of their positions, without its first ``skip``.  ``read``: block number ->
    the block's samples in this epoch."""
    blocks, ordinals = plan.window(epoch, number)
    rows = Sequences.concatenate(read(block) for block in blocks.tolist())
    # blocks are sorted, hence so are the ordinals of the concatenated rows, of which one may have several samples
    first = np.searchsorted(rows.ordinals_R, ordinals, "left")
    again = np.zeros(len(ordinals), np.int64)
    if plan.epochs is not None:
        starts = np.flatnonzero(np.diff(ordinals, prepend=-1))
        again = np.arange(len(ordinals)) - np.repeat(starts, np.diff(starts, append=len(ordinals)))
    return rows.take((first + again)[skip:])


def windows_from(plan: Plan, epoch: int, position: int) -> Iterator[tuple[int, int]]:
    """(number, samples to skip) of each window with samples of an epoch from ``position`` on."""
    edges = plan.edges(epoch)
    for number in range(int(np.searchsorted(edges, position, "right")) - 1, plan.order.windows):
        skip = max(position - int(edges[number]), 0)
        if edges[number + 1] - edges[number] > skip:
            yield number, skip


def windows(plan: Plan, read: Callable[[int], Sequences], epoch: int, position: int) -> Iterator[Sequences]:
    """The samples of an epoch from ``position`` on, a window at a time."""
    for number, skip in windows_from(plan, epoch, position):
        yield window(plan, read, epoch, number, skip)


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


def read_samples(plan: Plan, dataset: SequenceDataset, block: int, epoch: int) -> Sequences:
    """The examples of a block of the dataset, which is read as far as the plan needs it."""
    return samples(plan, dataset.filtered(plan.filters).read_block(block, plan.read_columns), epoch)


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
    position = start * plan.global_batch
    numbers = (number for number, _ in windows_from(plan, epoch, position))
    blocks = (block for number in numbers for block in plan.blocks(epoch, number).tolist())
    read = in_order(  # as windows ask for them
        lambda block: read_samples(plan, dataset, block, epoch), blocks, dataset.ahead if threads else 0
    )
    parts = windows(plan, lambda block: next(read), epoch, position)
    for index, rows in global_batches(plan, parts, start):
        yield share(plan, index, rows, rank, ranks)
