"""Ranks and best rows from chunks, however the rows are cut or dealt to shards: against one chunk and brute force.

Shapes: B queries, I rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gr.embeddings.ranks import (
    Excluding,
    LogSums,
    best_rows,
    count_above,
    ranks_from,
    ranks_in,
    target_scores,
    target_standing,
)
from tests.precision import UNIT, growth
from tests.unit.test_eval_ranking import brute_force, random_case

CUTS = [1, 7, 26, 52, 53, 1000]
ITEMS = 53


def case(seed, nan=()):
    """Scores with ties and -inf, targets, exclusions with repeats and with the targets themselves; ``nan``: (query,
    row) of scores that are no numbers."""
    scores, exclude, asked = random_case(seed, items=ITEMS)
    for query, row in nan:
        scores[query, row] = np.nan
    lists = [np.append(gone, target) for gone, target in zip(exclude, asked.targets_B.numpy(), strict=True)]
    offsets = torch.tensor(np.cumsum([0, *map(len, lists)]))
    return (
        torch.from_numpy(scores),
        asked.targets_B,
        (offsets, torch.from_numpy(np.concatenate(lists))),
        lists,
    )


def chunks_of(scores_BI, cut):
    for start in range(0, scores_BI.shape[1], cut):
        yield start, scores_BI[:, start : start + cut].clone()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_in_two_passes_rank_as_one_chunk_and_as_counting_does(cut, seed):
    scores, targets, exclude, lists = case(seed)
    made = []

    def chunks():
        made.append(cut)
        return chunks_of(scores, cut)

    for given, gone in ((exclude, lists), (None, [np.array([], np.int64)] * len(lists))):
        made.clear()
        ranks = target_standing(chunks, targets, ITEMS, given).ranks_B
        assert len(made) == (1 if cut >= ITEMS else 2), "a single chunk is kept"
        assert ranks.dtype == torch.float64
        expected = brute_force(scores.numpy(), targets.tolist(), gone)
        assert ranks.tolist() == expected == ranks_in(scores, targets, given).tolist()
        assert any(rank % 1 for rank in expected), "the case has no tie"


@pytest.mark.parametrize("cut", CUTS)
def test_a_nan_anywhere_makes_that_querys_rank_nan_and_no_others(cut):
    scores, targets, exclude, lists = case(5)
    broken = [(4, int(targets[4])), (9, (int(targets[9]) + 1) % ITEMS), (20, ITEMS - 1)]
    broken.append((30, int(lists[30][0])))  # an excluded row: the model is no better for that
    scores, targets, exclude, lists = case(5, broken)
    standing = target_standing(lambda: chunks_of(scores, cut), targets, ITEMS, exclude)
    ranks = standing.ranks_B
    assert torch.equal(standing.losses_B.isnan(), ranks.isnan())
    assert ranks.isnan().nonzero()[:, 0].tolist() == [4, 9, 20, 30]
    expected = torch.tensor(brute_force(scores.numpy(), targets.tolist(), lists), dtype=torch.float64)
    whole = ~ranks.isnan()
    assert torch.equal(ranks[whole], expected[whole])
    assert torch.equal(ranks_in(scores, targets, exclude).isnan(), ranks.isnan())


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_add_up(shards):
    """Each shard has some of the rows: scores of targets are maxima over shards, counts are sums."""
    scores, targets, exclude, lists = case(2, [(3, 0), (11, ITEMS - 1)])
    parts = [list(chunks_of(scores, 5))[shard::shards] for shard in range(shards)]
    bars = torch.stack([target_scores(part, targets) for part in parts]).amax(0)
    excluding = Excluding(exclude, ITEMS, keep=targets)
    counts = [count_above(part, bars, targets, excluding) for part in parts]
    higher, equal = (torch.stack(c).sum(0) for c in zip(*counts, strict=True))
    ranks = ranks_from(higher, equal, bars)
    assert torch.equal(ranks.nan_to_num(-1), ranks_in(scores, targets, exclude).nan_to_num(-1))
    assert ranks.isnan().sum() == 2


def losses_of(scores_BI, targets_B):
    """In float64, and how far float32 sums of exponentials may be off: an argument is rounded once (to half a unit of
    its size), an exponential by a unit or two more, a sum as growth says; a logarithm makes relative errors absolute.
    """
    log_sums_B = scores_BI.double().logsumexp(1)
    losses_B = log_sums_B - scores_BI.double().gather(1, targets_B[:, None])[:, 0]
    finite_BI = scores_BI.masked_fill(scores_BI.isinf(), 0.0)
    span = float((finite_BI.amax(1) - finite_BI.amin(1)).max())
    return losses_B, (float(growth(scores_BI.shape[1])) + span + 3) * UNIT[torch.float32]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 60.0])
def test_losses_are_those_of_the_softmax_over_everything(cut, scale):
    """However high the scores are, and whatever is left out of the ranking; a row scored -inf has no share."""
    scores, targets, exclude, _ = case(3)
    scores = scores * scale + 100 * scale
    losses = target_standing(lambda: chunks_of(scores, cut), targets, ITEMS, exclude).losses_B
    expected, bound = losses_of(scores, targets)
    finite = expected.isfinite()
    assert losses.dtype == torch.float64 and torch.equal(losses.isposinf(), ~finite)
    assert (losses - expected)[finite].abs().max() <= bound and 0 < finite.sum() < len(finite)


@pytest.mark.parametrize("shards", [2, 7])
def test_log_sums_of_shards_add_up(shards):
    """One of them may have nothing, or nothing but -inf, for a query."""
    scores, targets, _, _ = case(4)
    found = []
    for shard in range(shards + 1):
        sums = LogSums(len(targets), targets.device)
        target_scores(list(chunks_of(scores, 2))[shard::shards] if shard < shards else [], targets, sums)
        found.append(sums)
    most = torch.stack([sums.most_B for sums in found]).amax(0)
    for sums in found:
        sums.raise_to(most)
    found[0].sum_B = torch.stack([sums.sum_B for sums in found]).sum(0)
    own = scores.gather(1, targets[:, None])[:, 0]
    expected, bound = losses_of(scores, targets)
    finite = expected.isfinite()
    assert (found[0].losses(own) - expected)[finite].abs().max() <= bound


def test_a_target_in_no_chunk_has_no_score():
    scores, targets, _, _ = case(1)
    found = target_scores([(0, scores[:, :10])], targets)
    assert torch.equal(
        found.isneginf(), (targets >= 10) | scores.gather(1, targets[:, None])[:, 0].isneginf()
    )


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("k", [1, 9, ITEMS, 1000])
def test_the_best_rows_of_chunks_are_those_of_sorting_everything(cut, k):
    scores, _, exclude, lists = case(6)
    scores += torch.arange(ITEMS) * 2.0**-10  # no ties: rows are comparable, too
    expected = scores.clone()
    for query, gone in enumerate(lists):
        expected[query, gone] = -torch.inf
    step = max(cut, min(k, ITEMS))
    for given, want in ((None, scores), (exclude, expected)):
        found, rows = best_rows(chunks_of(scores, step), len(scores), k, ITEMS, given, scores)
        best = want.sort(dim=1, descending=True)
        assert found.shape == (len(scores), min(k, ITEMS))
        assert torch.equal(found, best.values[:, : min(k, ITEMS)])
        left = found > -torch.inf
        assert torch.equal(rows[left], best.indices[:, : min(k, ITEMS)][left])


def test_small_chunks_make_up_a_long_list_too():
    """A chunk may be smaller than the list that is asked for."""
    scores, _, _, _ = case(6)
    scores += torch.arange(ITEMS) * 2.0**-10
    found, rows = best_rows(chunks_of(scores, 4), len(scores), 20, ITEMS, None, scores)
    best = scores.sort(dim=1, descending=True)
    assert torch.equal(found, best.values[:, :20])
    assert torch.equal(rows[found > -torch.inf], best.indices[:, :20][found > -torch.inf])


def test_excluded_pairs_are_there_once_and_targets_stay():
    offsets, rows = torch.tensor([0, 3, 3, 5]), torch.tensor([4, 4, 2, 0, 6])
    excluding = Excluding((offsets, rows), 7)
    assert torch.stack([excluding.queries, excluding.rows]).tolist() == [[0, 0, 2, 2], [2, 4, 0, 6]]
    kept = Excluding((offsets, rows), 7, keep=torch.tensor([4, 0, 1]))
    assert torch.stack([kept.queries, kept.rows]).tolist() == [[0, 2, 2], [2, 0, 6]]
    queries, columns = kept.within(2, 7)
    assert (queries.tolist(), columns.tolist()) == ([0, 2], [0, 4])
