"""Batches: what training reads, and how it is cut, whoever reads it.

Windows, global batches and shares are pure functions of a :class:`Plan`, a dataset and numbers; an engine of ingest
(``registry.INGEST``) calls them where and when it likes, and yields the same batches as every other:

    window of the order -> cut where global batches meet -> dealt to ranks -> each rank's share

Shapes: R users of a block, G samples of a global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gr.data.dataset import SequenceDataset
from gr.data.deal import deal, skew
from gr.data.order import Order
from gr.data.sequences import ITEM, Sequences, Stretches
from gr.data.split import Split

if TYPE_CHECKING:  # what reads on a cluster's nodes does without torch
    from gr.batch import SequenceBatch
    from gr.processes import Processes


@dataclass(frozen=True)
class Described:
    """A global batch without its rows.

    ``index``: k, its number in its epoch.  ``samples``: sequences over all ranks.  ``digest``: of the whole batch
    (ordinals and items in order), the same on every rank and for any number of them.  ``skew``: the cost of the
    heaviest rank over the mean, as the batch is dealt, and as it would be in equal consecutive parts.
    """

    index: int
    samples: int
    digest: str
    skew: tuple[float, float]


@dataclass(frozen=True)
class GlobalBatch(Described):
    """One rank's ``share`` of a global batch."""

    share: SequenceBatch


@dataclass(frozen=True)
class Shares:
    """One rank's shares of global batches, not yet tensors: ``rows``, ``counts[i]`` of them of ``batches[i]``."""

    batches: tuple[Described, ...]
    counts: tuple[int, ...]
    rows: Sequences


class Batches(Protocol):
    """The training batches of one rank."""

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        ...

    def opened(self, processes: Processes) -> AbstractContextManager[None]:
        """Around all reading: what an engine needs beside the dataset.  All processes enter it together."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Generator[GlobalBatch]:
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

    def bounds(self, index: int) -> tuple[int, int]:
        """The positions, from and to (exclusive), of global batch ``index``."""
        return index * self.global_batch, min((index + 1) * self.global_batch, self.order.rows)

    def seam(self, number: int) -> tuple[int, int] | None:
        """The global batch that began before window ``number`` and ends in it, and the window in which it began; None
        where there is none."""
        start, stop = number * self.order.window_rows, (number + 1) * self.order.window_rows
        index = start // self.global_batch
        if index * self.global_batch == start or self.bounds(index)[1] > stop or index >= self.per_epoch:
            return None
        return index, self.began(number)

    def began(self, number: int) -> int:
        """The window in which the global batch begins that has the first position of window ``number``."""
        index = number * self.order.window_rows // self.global_batch
        return self.order.window_of(index * self.global_batch)

    @property
    def read_columns(self) -> frozenset[str] | None:
        """The columns to read: what batches carry, and what the split looks at."""
        return None if self.columns is None else self.columns | self.split.needs | {ITEM}


def samples(plan: Plan, rows: Sequences) -> Stretches:
    """Of a block's rows what training may see: the latest max_length inputs and their targets."""
    stop_R = plan.split.train_stop(rows)
    first_R = np.maximum(stop_R - (plan.max_length + 1), 0)
    kept = rows if plan.columns is None else rows.select({ITEM, *plan.columns})
    return Stretches.of(kept).cut(first_R, stop_R).compact()


def window(plan: Plan, read: Callable[[int], Stretches], epoch: int, number: int, skip: int = 0) -> Stretches:
    """The samples of a window in the order of their positions, without its first ``skip``.  ``read``: block number ->
    the block's samples."""
    blocks, ordinals = plan.order.window(epoch, number)
    rows = Stretches.concatenate(read(block) for block in blocks.tolist()).ready()
    # blocks are sorted, hence so are the ordinals of their rows
    return rows.take(np.searchsorted(rows.ordinals_R, ordinals[skip:]))


def windows(plan: Plan, read: Callable[[int], Stretches], epoch: int, position: int) -> Iterator[Stretches]:
    """The samples of an epoch from ``position`` on, a window at a time."""
    order = plan.order
    for number in range(order.window_of(position), order.windows):
        yield window(plan, read, epoch, number, max(position - number * order.window_rows, 0))


def cut(plan: Plan, position: int, rows: Stretches) -> Iterator[tuple[int, Stretches]]:
    """(k, those of ``rows`` that are in global batch k); ``rows``: the samples from ``position`` on.  The first and the
    last batch may be in pieces; a dropped tail is in none."""
    start, end = position, position + len(rows)
    while position < end and (index := position // plan.global_batch) < plan.per_epoch:
        stop = min(plan.bounds(index)[1], end)
        yield index, rows.slice(position - start, stop - start)
        position = stop


def global_batches(plan: Plan, parts: Iterable[Stretches], start: int) -> Iterator[tuple[int, Stretches]]:
    """(k, rows of global batch k) from ``start`` on; ``parts``: consecutive samples from position start * G on."""
    position, pieces = start * plan.global_batch, []
    for part in parts:
        for index, piece in cut(plan, position, part):
            pieces.append(piece)
            position += len(piece)
            if position == plan.bounds(index)[1]:
                yield index, Stretches.concatenate(pieces)
                pieces = []


def parted(plan: Plan, number: int, rows: Stretches) -> tuple[Stretches, int, Stretches, Stretches]:
    """A window's ``rows`` in three: what belongs to a global batch that began earlier, whole global batches (the number
    of the first comes before them), and the beginning of one that goes on in the next window."""
    size, position = plan.global_batch, number * plan.order.window_rows
    end = position + len(rows)
    begin = min(-(-position // size) * size, end)
    ends_here = end == plan.order.rows and plan.tail == "keep"
    stop = max(end if ends_here else end // size * size, begin)
    first, whole, last = (
        rows.slice(start - position, to - position)
        for start, to in ((position, begin), (begin, stop), (stop, end))
    )
    return first, begin // size, whole, last


def shares(plan: Plan, index: int, rows: Stretches, ranks: int) -> list[Shares]:
    """Each rank's shares of the global batches from ``index`` on, whose rows are given one after the other."""
    batches, dealt = [], [np.empty(0, np.int64)]
    for number, batch in cut(plan, index * plan.global_batch, rows):
        described, rank_G = _dealt(number, batch.copied([ITEM]), ranks)
        batches.append(described)
        dealt.append(rank_G)
    rank_R = np.concatenate(dealt)
    return [
        Shares(
            tuple(batches),
            tuple(int((rank_G == rank).sum()) for rank_G in dealt[1:]),
            rows.take(np.flatnonzero(rank_R == rank)).copied(),
        )
        for rank in range(ranks)
    ]


def share(plan: Plan, index: int, rows: Stretches, rank: int, ranks: int) -> GlobalBatch:
    """What ``rank`` of ``ranks`` trains on of the global batch ``index``, whose rows are given."""
    whole = rows.copied(None if ranks == 1 else [ITEM])
    described, rank_G = _dealt(index, whole, ranks)
    own = whole if ranks == 1 else rows.take(np.flatnonzero(rank_G == rank)).copied()
    return next(collated(plan, Shares((described,), (len(own),), own)))


def collated(plan: Plan, shares: Shares, start: int = 0) -> Iterator[GlobalBatch]:
    """The shares of global batches ``start`` and later as tensors, which have their own memory: the rows may lie in
    some that is only lent."""
    from gr.data.collate import collate

    first = 0
    for batch, count in zip(shares.batches, shares.counts, strict=True):
        if batch.index >= start:
            rows = shares.rows.slice(first, first + count)
            yield GlobalBatch(**vars(batch), share=collate(rows, plan.columns))
        first += count


def _dealt(index: int, rows: Sequences, ranks: int) -> tuple[Described, np.ndarray]:
    """The global batch ``index``, whose rows are given, and (G,) the rank that each of them goes to."""
    digest = hashlib.blake2b(np.ascontiguousarray(rows.ordinals_R, "<i8"), digest_size=8)
    digest.update(np.ascontiguousarray(rows.items_A, "<i4"))
    lengths_G, skews = rows.lengths_R, (1.0, 1.0)
    rank_G = deal(lengths_G, ranks)
    if ranks > 1:
        consecutive_G = np.arange(len(rows)) * ranks // max(len(rows), 1)
        skews = skew(lengths_G, rank_G, ranks), skew(lengths_G, consecutive_G, ranks)
    return Described(index, len(rows), digest.hexdigest(), skews), rank_G


def read_samples(plan: Plan, dataset: SequenceDataset, block: int) -> Stretches:
    """A block of the dataset, read as far as the plan needs it, and cut."""
    return samples(plan, dataset.read_block(block, plan.read_columns))


def epoch_batches(
    plan: Plan, read: Callable[[int], Stretches], epoch: int, start: int, rank: int, ranks: int
) -> Iterator[GlobalBatch]:
    """All of the above in one process, window after window.  ``read``: block number -> the block's samples."""
    parts = windows(plan, read, epoch, start * plan.global_batch)
    for index, rows in global_batches(plan, parts, start):
        yield share(plan, index, rows, rank, ranks)
