"""LocalTable: search, scores and initialisation."""

import pytest
import torch
from torch.nn import functional as F

from gr.embeddings import table as table_module
from gr.embeddings.table import LocalTable
from tests.precision import tolerance
from tests.unit.models_common import generator

ITEMS, DIM, QUERIES = 57, 6, 5
# A norm and a score of 6 terms of unit scale; beside them a softmax of 57, a sum over 5 queries and their gradients.
SCORES = tolerance(DIM, stages=2, size=10.0)
LOSS = tolerance(ITEMS, stages=4, size=10.0)


@pytest.fixture
def table():
    return LocalTable("items", ITEMS, DIM, 1.0, seed=3)


def queries():
    return torch.randn(QUERIES, DIM, generator=generator())


def logits(table, normalize_eps=None):
    weight = table.lookup(torch.arange(ITEMS))
    return queries() @ (weight if normalize_eps is None else F.normalize(weight, dim=1, eps=normalize_eps)).T


@pytest.mark.parametrize("max_scores", [1, QUERIES * 20, 1 << 24])
@pytest.mark.parametrize("normalize_eps", [None, 1e-6])
def test_topk_equals_sorting_everything(table, monkeypatch, max_scores, normalize_eps):
    monkeypatch.setattr(table_module, "MAX_SCORES", max_scores)
    bias = torch.randn(ITEMS, generator=generator(1))
    counts = torch.tensor([0, 3, 0, 20, 55])
    excluded = torch.cat([torch.randperm(ITEMS, generator=generator(2))[:n] for n in counts.tolist()])
    expected = (logits(table, normalize_eps) + bias).detach()
    for b, rows in enumerate(excluded.split(counts.tolist())):
        expected[b, rows] = -torch.inf
    exclude = (F.pad(counts.cumsum(0), (1, 0)), excluded)
    scores, rows = table.topk(queries(), 9, normalize_eps, exclude, bias)
    best = expected.sort(dim=1, descending=True)
    torch.testing.assert_close(scores, best.values[:, :9], **SCORES)
    left = best.values[:, :9] > -torch.inf
    assert torch.equal(rows[left], best.indices[:, :9][left])
    assert left[4].sum() == 2


def test_topk_of_more_than_there_is_or_of_nothing(table):
    scores, rows = table.topk(queries(), 1000)
    assert scores.shape == (QUERIES, ITEMS)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(ITEMS).expand(QUERIES, -1))
    assert table.topk(queries()[:0], 4)[0].shape == (0, 4)


def test_scores_of_every_form_of_rows(table):
    everything = logits(table, 1e-6)
    shared = torch.tensor([4, 4, 56, 0])
    own = torch.randint(0, ITEMS, (QUERIES, 7), generator=generator(4))
    torch.testing.assert_close(table.scores(queries(), shared, 1e-6), everything[:, shared], **SCORES)
    torch.testing.assert_close(table.scores(queries(), range(10, 30), 1e-6), everything[:, 10:30], **SCORES)
    torch.testing.assert_close(table.scores(queries(), own, 1e-6), everything.gather(1, own), **SCORES)


def test_cross_entropy(table):
    targets = torch.tensor([0, 56, 3, 3, 9])
    loss = table.cross_entropy(queries(), targets, 2.0, 1e-6)
    torch.testing.assert_close(
        loss, F.cross_entropy(2.0 * logits(table, 1e-6), targets, reduction="sum"), **LOSS
    )
    loss.backward()
    actual, table.weight.grad = table.weight.grad, None
    F.cross_entropy(2.0 * logits(table, 1e-6), targets, reduction="sum").backward()
    torch.testing.assert_close(actual, table.weight.grad, **LOSS)


def test_a_row_starts_from_its_seed_name_and_number(table):
    longer = LocalTable("items", 2 * ITEMS, DIM, 1.0, seed=3)
    assert torch.equal(longer.weight[:ITEMS], table.weight)
    assert not torch.equal(LocalTable("users", ITEMS, DIM, 1.0, seed=3).weight, table.weight)
    assert not torch.equal(LocalTable("items", ITEMS, DIM, 1.0, seed=4).weight, table.weight)
    wide = LocalTable("items", 2000, 64, 0.02, seed=3).weight
    assert wide.abs().max() <= 0.04
    assert wide.std().item() == pytest.approx(0.02 * 0.8796, rel=0.01)  # the spread of N(0, 1) cut at +-2
