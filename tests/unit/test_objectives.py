"""Objectives against their formulas written as loops in float64, gradients included."""

import math

import pytest
import torch

from gr import registry
from gr.config import SimilaritySection
from gr.models import step as step_module
from gr.models.objectives.in_batch import InBatchDebiased
from gr.models.objectives.negatives import NegativeSampler, popularity
from gr.models.objectives.pairwise import BCE, BPR
from gr.models.objectives.sampled_softmax import SampledSoftmax
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import NextItem, Supervision
from gr_kernels.sampled_softmax import op as sampled_softmax_op
from tests.precision import tolerance
from tests.unit.models_common import Items, batch, generator, gradients, local_table, randomise

ITEMS, DIM, KEY = 12, 5, 77  # few items, so that negatives often hit the target
# A score of 5 terms, a logarithm of a sum of up to 13, the sum over 13 targets of losses up to 5.
LOSS = tolerance(13, stages=3, size=5.0)
# Queries rounded to bfloat16 once, which moves logits of 2, and so a loss, by 2 u each: 13 targets'.
HALF = tolerance(1, dtype=torch.bfloat16, size=13 * 2.0)
COUNTS = torch.tensor([0, 5, 1, 0, 20, 3, 3, 2, 9, 1, 1, 4])
SIMILARITIES = {
    "cosine": SimilaritySection(temperature=0.5),
    "inner product with bias": SimilaritySection(normalize=False, temperature=1.0, item_bias=True),
}


@pytest.fixture(params=SIMILARITIES)
def similarity(request):
    return Similarity(SIMILARITIES[request.param])


@pytest.fixture
def table(similarity):
    return randomise(local_table(ITEMS, DIM, bias=similarity.scoring.bias), std=1.0).double()


@pytest.fixture
def supervision():
    return NextItem(NextItem.Config()).supervise(batch((9, 0, 1, 6), ITEMS), key=1)


def queries(supervision):
    g = generator(8)
    return torch.randn(supervision.count, DIM, generator=g, dtype=torch.float64).requires_grad_()


def all_scores(similarity, table, q_SD):
    """(S, I) by the definition."""
    config, e_ID = similarity.config, table.weight
    if config.normalize:
        q_SD = q_SD / q_SD.norm(dim=1, keepdim=True).clamp_min(config.eps)
        e_ID = e_ID / e_ID.norm(dim=1, keepdim=True).clamp_min(config.eps)
    scores = q_SD @ e_ID.T / config.temperature
    return scores + table.bias if config.item_bias else scores


def build(config, similarity):
    return config.build(similarity, Items(ITEMS, COUNTS))


def step(table, candidates=None):
    """A step's context on the table, which is its own view."""
    return StepContext(KEY, candidates, {"items": table.view()})


def check(objective, table, supervision, loop, candidates=None):
    """``loop(row of scores, target, s) -> loss of target s``."""
    q = queries(supervision)
    actual = objective(q, supervision, step(table, candidates), table)
    scores = all_scores(objective.similarity, table, q)
    expected = sum(loop(scores[s], int(y), s) for s, y in enumerate(supervision.targets_S))
    torch.testing.assert_close(actual, expected, check_dtype=False, **LOSS)  # log q is float32
    inputs = [q, *table.parameters()]
    for a, e in zip(gradients(actual, *inputs), gradients(expected, *inputs)):
        torch.testing.assert_close(a, e, **LOSS)


def minus_log_share(positive, others):
    return torch.logsumexp(torch.stack([positive, *others]), 0) - positive


def log_q(item):
    return math.log(max(int(COUNTS[item]), 1) / int(COUNTS.sum()))


@pytest.mark.parametrize("negatives", [1, 6])
@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("logq", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_sampled_softmax(similarity, table, supervision, negatives, sampling, logq, shared):
    config = SampledSoftmax.Config(negatives=negatives, sampling=sampling, logq=logq, shared=shared)
    objective = build(config, similarity)
    if shared:
        one = objective.sampler.shared(KEY, negatives, torch.device("cpu"))
        drawn = [one.tolist()] * supervision.count
    else:
        drawn = objective.sampler.own(KEY, supervision, negatives)[:, 1:].tolist()
    if negatives > 1 and not shared:
        assert any(y in row for y, row in zip(supervision.targets_S.tolist(), drawn))
    corrected = logq and sampling == "popularity"

    def loop(scores, y, s):
        lowered = [score - (log_q(i) if corrected else 0.0) for i, score in enumerate(scores)]
        return minus_log_share(lowered[y], [lowered[r] for r in drawn[s] if r != y])

    check(objective, table, supervision, loop)


@pytest.mark.parametrize("room", [10**9, 0])
@pytest.mark.parametrize(
    "config", [SampledSoftmax.Config(negatives=6), BPR.Config(negatives=2)], ids=lambda c: c.name
)
def test_candidates_that_were_announced_are_not_drawn_again(
    monkeypatch, similarity, table, supervision, config, room
):
    monkeypatch.setattr(step_module, "KEPT", room)
    objective, context = build(config, similarity), step(table)
    draws, real = [], NegativeSampler._draw
    monkeypatch.setattr(NegativeSampler, "_draw", lambda *call: draws.append(call) or real(*call))
    q = queries(supervision)
    plain = objective(q, supervision, step(table), table)
    announced = objective.wanted(supervision, context)[-1]
    assert len(draws) == 2 and announced.shape[0] == supervision.count
    assert torch.equal(objective(q, supervision, context, table), plain)
    assert len(draws) == (2 if room else 3) and not context.drawn
    objective(q, supervision, context, table)
    assert len(draws) == (3 if room else 4), "what was kept is given once"


def test_full_softmax(similarity, table, supervision):
    objective = build(registry.resolve(registry.OBJECTIVES, "full_softmax", "").Config(), similarity)
    check(objective, table, supervision, lambda scores, y, s: scores.logsumexp(0) - scores[y])


@pytest.mark.parametrize("negatives", [1, 4])
@pytest.mark.parametrize("kind", [BCE, BPR])
def test_pairwise(similarity, table, supervision, negatives, kind):
    objective = build(kind.Config(negatives=negatives), similarity)
    drawn = objective.sampler.own(KEY, supervision, negatives)[:, 1:].tolist()
    zero = torch.zeros((), dtype=torch.float64)

    def bce(scores, y, s):
        against = [-torch.log(1 - torch.sigmoid(scores[r])) for r in drawn[s] if r != y]
        return -torch.log(torch.sigmoid(scores[y])) + sum(against, zero)

    def bpr(scores, y, s):
        return sum((-torch.log(torch.sigmoid(scores[y] - scores[r])) for r in drawn[s] if r != y), zero)

    check(objective, table, supervision, bce if kind is BCE else bpr)


def own_items(supervision):
    """For each target, all that stands in its sequence."""
    sequences = supervision.layout.sequences_T
    places = torch.arange(len(sequences)) if supervision.queries_S is None else supervision.queries_S
    found = []
    for place in places:
        same = sequences == sequences[place]
        targets = supervision.targets_S[same[places]]
        found.append({*supervision.tokens_T[same].tolist(), *targets.tolist()})
    return found


@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("kind", [BCE, BPR])
def test_negatives_outside_the_sequence(similarity, table, kind, targets):
    """The first of eight draws that is; nothing counts where all are inside."""
    supervision = NextItem(NextItem.Config(targets=targets)).supervise(batch((9, 0, 2, 6), ITEMS), key=1)
    objective = build(kind.Config(negatives=3, outside="sequence"), similarity)
    draws = objective.sampler.own(KEY, supervision, 24)[:, 1:].view(-1, 3, 8).tolist()
    own, zero = own_items(supervision), torch.zeros((), dtype=torch.float64)
    chosen = [
        [next((r for r in row if r not in inside), None) for row in of_target]
        for inside, of_target in zip(own, draws)
    ]
    assert any(r != row[0] for kept, rows in zip(chosen, draws) for r, row in zip(kept, rows))

    def loop(scores, y, s):
        kept = [r for r in chosen[s] if r is not None]
        if kind is BCE:
            against = [-torch.log(1 - torch.sigmoid(scores[r])) for r in kept]
            return -torch.log(torch.sigmoid(scores[y])) + sum(against, zero)
        return sum((-torch.log(torch.sigmoid(scores[y] - scores[r])) for r in kept), zero)

    check(objective, table, supervision, loop)


@pytest.mark.parametrize("logq", [False, True])
@pytest.mark.parametrize("pooled", ["few", "more than items"])
def test_in_batch_apart_from_the_sequence(similarity, table, supervision, logq, pooled):
    """IDvs.MoRec's: every column whose item stands in the user's sequence is masked, but the target."""
    objective = build(InBatchDebiased.Config(logq=logq, outside="sequence"), similarity)
    targets = supervision.targets_S
    pool = targets[:ITEMS] if pooled == "few" else torch.cat([targets, targets[:3], torch.tensor([4, 0])])
    own = own_items(supervision)

    def loop(scores, y, s):
        lowered = [score - (log_q(i) if logq else 0.0) for i, score in enumerate(scores)]
        return minus_log_share(lowered[y], [lowered[r] for r in pool.tolist() if r not in own[s]])

    check(objective, table, supervision, loop, pool)


@pytest.mark.parametrize("logq", [False, True])
@pytest.mark.parametrize("candidates", ["few", "more than items", "the target alone"])
@pytest.mark.parametrize("max_scores", [1, 40, 1 << 24])
def test_in_batch(similarity, table, supervision, monkeypatch, logq, candidates, max_scores):
    monkeypatch.setattr(sampled_softmax_op, "MAX_SCORES", {"cpu": max_scores})
    objective = build(InBatchDebiased.Config(logq=logq), similarity)
    targets = supervision.targets_S
    pool = {
        "few": targets[:ITEMS],
        "more than items": torch.cat([targets, targets[:3], torch.tensor([4])]),
        "the target alone": targets[:1],
    }[candidates]

    def loop(scores, y, s):
        lowered = [score - (log_q(i) if logq else 0.0) for i, score in enumerate(scores)]
        return minus_log_share(lowered[y], [lowered[r] for r in pool.tolist() if r != y])

    check(objective, table, supervision, loop, pool)


def test_in_batch_needs_the_global_targets(similarity, table, supervision):
    objective = build(InBatchDebiased.Config(), similarity)
    assert objective.needs_global_targets
    with pytest.raises(ValueError, match="candidates_G"):
        objective(queries(supervision), supervision, step(table), table)


OBJECTIVES = [
    SampledSoftmax.Config(negatives=5),
    SampledSoftmax.Config(negatives=5, shared=True, sampling="popularity", logq=True),
    BCE.Config(negatives=2),
    BPR.Config(),
    BCE.Config(outside="sequence"),
    InBatchDebiased.Config(),
    InBatchDebiased.Config(outside="sequence"),
    registry.resolve(registry.OBJECTIVES, "full_softmax", "").Config(),
]


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda c: c.name)
def test_micro_batches_sum_to_the_batch(similarity, table, config):
    task, whole = NextItem(NextItem.Config()), batch((9, 0, 1, 6, 4), ITEMS)
    objective = build(config, similarity)
    vectors = torch.randn(whole.actions, DIM, generator=generator(3), dtype=torch.float64)
    targets = task.supervise(whole, 1).targets_S

    def loss(part):
        supervision = task.supervise(part, 1)
        # a query of its own for each (sample, position), wherever the sample is
        q = vectors[(supervision.ordinals_S * 5 + supervision.positions_S) % len(vectors)]
        return objective(q, supervision, step(table, targets), table)

    halves = loss(whole.slice(0, 3)) + loss(whole.slice(3, 5))
    torch.testing.assert_close(loss(whole), halves, check_dtype=False, **LOSS)


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda c: c.name)
def test_losses_are_float32_whatever_the_queries(similarity, table, supervision, config):
    objective, context = build(config, similarity), step(table.float(), supervision.targets_S)
    q = queries(supervision).detach()
    exact = objective(q.float(), supervision, context, table)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(q.bfloat16(), supervision, context, table)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, **HALF)


def many(targets=3000):
    zeros = torch.zeros(targets, dtype=torch.int64)
    layout = NextItem(NextItem.Config()).supervise(batch((1,)), 0).layout
    return Supervision(zeros, layout, None, zeros, torch.arange(targets), zeros)


def test_popular_items_are_drawn_in_proportion():
    sampler = NegativeSampler("popularity", Items(ITEMS, COUNTS))
    drawn = sampler.own(KEY, many(), 10)[:, 1:].flatten()
    share = COUNTS / COUNTS.sum()
    seen = torch.bincount(drawn, minlength=ITEMS) / len(drawn)
    assert (seen[COUNTS == 0] == 0).all()
    assert ((seen - share).abs() <= 4.5 * (share * (1 - share) / len(drawn)).sqrt()).all()


def test_uniform_items_are_drawn_alike():
    drawn = NegativeSampler("uniform", Items(ITEMS, COUNTS)).own(KEY, many(), 10)[:, 1:].flatten()
    seen = torch.bincount(drawn, minlength=ITEMS) / len(drawn)
    assert ((seen - 1 / ITEMS).abs() <= 4.5 * (1 / ITEMS / len(drawn)) ** 0.5).all()


def test_counts_beyond_32_bits_and_none_at_all():
    ends, shares = popularity(COUNTS * 10**12)
    assert ends[-1] == 2**31 - 1
    assert ends[0] == 0
    torch.testing.assert_close(ends.diff() / ends[-1], shares[1:] * (COUNTS[1:] > 0), **tolerance(ITEMS))
    with pytest.raises(ValueError, match="seen at least once"):
        popularity(torch.zeros(4, dtype=torch.int64))
