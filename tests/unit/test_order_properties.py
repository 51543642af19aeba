"""Whatever sizes, kills, resumes and numbers of ranks: every sample of an epoch once, in one order, with one digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import pytest

from gr.data.batches import GlobalBatch, Plan, collated, epoch_batches, read_samples
from gr.data.order import Order
from gr.data.remote import Work
from gr.data.sequences import Sequences, Stretches
from gr.data.split import LeaveOneOut
from gr.train.cursor import Cursor
from tests.packages import needs

needs("hypothesis")

from hypothesis import given, settings, strategies as st  # noqa: E402

EPOCHS = 2
property_test = partial(settings, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Stored:
    """Sequences in memory, cut and dealt as a dataset's: blocks of ``block_rows``, user by user."""

    rows: int
    block_rows: int
    window_blocks: int
    global_batch: int
    tail: str
    shuffle: bool
    seed: int

    @cached_property
    def plan(self) -> Plan:
        order = Order("f", self.seed, self.rows, self.block_rows, self.window_blocks, self.shuffle)
        return Plan(LeaveOneOut(LeaveOneOut.Config()), order, self.global_batch, max_length=5, tail=self.tail)

    @cached_property
    def sequences(self) -> Sequences:
        lengths = np.random.default_rng(self.seed).integers(0, 12, self.rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items = np.random.default_rng(self.seed + 1).integers(0, 99, offsets[-1]).astype(np.int32)
        return Sequences.of(np.arange(self.rows), offsets, item=items)

    def read_block(self, block: int, columns: object = None) -> Sequences:
        start = block * self.block_rows
        return self.sequences.slice(start, min(start + self.block_rows, self.rows))

    def filtered(self, filters: tuple) -> Stored:
        return self

    def read(self, epoch: int) -> Callable[[int], Stretches]:
        return partial(read_samples, self.plan, self, epoch)  # type: ignore[arg-type]

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[GlobalBatch]:
        return epoch_batches(self.plan, self.read(epoch), epoch, start, rank, ranks)

    @property
    def expected_rows(self) -> int:
        return self.rows if self.tail == "keep" else self.rows // self.global_batch * self.global_batch


stored = st.builds(
    Stored,
    rows=st.integers(1, 40),
    block_rows=st.integers(1, 9),
    window_blocks=st.integers(1, 4),
    global_batch=st.integers(1, 70),
    tail=st.sampled_from(["keep", "drop"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
).filter(lambda stored: stored.plan.in_epoch(0) > 0)

steps = st.integers(0, 12)
attempts = st.lists(st.tuples(st.integers(1, 5), steps, steps), min_size=3, max_size=9)
"""Of a run's attempts: ranks, steps until it is killed, steps between its checkpoints (0: none is made)."""


def ordinals(batches: list[GlobalBatch]) -> list[int]:
    return np.concatenate([batch.share.ordinals_B.numpy() for batch in batches]).tolist()


def trained(
    stored: Stored, cursor: Cursor, ranks: int, stop: int, every: int
) -> tuple[Cursor, list[list[GlobalBatch]]]:
    """An attempt of a run from ``cursor`` that is killed after ``stop`` steps: its newest checkpoint, made each
    ``every`` steps and at the end, and the batches up to there (those of all ranks together)."""
    batches: list[list[GlobalBatch]] = []
    saved, cursor = (replace(cursor), 0), replace(cursor)
    while cursor.epoch < EPOCHS and len(batches) < stop:
        readers = [stored.epoch(cursor.epoch, cursor.batch, rank, ranks) for rank in range(ranks)]
        for shares in zip(*readers, strict=True):
            batches.append(list(shares))
            cursor.advance(shares[0].digest)
            if shares[0].index + 1 == stored.plan.in_epoch(0):
                cursor.next_epoch()
            if cursor.epoch == EPOCHS or (every and len(batches) % every == 0):
                saved = replace(cursor), len(batches)
            if len(batches) == stop:
                break
    return saved[0], batches[: saved[1]]


@property_test(max_examples=170)  # a thousand kills
@given(stored, attempts, st.integers(1, 5))
def test_killed_and_resumed_with_other_ranks_every_sample_comes_once_in_one_order(stored, attempts, last):
    whole = [list(stored.epoch(epoch)) for epoch in range(EPOCHS)]
    for batches in whole:
        seen = ordinals(batches)
        assert len(seen) == len(set(seen)) == stored.expected_rows
    expected, _ = trained(stored, Cursor("g"), ranks=1, stop=1 << 30, every=0)

    cursor, done = Cursor("g"), []
    for ranks, stop, every in [*attempts, (last, 1 << 30, 0)]:
        cursor, batches = trained(stored, cursor, ranks, stop, every)
        done += batches
    assert (cursor.step, cursor.epoch, cursor.data_digest) == (expected.step, EPOCHS, expected.data_digest)
    for one, shares in zip(whole[0] + whole[1], done, strict=True):
        assert {(share.index, share.samples, share.digest) for share in shares} == {
            (one.index, one.samples, one.digest)
        }
        assert sorted(ordinals(shares)) == sorted(one.share.ordinals_B.tolist())
        counts = [share.share.sequences for share in shares]
        assert max(counts) - min(counts) <= 1


@property_test(max_examples=100)
@given(stored, st.integers(1, 5), st.data())
def test_windows_made_apart_give_the_batches_of_one_process(stored, ranks, data):
    """As a cluster makes them: each window by itself, and of a batch in several the pieces joined."""
    work = Work("", "", "", stored.plan, ranks)
    windows = stored.plan.order.windows
    epoch = data.draw(st.integers(0, EPOCHS - 1))
    units = range(epoch * windows, (epoch + 1) * windows)
    made = {unit: work.made(unit, stored.read(epoch)) for unit in units}
    start = data.draw(st.integers(0, stored.plan.in_epoch(0)))
    for rank in range(ranks):
        batches: list[GlobalBatch] = []
        for unit in units:
            if seam := work.seam_of(unit):
                assert work.needed(seam[-1] - 1) <= seam[0], "a piece would be gone before it is asked for"
                pieces = [made[seam[0]][-1], *(made[other][-2] for other in seam[1:])]
                batches += collated(stored.plan, work.seam(unit, pieces)[rank], start)
            batches += collated(stored.plan, made[unit][rank], start)
        expected = list(stored.epoch(epoch, start, rank, ranks))
        assert [(b.index, b.samples, b.digest, b.skew) for b in batches] == [
            (b.index, b.samples, b.digest, b.skew) for b in expected
        ]
        for one, other in zip(batches, expected, strict=True):
            assert one.share.ordinals_B.equal(other.share.ordinals_B)
            assert one.share.offsets_B1.equal(other.share.offsets_B1)
            assert one.share.items_T.equal(other.share.items_T)


@pytest.mark.parametrize("rows", [10**12 + 7])
def test_a_position_of_a_huge_epoch_costs_no_table(rows):
    order = Order("f", 1, rows, block_rows=1024, window_blocks=64)
    last = order.windows - 1
    for number in (0, last // 2, last):
        blocks, found = order.window(3, number)
        assert len(found) == min(order.window_rows, rows - number * order.window_rows)
        assert len(set(found.tolist())) == len(found) and set((found // 1024).tolist()) == set(
            blocks.tolist()
        )
