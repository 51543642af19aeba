"""LocalTable: search, scores and initialisation."""

import pytest
import torch
from torch.nn import functional as F

from gr.config import SimilaritySection
from gr.embeddings import table as table_module
from gr.embeddings.scoring import Scoring
from gr.models.similarity import Similarity
from gr_kernels.candidate_scores import candidate_scores
from tests.precision import tolerance
from tests.unit.models_common import generator, local_table

ITEMS, DIM, QUERIES = 57, 6, 5
# A norm and a score of 6 terms of unit scale; beside them a softmax of 57, a sum over 5 queries and their gradients.
SCORES = tolerance(DIM, stages=2, size=10.0)
LOSS = tolerance(ITEMS, stages=4, size=10.0)


@pytest.fixture
def table():
    return local_table(ITEMS, DIM, seed=3)


def queries():
    return torch.randn(QUERIES, DIM, generator=generator())


def logits(table, normalize_eps=None):
    weight = table.view().lookup(torch.arange(ITEMS))
    return queries() @ (weight if normalize_eps is None else F.normalize(weight, dim=1, eps=normalize_eps)).T


@pytest.mark.parametrize("max_scores", [1, QUERIES * 20, 1 << 24])
@pytest.mark.parametrize("normalize_eps", [None, 1e-6])
def test_topk_equals_sorting_everything(monkeypatch, max_scores, normalize_eps):
    monkeypatch.setattr(table_module, "MAX_SCORES", max_scores)
    table = local_table(ITEMS, DIM, seed=3, bias=True)
    bias = torch.randn(ITEMS, generator=generator(1))
    table.bias.data.copy_(bias)
    counts = torch.tensor([0, 3, 0, 20, 55])
    excluded = torch.cat([torch.randperm(ITEMS, generator=generator(2))[:n] for n in counts.tolist()])
    expected = (logits(table, normalize_eps) + bias).detach()
    for b, rows in enumerate(excluded.split(counts.tolist())):
        expected[b, rows] = -torch.inf
    exclude = (F.pad(counts.cumsum(0), (1, 0)), excluded)
    scores, rows = table.topk(queries(), 9, Scoring(1.0, normalize_eps, bias=True), exclude)
    best = expected.sort(dim=1, descending=True)
    torch.testing.assert_close(scores, best.values[:, :9], **SCORES)
    left = best.values[:, :9] > -torch.inf
    assert torch.equal(rows[left], best.indices[:, :9][left])
    assert left[4].sum() == 2


def test_topk_of_more_than_there_is_or_of_nothing(table):
    scores, rows = table.topk(queries(), 1000, Scoring())
    assert scores.shape == (QUERIES, ITEMS)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(ITEMS).expand(QUERIES, -1))
    assert table.topk(queries()[:0], 4, Scoring())[0].shape == (0, 4)


def test_scores_of_every_form_of_rows(table):
    everything, scoring = logits(table, 1e-6), Scoring(1.0, 1e-6)
    shared = torch.tensor([4, 4, 56, 0])
    own = torch.randint(0, ITEMS, (QUERIES, 7), generator=generator(4))
    torch.testing.assert_close(table.scores(queries(), scoring), everything.detach(), **SCORES)
    torch.testing.assert_close(table.chunk_scores(queries(), 10, 30, scoring), everything[:, 10:30], **SCORES)
    view = table.view()
    found = candidate_scores(queries(), view.weight_UD, view.place(shared), normalize_eps=1e-6)
    torch.testing.assert_close(found, everything[:, shared], **SCORES)
    found = candidate_scores(queries(), view.weight_UD, view.place(own), normalize_eps=1e-6)
    torch.testing.assert_close(found, everything.gather(1, own), **SCORES)


def test_a_scoring_scales_and_adds_the_bias_to_every_answer_alike():
    """scores, topk, ranks and the candidates of a step say the same of each item."""
    table = local_table(ITEMS, DIM, seed=3, bias=True)
    table.bias.data.copy_(torch.randn(ITEMS, generator=generator(1)))
    similarity = Similarity(SimilaritySection(normalize=False, temperature=0.25, item_bias=True))
    expected = (4.0 * logits(table) + table.bias).detach()
    torch.testing.assert_close(similarity.scores(table, queries()), expected, **SCORES)
    every = torch.arange(ITEMS).expand(QUERIES, -1)
    torch.testing.assert_close(
        similarity.candidates(table.view(), queries(), every).detach(), expected, **SCORES
    )
    targets = torch.tensor([0, 56, 3, 3, 9])
    standing = similarity.standing(table, queries(), targets)
    torch.testing.assert_close(
        standing.losses_B.sum(), similarity.cross_entropy(table, queries(), targets).double(), **LOSS
    )
    assert (
        standing.ranks_B.tolist() == (1.0 + (expected > expected.gather(1, targets[:, None])).sum(1)).tolist()
    )
    torch.testing.assert_close(
        similarity.topk(table, queries(), 5)[0], expected.topk(5, dim=1).values, **SCORES
    )


def test_cross_entropy(table):
    targets = torch.tensor([0, 56, 3, 3, 9])
    loss = table.cross_entropy(queries(), targets, Scoring(2.0, 1e-6))
    torch.testing.assert_close(
        loss, F.cross_entropy(2.0 * logits(table, 1e-6), targets, reduction="sum"), **LOSS
    )
    loss.backward()
    actual, table.weight.grad = table.weight.grad, None
    F.cross_entropy(2.0 * logits(table, 1e-6), targets, reduction="sum").backward()
    torch.testing.assert_close(actual, table.weight.grad, **LOSS)


def test_a_row_starts_from_its_seed_name_and_number(table):
    longer = local_table(2 * ITEMS, DIM, seed=3)
    assert torch.equal(longer.weight[:ITEMS], table.weight)
    assert not torch.equal(local_table(ITEMS, DIM, seed=3, name="users").weight, table.weight)
    assert not torch.equal(local_table(ITEMS, DIM, seed=4).weight, table.weight)
    wide = local_table(2000, 64, 0.02, seed=3).weight
    assert wide.abs().max() <= 0.04
    assert wide.std().item() == pytest.approx(0.02 * 0.8796, rel=0.01)  # the spread of N(0, 1) cut at +-2
