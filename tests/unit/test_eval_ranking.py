"""Exact ranks against brute force, and metrics against hand values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from gr.batch import SequenceBatch
from gr.config import EvalSection
from gr.embeddings.ranks import ranks_in
from gr.errors import UserError
from gr.eval.catalogue import CatalogueMetrics, judged
from gr.eval.evaluator import evaluate
from gr.eval.metrics import RankMetrics
from tests.precision import UNIT, growth


def rounding(users: int) -> dict[str, float]:
    """For pytest.approx: gains are rounded to whole numbers of 2**-32, and those by hand, at most 1, in float64."""
    return {"abs": 2.0**-33 + float(growth(users)) * UNIT[torch.float64]}


def batch_of(users: int) -> SequenceBatch:
    """``users`` sequences of two actions, items 0 and 0."""
    return SequenceBatch(
        offsets_B1=torch.arange(users + 1) * 2,
        columns={"item": torch.zeros(2 * users, dtype=torch.int64)},
        ordinals_B=torch.arange(users),
        lengths=(2,) * users,
    )


@dataclass
class Asked:
    batch: SequenceBatch
    targets_B: torch.Tensor
    exclude_offsets: torch.Tensor
    exclude_items: torch.Tensor
    history_lengths_B: torch.Tensor
    users: np.ndarray

    def __len__(self):
        return self.batch.sequences

    def to(self, device):
        return self


class Fixed:
    """Gives the rows of a matrix by ordinal, and remembers the most scores asked for at once."""

    def __init__(self, scores_BI):
        self.scores_BI, self.most = scores_BI, 0

    def scores(self, batch):
        self.most = max(self.most, batch.sequences * self.scores_BI.shape[1])
        return self.scores_BI[batch.ordinals_B]


def random_case(seed: int, users: int = 37, items: int = 53, levels: int = 6):
    """Scores with many exact ties, and jagged exclusions (empty ones, repeats, never the target)."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (users, items)).astype(np.float32) / 3
    scores[:, :3] = -np.inf
    targets = rng.integers(0, items, users)
    exclude = [rng.integers(0, items, rng.integers(0, 30)) for _ in range(users)]
    exclude = [row[row != target] for row, target in zip(exclude, targets, strict=True)]
    asked = Asked(
        batch_of(users),
        torch.from_numpy(targets),
        torch.tensor(np.cumsum([0, *map(len, exclude)])),
        torch.from_numpy(np.concatenate(exclude)),
        torch.from_numpy(rng.integers(1, 80, users)),
        np.arange(users) + 1000,
    )
    return scores, exclude, asked


def brute_force(scores, targets, exclude):
    ranks = []
    for row, target, gone in zip(scores, targets, exclude, strict=True):
        others = [j for j in range(len(row)) if j != target and j not in set(gone.tolist())]
        higher = sum(row[j] > row[target] for j in others)
        equal = sum(row[j] == row[target] for j in others)
        ranks.append(1 + higher + equal / 2)
    return ranks


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_exact_with_ties_and_exclusions(seed):
    scores, exclude, asked = random_case(seed)
    expected = brute_force(scores, asked.targets_B.tolist(), exclude)
    exclude_rows = (asked.exclude_offsets, asked.exclude_items)
    got = ranks_in(torch.from_numpy(scores), asked.targets_B, exclude_rows)
    assert got.dtype == torch.float64
    assert got.tolist() == expected
    plain = brute_force(scores, asked.targets_B.tolist(), [np.array([], np.int64)] * len(exclude))
    assert ranks_in(torch.from_numpy(scores), asked.targets_B).tolist() == plain
    assert plain != expected, "the case excludes nothing that matters"


@pytest.mark.parametrize("max_scores", [1, 53, 200, 10**6])
def test_ranks_do_not_depend_on_the_chunk(max_scores):
    scores, exclude, asked = random_case(7)
    scorer = Fixed(torch.from_numpy(scores))
    ranks, losses = judged(scorer, asked, 53, max_scores)
    assert losses is None and ranks.tolist() == brute_force(scores, asked.targets_B.tolist(), exclude)
    assert scorer.most <= max(max_scores, 53)


@pytest.mark.parametrize("items", [1, 2, 11])
def test_constant_scores_give_the_middle_rank(items):
    targets = torch.arange(items)
    assert ranks_in(torch.full((items, items), 0.25), targets).tolist() == [(items + 1) / 2] * items


@pytest.mark.parametrize("max_scores", [53, 2 * 53, 10**6])
def test_a_nan_score_is_one_clear_sentence(max_scores):
    """It names the user, in whatever slice of the request."""
    scores, _, asked = random_case(1)
    scores[5, 50] = np.nan
    asked.targets_B[5] = 4
    with pytest.raises(
        UserError, match="scored items as NaN for 1 users, the first is 1005: the model has diverged"
    ):
        judged(Fixed(torch.from_numpy(scores)), asked, 53, max_scores)


def test_a_scorer_of_another_catalogue_is_refused():
    scores, _, asked = random_case(1)
    with pytest.raises(ValueError, match=r"gave \(37, 53\), not \(37, 54\)"):
        judged(Fixed(torch.from_numpy(scores)), asked, 54)


def test_metrics_have_their_hand_values():
    metrics = RankMetrics([10, 1, 5])
    metrics.add(torch.tensor([1.0, 2.0]))
    metrics.add(torch.tensor([10.5, 3.0, 700.0]))
    result = metrics.result()
    assert metrics.users == 5
    assert list(result) == ["hr@1", "hr@5", "hr@10", "ndcg@1", "ndcg@5", "ndcg@10", "mrr"]
    assert result["hr@1"] == 1 / 5 and result["hr@5"] == result["hr@10"] == 3 / 5  # 10.5 is no hit at 10
    assert result["ndcg@1"] == 1 / 5
    assert result["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3) + 1 / 2) / 5, **rounding(5))
    assert result["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10.5 + 1 / 3 + 1 / 700) / 5, **rounding(5))


def test_losses_have_their_hand_values_where_every_user_has_one():
    metrics = RankMetrics([1], {"history": (1, 5)})
    metrics.add(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.25]), history=torch.tensor([4, 9]))
    metrics.add(torch.tensor([3.0]), torch.tensor([2.0]), history=torch.tensor([5]))
    assert metrics.result()["loss"] == 1.25  # sums of binary fractions: exact
    assert [bucket["loss"] for bucket in metrics.by_bucket()["history"]] == [0.5, 1.625]
    metrics.add(torch.tensor([1.0]), history=torch.tensor([2]))  # of a scorer that has none
    assert "loss" not in metrics.result()
    assert ["loss" in bucket for bucket in metrics.by_bucket()["history"]] == [False, True]


@pytest.mark.parametrize("max_scores", [53, 200, 10**6])
def test_a_scorer_of_probabilities_has_a_loss(max_scores):
    """It is of the shares: what is no probability for want of a factor does no harm."""
    scores, _, asked = random_case(2)
    shares = torch.from_numpy(scores).softmax(1)
    scorer = Fixed(shares * 0.5)
    assert judged(scorer, asked, 53, max_scores)[1] is None
    scorer.gives_probabilities = True
    asked.targets_B[:] = asked.targets_B.clamp(min=3)  # the first ones have no probability
    losses = judged(scorer, asked, 53, max_scores)[1]
    expected = -shares.double().gather(1, asked.targets_B[:, None])[:, 0].log()
    torch.testing.assert_close(losses, expected, rtol=0, atol=(53 + 3) * UNIT[torch.float32])
    asked.targets_B[4] = 0
    with pytest.raises(UserError, match="for 1 users, the first is 1004"):
        judged(scorer, asked, 53, max_scores)


def test_buckets_hold_their_users_and_only_those():
    ranks = torch.tensor([1.0, 2.0, 3.0, 50.0])
    metrics = RankMetrics([2], {"history": (1, 5, 10), "popularity": (0, 1)})
    metrics.add(ranks[:3], history=torch.tensor([4, 5, 9]), popularity=torch.tensor([0, 7, 1]))
    metrics.add(ranks[3:], history=torch.tensor([10]), popularity=torch.tensor([3]))
    history = metrics.by_bucket()["history"]
    assert [(b["from"], b["to"], b["users"], b["hr@2"]) for b in history] == [
        (1, 4, 1, 1.0),
        (5, 9, 2, 0.5),
        (10, None, 1, 0.0),
    ]
    popularity = metrics.by_bucket()["popularity"]
    assert [(b["from"], b["to"], b["users"]) for b in popularity] == [(0, 0, 1), (1, None, 3)]
    assert popularity[1]["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 50) / 3, **rounding(3))


def test_who_is_below_the_first_bound_is_in_no_bucket():
    metrics = RankMetrics([2], {"history": (5, 10), "popularity": (0,)})
    metrics.add(torch.tensor([1.0, 1.0]), history=torch.tensor([4, 7]), popularity=torch.tensor([0, 2]))
    buckets = metrics.by_bucket()
    assert [(b["from"], b["users"]) for b in buckets["history"]] == [(5, 1)]
    assert [(b["from"], b["users"]) for b in buckets["popularity"]] == [(0, 2)]
    assert metrics.users == 2


def test_sums_depend_on_no_order():
    ranks = torch.randint(2, 4000, (5000,), generator=torch.Generator().manual_seed(0)) / 2
    results = []
    for order, size in ((ranks, 5000), (ranks.flip(0), 7), (ranks[torch.randperm(5000)], 640)):
        metrics = RankMetrics([10, 500])
        for part in order.split(size):
            metrics.add(part)
        results.append(metrics.result())
    assert results[0] == results[1] == results[2]
    assert results[0]["mrr"] == pytest.approx((1 / ranks.double()).mean().item(), **rounding(5000))


def test_evaluate_joins_ranks_metrics_and_modes():
    scores, exclude, asked = random_case(3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.part = nn.Dropout().eval()
            self.seen = []

        def scores(self, batch):
            self.seen.append((self.training, torch.is_grad_enabled()))
            return torch.from_numpy(scores)[batch.ordinals_B] * self.scale

    model, done = Model(), []
    family = CatalogueMetrics(EvalSection(ks=[5], cold=20), 53, torch.arange(53))
    result = evaluate(model, [asked], family, protocol={"exclude": "all"}, advance=done.append)
    ranks = np.array(brute_force(scores, asked.targets_B.tolist(), exclude))
    assert result.users == 37 and done == [37]
    assert result.row()["exclude"] == "all" and result.heading == "whole catalogue ranked"
    assert result.row()["hr@5"] == (ranks <= 5).mean()
    assert sum(b["users"] for b in result.buckets["popularity"]) == 37
    targets = asked.targets_B.numpy()
    for name, inside in (("warm", targets >= 20), ("cold", targets < 20), ("new", targets == 0)):
        assert result.row()[f"users/{name}"] == inside.sum()
        if inside.any():
            assert result.row()[f"hr@5/{name}"] == pytest.approx((ranks[inside] <= 5).mean(), abs=1e-9)
    assert result.metrics.keys() <= set(family.names) and "mrr/cold" not in family.names
    assert set(model.seen) == {(False, False)}
    assert model.training and not model.part.training, "modes come back as they were"
    with pytest.raises(UserError, match="NaN"):
        evaluate(Fixed(torch.full((37, 53), torch.nan)), [asked], CatalogueMetrics(EvalSection(ks=[5]), 53))
