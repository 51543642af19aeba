"""Baselines against brute force, and proof that they see training actions only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gr.batch import SequenceBatch
from gr.eval.baselines import ItemKNN, LastItem, Popularity
from tests.precision import tolerance


@dataclass
class Rows:
    offsets_R1: np.ndarray
    items_A: np.ndarray


def rows_of(lists) -> Rows:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    return Rows(offsets, np.concatenate([np.asarray(row, np.int32) for row in lists]))


def batch_of(lists) -> SequenceBatch:
    lengths = tuple(map(len, lists))
    return SequenceBatch(
        offsets_B1=torch.tensor([0, *np.cumsum(lengths)]),
        columns={"item": torch.tensor([i for row in lists for i in row], dtype=torch.int64)},
        ordinals_B=torch.arange(len(lists)),
        lengths=lengths,
    )


def random_lists(seed, users=60, items=30, longest=25):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(items - 2, 0.5))  # two items never occur
    return [rng.choice(items - 2, rng.integers(0, longest), p=weights).tolist() for _ in range(users)]


def in_parts(lists, size=17):
    return [rows_of(lists[i : i + size]) for i in range(0, len(lists), size)]


QUERIES = [[3, 3, 5, 0], [7, 1], [4], [2, 9, 11, 20, 2, 6]]


def test_popularity_orders_by_count_and_keeps_ties():
    lists = random_lists(0)
    counts = np.bincount([i for row in lists for i in row], minlength=30)
    scores = Popularity().fit(in_parts(lists), 30).scores(batch_of(QUERIES))
    assert scores.dtype == torch.float32 and scores.shape == (4, 30)
    order = np.sign(counts[:, None] - counts[None])
    for row in scores.numpy():
        assert (np.sign(row[:, None] - row[None]) == order).all()


def test_popularity_tells_counts_apart_that_float32_cannot():
    counts = [2**24, 2**24 + 1, 2**24]
    assert np.float32(counts[0]) == np.float32(counts[1])
    training = (Rows(np.array([0, n]), np.full(n, item, np.int32)) for item, n in enumerate(counts))
    scores = Popularity().fit(training, 3).scores(batch_of([[0]]))[0].tolist()
    assert scores[1] > scores[0] == scores[2]


def test_last_item_comes_first_then_popularity():
    lists = random_lists(1)
    popular = Popularity().fit(in_parts(lists), 30).scores(batch_of(QUERIES))
    scores = LastItem().fit(in_parts(lists), 30).scores(batch_of(QUERIES))
    assert scores.argmax(1).tolist()[:2] == [5, 7] and scores[3].argmax() == 2
    for user, last in enumerate([5, 7, None, 2]):
        others = [i for i in range(30) if i != last]
        assert torch.equal(scores[user, others], popular[user, others])


def brute_force_knn(lists, items, neighbours, max_actions):
    have = np.zeros((len(lists), items))
    for user, row in enumerate(lists):
        have[user, row[-max_actions:]] = 1
    both = have.T @ have
    norm = np.sqrt(np.outer(np.diag(both), np.diag(both)))
    similarity = np.divide(both, norm, out=np.zeros_like(both), where=norm > 0)
    np.fill_diagonal(similarity, 0)
    kept = np.zeros_like(similarity)
    for i in range(items):
        best = np.lexsort((np.arange(items), -similarity[i]))[:neighbours]
        kept[i, best] = similarity[i, best]
    return kept


@pytest.mark.parametrize("chunk", [1, 37, 500, 2**22])
@pytest.mark.parametrize(("neighbours", "max_actions"), [(100, 500), (4, 500), (5, 6)])
def test_item_knn_is_brute_force(chunk, neighbours, max_actions):
    lists = random_lists(2)
    kept = brute_force_knn(lists, 30, neighbours, max_actions)
    model = ItemKNN(neighbours=neighbours, max_actions=max_actions, chunk=chunk).fit(in_parts(lists), 30)
    got = model.scores(batch_of(QUERIES))
    expected = np.stack([kept[sorted(set(row[:-1]))].sum(0) for row in QUERIES])
    assert got.dtype == torch.float32
    # similarities rounded to float32, of at most five items of a history
    np.testing.assert_allclose(got.numpy(), expected, **tolerance(5))
    assert expected.any(1).tolist() == [True, True, False, True]


def test_item_knn_counts_in_a_table_or_by_sorting_alike():
    dense, sparse = random_lists(3, users=300, items=8), random_lists(4, users=30, items=4000, longest=9)
    for lists, items in ((dense, 8), (sparse, 4000)):
        kept = brute_force_knn(lists, items, 10, 500)
        model = ItemKNN(neighbours=10).fit(in_parts(lists), items)
        got = np.zeros((items, items))
        np.add.at(got, (np.arange(items)[:, None], model.neighbour_IK.numpy()), model.similarity_IK.numpy())
        np.testing.assert_allclose(got, kept, **tolerance(1))  # rounded to float32


def test_scores_do_not_depend_on_companions():
    lists = random_lists(5)
    for kind in (Popularity, LastItem, ItemKNN):
        model = kind().fit(in_parts(lists), 30)
        whole = model.scores(batch_of(QUERIES))
        alone = torch.cat([model.scores(batch_of([row])) for row in QUERIES])
        assert torch.equal(whole, alone)
        other_targets = model.scores(batch_of([[*row[:-1], 13] for row in QUERIES]))
        assert torch.equal(whole, other_targets), "the last action's item is not to be looked at"


def test_no_training_actions_at_all():
    for kind in (Popularity, LastItem, ItemKNN):
        for training in ([], [rows_of([[], []])]):
            scores = kind().fit(training, 5).scores(batch_of([[1, 2]]))
            assert scores.shape == (1, 5) and torch.isfinite(scores).all()
