"""Open vocabularies: which ids have rows, beside a plain reference of dictionaries."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from gr.embeddings.buckets import POLICIES, Buckets
from gr.embeddings.vocabulary import OpenVocabulary
from gr.errors import UserError
from gr.processes import Processes

ALONE = Processes(torch.device("cpu"))


class PlainBucket:
    """One bucket, id by id: {id: [row or None, times seen, step seen last]}."""

    def __init__(self, rows, waiting, admit_after, evict):
        self.rows, self.waiting, self.admit_after, self.evict = rows, waiting, admit_after, evict
        self.ids: dict[int, list] = {}

    def update(self, counts: dict[int, int], step: int):
        """({row: id} that were given, ids that lost their row)."""
        for key, count in counts.items():
            if key in self.ids:
                self.ids[key][1:] = [self.ids[key][1] + count, step]
        seen = {key: self.ids[key][1] if key in self.ids else counts[key] for key in counts}
        newcomers = sorted((k for k in counts if self.row(k) is None), key=lambda k: (-seen[k], k))
        given, evicted, without = {}, [], []
        room = [row for row in range(1, self.rows) if row not in {own for own, _, _ in self.ids.values()}]
        for key in newcomers:
            if seen[key] < self.admit_after:
                without.append(key)
                continue
            if not room and (victim := self.victim(step, seen[key], given)) is not None:
                room = [self.ids.pop(victim)[0]]
                evicted.append(victim)
            if room:
                given[room[0]] = key
                self.ids[key] = [room.pop(0), seen[key], step]
            else:
                without.append(key)
        for key in without:
            if key in self.ids:
                continue
            if sum(row is None for row, _, _ in self.ids.values()) == self.waiting:
                old = [k for k, (row, _, last) in self.ids.items() if row is None and last < step]
                if not old:
                    continue
                self.ids.pop(min(old, key=lambda k: (self.ids[k][2], self.ids[k][1], k)))
            self.ids[key] = [None, seen[key], step]
        return given, evicted

    def victim(self, step, count, given):
        if self.evict == "never":
            return None
        old = [k for k, (row, _, last) in self.ids.items() if row is not None and last < step]
        if self.evict == "least_recently_seen":
            return min(old, key=lambda k: (self.ids[k][2], self.ids[k][1], k), default=None)
        rarest = min(old, key=lambda k: (self.ids[k][1], self.ids[k][2], k), default=None)
        return rarest if rarest is not None and self.ids[rarest][1] < count else None

    def row(self, key):
        return self.ids[key][0] if key in self.ids else None


def streams(seed, steps, ids):
    """Batches of ids, of which few come often and which change over time; some come twice in a batch, some batches
    are empty."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        size = int(rng.integers(0, 25))
        drawn = np.minimum(rng.geometric(0.08, size), ids) + step // 3
        yield drawn * 7919 * (-1) ** drawn  # ids are any 64 bits


SETTINGS = [
    (rows, waiting, admit_after, evict)
    for rows, waiting, admit_after in ((2, 0, 1), (6, 0, 1), (6, 4, 1), (6, 3, 2), (4, 1, 3), (9, 20, 4))
    for evict in POLICIES
]


@pytest.mark.parametrize("rows,waiting,admit_after,evict", SETTINGS)
def test_a_bucket_does_what_a_plain_one_does(rows, waiting, admit_after, evict):
    for seed in range(2):
        plain = [PlainBucket(rows, waiting, admit_after, evict) for _ in range(3)]
        ours = Buckets(4, 3, rows, waiting, admit_after, evict)
        gone = 0
        for step, ids in enumerate(streams(seed, 45, 40)):
            counts = Counter(ids.tolist())
            keys = np.array(sorted(counts), np.int64)
            buckets = 4 + keys % 3
            changes = ours.update(keys, buckets, np.array([counts[k] for k in keys.tolist()], np.int64), step)
            given, evicted = {}, []
            for number, bucket in enumerate(plain):
                mine = {k: c for k, c in counts.items() if k % 3 == number}
                its_given, its_evicted = bucket.update(mine, step)
                given |= {(4 + number) * rows + row: key for row, key in its_given.items()}
                evicted += its_evicted
            assert sorted(changes.rows_N.tolist()) == sorted(given)
            assert sorted(changes.evicted_E.tolist()) == sorted(evicted)
            assert not set(evicted) & set(counts), "an id of this step keeps its row"
            gone += len(evicted)
            expected = [(4 + k % 3) * rows + (plain[k % 3].row(k) or 0) for k in keys.tolist()]
            assert ours.rows_of(keys, buckets).tolist() == expected
            if step % 7 == 0:
                ours.forget_index()  # as a checkpoint does
            everybody = np.array(sorted({k for b in plain for k in b.ids} | {10**15}), np.int64)
            known = [(4 + k % 3) * rows + (plain[k % 3].row(k) or 0) for k in everybody.tolist()]
            assert ours.rows_of(everybody, 4 + everybody % 3).tolist() == known
        assert (gone > 0) == (evict != "never"), "the stream shows nothing"
        assert ours.totals_G2[:, 1].sum() == gone


def vocabulary(rows=64, processes=ALONE, **config):
    return OpenVocabulary(OpenVocabulary.Config(**{"buckets": 8, **config}), "device", rows, processes)


def test_every_id_has_the_row_of_one_bucket_and_looking_changes_nothing():
    open_one = vocabulary(admit_after=2, waiting=2)
    ids = torch.tensor([[2**63 - 1, -(2**63), 7], [7, 0, 7]])
    first = open_one.learn(ids, 0)
    assert first.rows.shape == ids.shape and first.rows.dtype == torch.int64
    assert (first.rows[ids != 7] % 8 == 0).all(), "what was seen once shares a row"
    (own,) = first.rows[ids == 7].unique().tolist()
    assert own % 8 and first.restarted_N.tolist() == [own] and not len(first.evicted_E)
    assert (open_one.unseen, open_one.asked, open_one.totals()) == (3, 6, (1, 0))
    before = {name: values.clone() for name, (_, _, values) in open_one.state().items()}
    for _ in range(3):
        assert torch.equal(open_one.rows_of(ids), first.rows)
        assert (open_one.rows_of(torch.arange(100, 120)) % 8 == 0).all()
    assert all(torch.equal(before[name], values) for name, (_, _, values) in open_one.state().items())
    again = open_one.learn(ids, 1)
    assert (again.rows % 8 != 0).all() and len(again.restarted_N) == 3
    assert torch.equal(again.rows // 8, first.rows // 8), "an id stays in its bucket"
    assert not open_one.learn(torch.empty(0, dtype=torch.int64), 2).rows.numel()


def test_buckets_are_filled_alike():
    open_one = vocabulary(rows=64 * 40, buckets=64)
    open_one.learn(torch.arange(64 * 20) * 2**40, 0)
    filled = (open_one.own.counts_GP > 0).sum(axis=1)
    assert filled.sum() == 64 * 20
    # binomial with mean 20 and a deviation of 4.4: 64 of them within 4.5 deviations
    assert filled.min() >= 1 and filled.max() < 40


def test_what_it_knows_goes_on_elsewhere():
    one, other = vocabulary(rows=24, admit_after=2), vocabulary(rows=24, admit_after=2)
    stream = [torch.from_numpy(ids) for ids in streams(3, 40, 30)]
    for step, ids in enumerate(stream[:20]):
        one.learn(ids, step)
    for name, (size, first, values) in other.state().items():
        saved = one.state()[name]
        assert saved[:2] == (size, first) and saved[2].dtype == torch.int64
        values.copy_(saved[2])
    evicted = 0
    for step, ids in enumerate(stream[20:], 20):
        ours, theirs = one.learn(ids, step), other.learn(ids, step)
        for part in ("rows", "restarted_N", "evicted_E"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part))
        evicted += len(ours.evicted_E)
    assert evicted > 5 and one.totals() == other.totals()


@pytest.mark.parametrize(
    "rows,config,said",
    [
        (65, {}, "rows is 65, and 8 buckets have equally many rows, two at least: set it to 72"),
        (8, {}, "set it to 16, or choose other model.input.features.device.vocabulary.buckets"),
        (64, {"admit_after": 2, "waiting": 0}, "leave it out, or set admit_after=1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(rows, config, said):
    with pytest.raises(UserError, match=said):
        vocabulary(rows, **config)
