"""The Dirichlet-process stream against a literal reading of its definition, and the oracle against the stream."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from gr.batch import SequenceBatch
from gr.data.dataset import SequenceDataset
from gr.data.making.sources.synthetic_dp import Generator, Oracle, StreamOptions as Options, SyntheticDP
from gr.errors import UserError

SMALL = {"records": 3000, "length": 12, "items": 120, "categories": 6, "alpha_max": 20.0, "seed": 3}


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """The statistic as a standard normal deviate (Wilson and Hilferty 1931); cells expected below 5 are pooled."""
    small = expected < 5
    observed = np.append(observed[~small], observed[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))


def batch_of(items: np.ndarray, ordinals: np.ndarray, keep: int) -> SequenceBatch:
    """The last ``keep`` actions of every record."""
    kept = items[:, -keep:]
    return SequenceBatch(
        offsets_B1=torch.arange(len(kept) + 1) * kept.shape[1],
        columns={"item": torch.from_numpy(kept.reshape(-1).astype(np.int64))},
        ordinals_B=torch.from_numpy(ordinals),
        lengths=(kept.shape[1],) * len(kept),
    )


def literal_categories(
    generator: np.random.Generator, alpha: float, prior: np.ndarray, length: int
) -> tuple[int, ...]:
    """Slots of a record by the paper's words: a draw from the prior, or the category of an earlier action."""
    slots: list[int] = []
    for n in range(1, length + 1):
        if generator.random() < alpha / (alpha + n - 1):
            slots.append(int(generator.choice(len(prior), p=prior)))
        else:
            slots.append(slots[generator.integers(len(slots))])
    return tuple(slots)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_record_is_a_function_of_its_number(repeats):
    generator = Generator(Options(**SMALL, repeats=repeats))
    together = generator.make(np.arange(40), 12).items_RL
    scattered = generator.make(np.array([7, 39, 8, 9, 0]), 12).items_RL
    assert np.array_equal(scattered, together[[7, 39, 8, 9, 0]])
    assert np.array_equal(generator.make(np.arange(40), 5).items_RL, together[:, :5])
    other_seed = Generator(Options(**{**SMALL, "seed": 4}, repeats=repeats)).make(np.arange(40), 12).items_RL
    assert (other_seed != together).mean() > 0.8
    assert generator.make(np.arange(0), 12).items_RL.shape == (0, 12)


def test_only_available_items_of_few_categories():
    options = Options(**SMALL)
    generator = Generator(options)
    records = np.arange(options.records)
    state = generator.make(records, options.length)
    limits = np.floor((0.4 + 0.6 * records / options.records) * options.items)
    assert (state.items_RL < limits[:, None]).all()
    assert (
        state.items_RL[:100].max() >= 45 and state.items_RL[-100:].max() >= 115
    )  # the limit is reached, and moves
    categories = generator.category_I[state.items_RL]
    assert max(len(set(row)) for row in categories) == 5
    used = (state.prior_SR > 0).sum(axis=0)
    assert abs(chi_square(np.bincount(used, minlength=6)[1:], np.full(5, options.records / 5))) < 4
    in_slots = state.categories_SR.T[:, None, :] == categories[:, :, None]
    assert np.array_equal((in_slots & (state.prior_SR.T[:, None] > 0)).sum(axis=1), state.counts_SR.T)
    assert in_slots.any(axis=2).all()


def test_categories_follow_the_paper_s_process():
    # The pattern of slots of a record (its first three actions), against the literal two-way draw with the record's
    # own alpha and prior: 125 cells, 3000 records, each simulated four times.
    options = Options(**{**SMALL, "alpha_max": 3.0})  # a small alpha, so that copying matters
    generator = Generator(options)
    state = generator.make(np.arange(options.records), 3)
    categories = generator.category_I[state.items_RL]
    slots = (state.categories_SR.T[:, None, :] == categories[:, :, None]).argmax(axis=2)
    simulated: Counter[tuple[int, ...]] = Counter()
    rng = np.random.default_rng(0)
    for record in range(options.records):
        for _ in range(4):
            simulated[literal_categories(rng, state.alpha_R[record], state.prior_SR[:, record], 3)] += 1
    ours = Counter(map(tuple, slots.tolist()))
    patterns = sorted(simulated.keys() | ours.keys())
    expected = np.array([simulated[p] / 4 for p in patterns])
    observed = np.array([ours[p] for p in patterns], dtype=float)
    # The simulation has a quarter of our variance on top: scale the deviations back to a plain chi-square.
    scaled = expected + (observed - expected) / np.sqrt(1.25)
    assert abs(chi_square(scaled, expected)) < 4
    independent = np.einsum("ar,br,cr->abc", *[state.prior_SR] * 3)
    expected = np.array([independent[p] for p in patterns])
    assert (
        chi_square(observed, expected * options.records / expected.sum()) > 6
    )  # the test can tell copying from none


def test_without_repeats_a_category_is_dealt_out_before_an_item_returns():
    options = Options(
        **{**SMALL, "length": 100, "items": 60, "categories": 2, "start_fraction": 1.0}, repeats=False
    )
    generator = Generator(options)
    for row in generator.make(np.arange(200), options.length).items_RL:
        for category in range(2):
            size = int((generator.category_I == category).sum())
            dealt = row[generator.category_I[row] == category]
            for start in range(0, len(dealt), size):
                deal = dealt[start : start + size]
                assert len(set(deal)) == len(deal)


def test_categories_may_be_unequal():
    """A record's first category is drawn in proportion to (c + 1)^-exponent, the others among those that are left."""
    options = Options(records=20_000, length=2, items=400, categories=8, seed=3, category_exponent=1.0)
    state = Generator(options).make(np.arange(options.records), 2)
    ordered_SR = np.sort(state.categories_SR, axis=0)
    assert (np.diff(ordered_SR, axis=0) > 0).all()
    share_C = (np.arange(8) + 1.0) ** -1
    share_C /= share_C.sum()
    counts_C = np.bincount(state.categories_SR[0], minlength=8)
    deviation_C = np.sqrt(options.records * share_C * (1 - share_C))
    assert (np.abs(counts_C - options.records * share_C) < 5 * deviation_C).all()
    second_C = sum(
        share_C[c] * np.where(np.arange(8) == c, 0.0, share_C) / (1 - share_C[c]) for c in range(8)
    )
    counts_C = np.bincount(state.categories_SR[1], minlength=8)
    assert (np.abs(counts_C - options.records * second_C) < 5 * np.sqrt(options.records * second_C)).all()


@pytest.mark.parametrize("repeats", [True, False])
def test_oracle_against_monte_carlo_of_one_step(repeats):
    # The next action of a few records, drawn 40,000 times from the definition given their true history.
    options = Options(**SMALL, repeats=repeats)
    generator = Generator(options)
    records = np.array([0, 1500, 2999])
    state = generator.make(records, options.length - 1)
    probability = generator.next_item(state)
    np.testing.assert_allclose(probability.sum(axis=1), 1, atol=1e-12)
    rng = np.random.default_rng(1)
    for index, record in enumerate(records):
        history = state.items_RL[index]
        prior, alpha = state.prior_SR[:, index], state.alpha_R[index]
        available = np.arange(int((0.4 + 0.6 * record / options.records) * options.items))
        pools = {}
        for category in state.categories_SR[prior > 0, index]:
            items = available[generator.category_I[available] == category]
            seen = history[generator.category_I[history] == category]
            this_round = seen[len(seen) - len(seen) % len(items) :]
            pools[int(category)] = items if repeats else np.setdiff1d(items, this_round)
        draws = np.empty(40_000, dtype=np.int64)
        n = options.length
        for i in range(len(draws)):
            if rng.random() < alpha / (alpha + n - 1):
                category = rng.choice(state.categories_SR[:, index], p=prior)
            else:
                category = generator.category_I[history[rng.integers(n - 1)]]
            pool = pools[int(category)]
            draws[i] = pool[rng.integers(len(pool))]
        observed = np.bincount(draws, minlength=options.items)
        assert (observed[probability[index] == 0] == 0).all()
        assert abs(chi_square(observed.astype(float), probability[index] * len(draws))) < 4


@pytest.mark.parametrize("repeats", [True, False])
def test_oracle_is_calibrated_on_the_stream(tmp_path, repeats):
    # The probability integral transform of the true targets under the oracle is uniform on (0, 1) exactly when the
    # oracle's probabilities are right; and hits@10 add up to the mass of its ten best (binomial deviation).
    dataset = SyntheticDP(Options(**SMALL, repeats=repeats)).prepare(None, str(tmp_path / "dp"))
    rows = dataset.read_rows(0, dataset.users)
    items = rows.items_A.reshape(dataset.users, -1)
    scores = Oracle(dataset).scores(batch_of(items, rows.ordinals_R, keep=6)).numpy().astype(np.float64)
    assert scores.shape == (3000, 120)
    index = np.arange(len(items))
    target = scores[index, items[:, -1]]
    assert (target > 0).all()
    order = np.argsort(scores, axis=1)
    ranked = np.take_along_axis(scores, order, axis=1).cumsum(axis=1)
    place = (order == items[:, -1:]).argmax(axis=1)
    transform = ranked[index, place] - np.random.default_rng(2).random(len(items)) * target
    histogram = np.histogram(transform, bins=30, range=(0, 1))[0].astype(float)
    assert abs(chi_square(histogram, np.full(30, 100.0))) < 4
    best = order[:, -10:]
    mass = np.take_along_axis(scores, best, axis=1).sum(axis=1)
    hits = (best == items[:, -1:]).any(axis=1).sum()
    assert abs(hits - mass.sum()) < 4 * np.sqrt((mass * (1 - mass)).sum())
    # Ranks that count half of the ties see no tie, so the ceiling is what an evaluator measures.
    assert all(np.unique(row[row > 0]).size == (row > 0).sum() for row in scores)
    ranks = 1 + (scores > target[:, None]).sum(axis=1) + ((scores == target[:, None]).sum(axis=1) - 1) / 2
    assert (ranks <= 10).sum() == hits
    generator = Generator(Options(**SMALL, repeats=repeats))
    exact = generator.next_item(generator.make(rows.ordinals_R, 11))
    np.testing.assert_allclose(scores, exact, rtol=60 * 2.0**-22 + 1e-6)


def test_oracle_uses_nothing_of_the_target(tmp_path):
    dataset = SyntheticDP(Options(**SMALL)).prepare(None, str(tmp_path / "dp"))
    rows = dataset.read_rows(0, 50)
    items = rows.items_A.reshape(50, -1)
    oracle = Oracle(dataset)
    scores = oracle.scores(batch_of(items, rows.ordinals_R, keep=12))
    unknown = items.copy()
    unknown[:, -1] = -1
    assert torch.equal(oracle.scores(batch_of(unknown, rows.ordinals_R, keep=12)), scores)
    assert torch.equal(oracle.scores(batch_of(items, rows.ordinals_R, keep=1)), scores)
    shuffled = np.random.default_rng(0).permutation(50)
    assert torch.equal(
        oracle.scores(batch_of(items[shuffled], rows.ordinals_R[shuffled], 4)), scores[shuffled]
    )
    assert oracle.scores(batch_of(items[:0], rows.ordinals_R[:0], keep=4)).shape == (0, 120)


def test_oracle_refuses_samples_that_end_early_and_other_datasets(tmp_path):
    dataset = SyntheticDP(Options(**SMALL)).prepare(None, str(tmp_path / "dp"))
    rows = dataset.read_rows(0, 20)
    items = rows.items_A.reshape(20, -1)
    with pytest.raises(UserError, match="records"):
        Oracle(dataset).scores(batch_of(items[:, :-1], rows.ordinals_R, keep=8))
    manifest = tmp_path / "dp" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "provenance": {"source": "elsewhere"}}))
    with pytest.raises(UserError, match="oracle knows synthetic-dp streams only"):
        Oracle(SequenceDataset(tmp_path / "dp"))


def test_dataset_on_disk(tmp_path):
    options = Options(**{**SMALL, "records": 2500})  # three blocks of 1024, the last one short
    dataset = SyntheticDP(options).prepare(None, str(tmp_path / "dp"))
    manifest = dataset.manifest
    assert (manifest.row_order, manifest.users, manifest.actions, manifest.items) == (
        "stream",
        2500,
        30000,
        120,
    )
    assert not dataset.has_timestamps and [b.rows for b in manifest.blocks] == [1024, 1024, 452]
    assert manifest.provenance["options"] == options.model_dump()
    rows = dataset.read_rows(0, 2500)
    assert np.array_equal(rows.users_R, np.arange(2500)) and (rows.lengths_R == 12).all()
    assert np.array_equal(rows.items_A, Generator(options).make(np.arange(2500), 12).items_RL.reshape(-1))
    catalogue = dataset.catalogue.to_pydict()
    assert catalogue["item_id"] == list(range(120))
    assert np.array_equal(catalogue["count"], np.bincount(rows.items_A, minlength=120))
    assert np.array_equal(catalogue["category"], Generator(options).category_I)
    again = SyntheticDP(options).prepare(None, str(tmp_path / "again"))
    assert again.manifest.fingerprint == manifest.fingerprint
    with pytest.raises(UserError, match="exists"):
        SyntheticDP(options).prepare(None, str(tmp_path / "dp"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "dp"]  # no scratch folder is left


def test_too_few_items_is_a_clear_error():
    with pytest.raises(UserError, match=r"category \d+ has no item at the start of the stream \(40 items"):
        Generator(Options(items=40, categories=100))


def test_one_category_one_slot():
    options = Options(records=5, length=4, items=3, categories=1, start_fraction=1.0, repeats=False)
    generator = Generator(options)
    items = generator.make(np.arange(5), 4).items_RL
    assert all(sorted(row[:3]) == [0, 1, 2] for row in items.tolist())
    probability = generator.next_item(generator.make(np.arange(5), 2))
    np.testing.assert_allclose(probability[np.arange(5), items[:, 2]], 1)
