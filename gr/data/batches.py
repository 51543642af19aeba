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
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gr.batch import TARGETS_FROM
from gr.data.dataset import SequenceDataset
from gr.data.deal import deal, skew
from gr.data.order import Order
from gr.data.periods import Chronological, Periods
from gr.data.sequences import ITEM, Sequences, Stretches, latest
from gr.data.split import Split
from gr.data.stores import in_order
from gr.data.transforms.transform import Draws, Filter, Sampler

if TYPE_CHECKING:  # what reads on a cluster's nodes does without torch
    from gr.batch import SequenceBatch
    from gr.processes import Processes


SOME = 1 << 14
"""Items of a batch that go into its digest at a time."""


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
    def epochs(self) -> int | None:
        """How many epochs there are, where that is not for the config to say."""
        ...

    def in_epoch(self, epoch: int) -> int:
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

    def bounds(self, epoch: int, index: int) -> tuple[int, int]:
        """The positions, from and to (exclusive), of global batch ``index``."""
        return index * self.global_batch, min((index + 1) * self.global_batch, self.samples(epoch))

    def window_of(self, epoch: int, position: int) -> int:
        """The window in which a position lies."""
        return int(np.searchsorted(self.edges(epoch), position, "right")) - 1

    def seam(self, epoch: int, number: int) -> tuple[int, int] | None:
        """The global batch that began before window ``number`` and ends in it, and the window in which it began; None
        where there is none."""
        start, stop = self.edges(epoch)[number : number + 2].tolist()
        index = start // self.global_batch
        if index * self.global_batch == start or index >= self.in_epoch(epoch):
            return None
        return (index, self.began(epoch, number)) if start < self.bounds(epoch, index)[1] <= stop else None

    def began(self, epoch: int, number: int) -> int:
        """The window in which the global batch begins that has the first position of window ``number``."""
        start = int(self.edges(epoch)[number])
        return self.window_of(epoch, start - start % self.global_batch)

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


def samples(plan: Plan, rows: Sequences, epoch: int) -> Stretches:
    """The training examples of a block's rows: what training may see, transformed, and at most the latest max_length
    inputs and their targets."""
    whole = any(sampler.whole for sampler in plan.samplers)
    examples = plan.split.at(epoch).examples(rows, whole, plan.max_length)
    if plan.samplers:
        read = plan.read_columns
        transformed = examples.copied(None if read is None else read & rows.columns.keys())
        for number, sampler in enumerate(plan.samplers):
            draws = Draws.of(plan.order.seed, epoch, number, sampler.config.name)
            transformed = sampler.apply(transformed, draws, plan.max_length)
        examples = Stretches.of(latest(transformed, plan.max_length))
    if plan.columns is not None:
        examples = examples.select({ITEM, TARGETS_FROM, *plan.columns})
    return examples.compact()


def window(plan: Plan, read: Callable[[int], Stretches], epoch: int, number: int, skip: int = 0) -> Stretches:
    """The samples of a window in the order of their positions, without its first ``skip``.  ``read``: block number ->
    the block's samples in this epoch."""
    blocks, ordinals = plan.window(epoch, number)
    some = blocks.tolist() or plan.order.blocks(epoch, number)[:1].tolist()  # what the rows of none look like
    rows = Stretches.concatenate(read(block) for block in some).ready()
    # blocks are sorted, hence so are the ordinals of their rows, of which one may have several samples
    first = np.searchsorted(rows.ordinals_R, ordinals, "left")
    again = np.zeros(len(ordinals), np.int64)
    if plan.epochs is not None:
        starts = np.flatnonzero(np.diff(ordinals, prepend=-1))
        again = np.arange(len(ordinals)) - np.repeat(starts, np.diff(starts, append=len(ordinals)))
    return rows.take((first + again)[skip:])


def windows_from(plan: Plan, epoch: int, position: int) -> Iterator[tuple[int, int]]:
    """(number, samples to skip) of each window with samples of an epoch from ``position`` on."""
    edges = plan.edges(epoch)
    for number in range(plan.window_of(epoch, position), plan.order.windows):
        skip = max(position - int(edges[number]), 0)
        if edges[number + 1] - edges[number] > skip:
            yield number, skip


def windows(plan: Plan, read: Callable[[int], Stretches], epoch: int, position: int) -> Iterator[Stretches]:
    """The samples of an epoch from ``position`` on, a window at a time."""
    for number, skip in windows_from(plan, epoch, position):
        yield window(plan, read, epoch, number, skip)


def cut(plan: Plan, epoch: int, position: int, rows: Stretches) -> Iterator[tuple[int, Stretches]]:
    """(k, those of ``rows`` that are in global batch k); ``rows``: the samples from ``position`` on.  The first and the
    last batch may be in pieces; a dropped tail is in none."""
    start, end = position, position + len(rows)
    batches = plan.in_epoch(epoch)
    while position < end and (index := position // plan.global_batch) < batches:
        stop = min(plan.bounds(epoch, index)[1], end)
        yield index, rows.slice(position - start, stop - start)
        position = stop


def global_batches(
    plan: Plan, parts: Iterable[Stretches], epoch: int, start: int
) -> Iterator[tuple[int, Stretches]]:
    """(k, rows of global batch k) from ``start`` on; ``parts``: consecutive samples from position start * G on."""
    position, pieces = start * plan.global_batch, []
    for part in parts:
        for index, piece in cut(plan, epoch, position, part):
            pieces.append(piece)
            position += len(piece)
            if position == plan.bounds(epoch, index)[1]:
                yield index, Stretches.concatenate(pieces)
                pieces = []


def parted(
    plan: Plan, epoch: int, number: int, rows: Stretches
) -> tuple[Stretches, int, Stretches, Stretches]:
    """A window's ``rows`` in three: what belongs to a global batch that began earlier, whole global batches (the number
    of the first comes before them), and the beginning of one that goes on in the next window."""
    size, position = plan.global_batch, int(plan.edges(epoch)[number])
    end = position + len(rows)
    begin = min(-(-position // size) * size, end)
    ends_here = end == plan.samples(epoch) and plan.tail == "keep"
    stop = max(end if ends_here else end // size * size, begin)
    first, whole, last = (
        rows.slice(start - position, to - position)
        for start, to in ((position, begin), (begin, stop), (stop, end))
    )
    return first, begin // size, whole, last


def shares(plan: Plan, epoch: int, index: int, rows: Stretches, ranks: int) -> list[Shares]:
    """Each rank's shares of the global batches from ``index`` on, whose rows are given one after the other."""
    batches, dealt = [], [np.empty(0, np.int64)]
    for number, batch in cut(plan, epoch, index * plan.global_batch, rows):
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
    whole = rows.copied(as_batched=True) if ranks == 1 else rows.copied([ITEM])
    described, rank_G = _dealt(index, whole, ranks)
    own = whole if ranks == 1 else rows.take(np.flatnonzero(rank_G == rank)).copied(as_batched=True)
    return _collated(plan, described, own, lent=False)


def collated(plan: Plan, shares: Shares, start: int) -> Iterator[GlobalBatch]:
    """The shares of global batches ``start`` and later as tensors, which have their own memory: that of the shares'
    rows may be somebody else's."""
    first = 0
    for batch, count in zip(shares.batches, shares.counts, strict=True):
        if batch.index >= start:
            yield _collated(plan, batch, shares.rows.slice(first, first + count), lent=True)
        first += count


def _collated(plan: Plan, batch: Described, rows: Sequences, lent: bool) -> GlobalBatch:
    from gr.data.collate import collate

    return GlobalBatch(**vars(batch), share=collate(rows, plan.columns, lent))


def _dealt(index: int, rows: Sequences, ranks: int) -> tuple[Described, np.ndarray]:
    """The global batch ``index``, whose rows are given, and (G,) the rank that each of them goes to."""
    digest = hashlib.blake2b(np.ascontiguousarray(rows.ordinals_R, "<i8").data, digest_size=8)
    # some at a time: those that are wider become int32 again within the cache
    for start in range(0, len(rows.items_A), SOME):
        digest.update(np.ascontiguousarray(rows.items_A[start : start + SOME], "<i4").data)
    lengths_G, skews = rows.lengths_R, (1.0, 1.0)
    rank_G = deal(lengths_G, ranks)
    if ranks > 1:
        consecutive_G = np.arange(len(rows)) * ranks // max(len(rows), 1)
        skews = skew(lengths_G, rank_G, ranks), skew(lengths_G, consecutive_G, ranks)
    return Described(index, len(rows), digest.hexdigest(), skews), rank_G


def read_samples(plan: Plan, dataset: SequenceDataset, epoch: int, block: int) -> Stretches:
    """The examples of a block of the dataset, which is read as far as the plan needs it."""
    return samples(plan, dataset.filtered(plan.filters).read_block(block, plan.read_columns), epoch)


def epoch_batches(
    plan: Plan, read: Callable[[int], Stretches], epoch: int, start: int, rank: int, ranks: int
) -> Iterator[GlobalBatch]:
    """All of the above in one process, window after window.  ``read``: block number -> the block's samples."""
    parts = windows(plan, read, epoch, start * plan.global_batch)
    for index, rows in global_batches(plan, parts, epoch, start):
        yield share(plan, index, rows, rank, ranks)


def blocks_ahead(
    plan: Plan, dataset: SequenceDataset, epoch: int, start: int, ahead: int
) -> Callable[[int], Stretches]:
    """``read`` for :func:`epoch_batches` of the same epoch and start: ``ahead`` blocks are read at the same time."""
    numbers = (number for number, _ in windows_from(plan, epoch, start * plan.global_batch))
    blocks = (block for number in numbers for block in plan.blocks(epoch, number).tolist())
    read = in_order(partial(read_samples, plan, dataset, epoch), blocks, ahead)  # as windows ask for them
    return lambda block: next(read)
