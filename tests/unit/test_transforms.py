"""Transforms: filters hold for training and evaluation, samplers are pure functions of seed, epoch and ordinal."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pytest

from gr.batch import TARGETS_FROM
from gr.data.batches import Plan, samples
from gr.data.dataset import SequenceDataset
from gr.data.loader import Direct
from gr.data.order import Order
from gr.data.popularity import counted
from gr.data.requests import requests
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.transforms.filter_actions import FilterActions
from gr.data.transforms.session_ends import SessionEnds
from gr.data.transforms.stochastic_length import StochasticLength
from gr.data.transforms.transform import Draws
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.train import job
from tests.end_to_end.tiny import assert_same_run

ITEMS = 50


def sequences(lengths, seed=0) -> Sequences:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    actions = int(offsets[-1])
    place = np.arange(actions) - np.repeat(offsets[:-1], lengths)
    return Sequences.of(
        np.arange(len(lengths)),
        offsets,
        item=rng.integers(0, ITEMS, actions).astype(np.int32),
        time=(1_000_000 + place * 1000 + rng.integers(0, 900, actions)).astype(np.int64),
        type=rng.integers(0, 3, actions).astype(np.int32),
        value=np.where(rng.random(actions) < 0.1, np.nan, rng.integers(1, 6, actions)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SequenceDataset:
    rows = sequences(np.random.default_rng(1).integers(0, 40, 75))
    writer = DatasetWriter(
        tmp_path_factory.mktemp("d") / "set", "t", block_rows=16, action_type_names=["buy", "click", "view"]
    )
    writer.add(rows)
    counts = np.bincount(rows.items_A, minlength=ITEMS)
    return writer.finish(pa.table({"item_id": np.arange(ITEMS), "count": counts}))


def batches(dataset, samplers=(), filters=(), rank=0, ranks=1, start=0, epoch=0, window_blocks=2):
    order = Order(dataset.manifest.fingerprint, 3, dataset.users, 16, window_blocks)
    plan = Plan(
        LeaveOneOut(LeaveOneOut.Config()), order, 10, 16, "keep", frozenset({"item"}), samplers, filters
    )
    return list(Direct(Direct.Config(), dataset, plan, rank=rank, ranks=ranks).epoch(epoch, start))


def stochastic(**keys) -> StochasticLength:
    return StochasticLength(StochasticLength.Config(**keys))


EVERY = [stochastic(alpha=1.2, select=select) for select in ("greedy", "random", "recency")]
EVERY.append(SessionEnds(SessionEnds.Config(gap=1200)))


@pytest.mark.parametrize("sampler", EVERY, ids=lambda s: getattr(s.config, "select", s.config.name))
def test_samples_are_the_same_whatever_ranks_starts_and_windows(dataset, sampler):
    whole = batches(dataset, (sampler,))
    assert [b.digest for b in whole] != [b.digest for b in batches(dataset)], (
        "the digest is of what is trained on"
    )
    assert [b.digest for b in batches(dataset, (sampler,), start=3)] == [b.digest for b in whole[3:]]
    shares = [batches(dataset, (sampler,), rank=rank, ranks=3) for rank in range(3)]
    for k, batch in enumerate(whole):
        assert {s[k].digest for s in shares} == {batch.digest}
        together = {}
        for rank in shares:
            together |= by_ordinal(rank[k].share)
        assert together == by_ordinal(batch.share)
    everybody = {}
    for batch in whole:
        everybody |= by_ordinal(batch.share)
    other_windows = {}
    for batch in batches(dataset, (sampler,), window_blocks=5):
        other_windows |= by_ordinal(batch.share)
    assert other_windows == everybody
    if getattr(sampler.config, "select", "") != "greedy":  # it may cut the same ones, to the same actions
        next_epoch = {}
        for batch in batches(dataset, (sampler,), epoch=1):
            next_epoch |= by_ordinal(batch.share)
        assert next_epoch != everybody


def by_ordinal(share) -> dict[int, list[int]]:
    items = np.split(share.items_T.numpy(), share.offsets_B1.numpy()[1:-1])
    return {o: i.tolist() for o, i in zip(share.ordinals_B.tolist(), items, strict=True)}


@pytest.mark.parametrize("select", ["greedy", "random", "recency"])
def test_stochastic_length_is_the_papers_formula(select):
    limit, alpha, users = 64, 1.5, 4000
    rows = sequences(np.full(users, 49))  # n = 48 inputs
    sampler = stochastic(alpha=alpha, select=select)
    kept = sampler.apply(rows, Draws.of(1, 0, 0, "x"), limit)
    short = int(limit ** (alpha / 2))
    assert short == 22 and set(kept.lengths_R) == {short + 1, 49}
    share = (kept.lengths_R == 49).mean()
    probability = limit**alpha / 48**2
    assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / users)
    cut = np.flatnonzero(kept.lengths_R < 49)
    for row in cut[:50]:
        times = kept.timestamps_A[kept.offsets_R1[row] : kept.offsets_R1[row + 1]].tolist()
        before = rows.timestamps_A[rows.offsets_R1[row] : rows.offsets_R1[row + 1]].tolist()
        assert times == sorted(times) and set(times) <= set(before) and times[-1] == before[-1]
        if select == "greedy":
            assert times == before[-(short + 1) :]
    if select == "random":  # every input has the same chance
        stayed = np.isin(rows.timestamps_A + rows.owner_A * 10**9, kept.timestamps_A + kept.owner_A * 10**9)
        by_place = stayed.reshape(users, 49)[cut].mean(axis=0)
        assert by_place[-1] == 1 and np.abs(by_place[:-1] - short / 48).max() < 0.05


def test_recency_weights_are_those_of_the_paper():
    users = 20000
    place = np.tile(np.arange(4), users)
    times = np.tile([0, 60, 90, 95], users)  # f = 90, 30, 0 of three inputs; weights 1 - f / 120
    rows = Sequences.of(np.arange(users), np.arange(users + 1) * 4, item=place.astype(np.int32), time=times)
    draws = Draws.of(1, 0, 0, "x")
    free_A = place < 3
    chosen = stochastic(select="recency")._chosen(rows, draws, free_A, np.ones(users, np.int64))
    share = np.bincount(place[chosen], minlength=3) / users
    assert np.abs(share - np.array([0.25, 0.75, 1.0]) / 2).max() < 4 * np.sqrt(0.25 / users)


def test_short_sequences_stay_and_long_ones_are_cut_to_the_model_first():
    rows = sequences([0, 1, 2, 12, 100])
    sampler = stochastic(alpha=2.0)
    kept = sampler.apply(rows, Draws.of(1, 0, 0, "x"), 20)
    assert kept.lengths_R.tolist() == [0, 1, 2, 12, 21], "alpha 2 cuts nothing but to data.max_length"


def test_targets_of_a_period_all_stay():
    rows = sequences(np.full(200, 41)).with_users(**{TARGETS_FROM: np.full(200, 38)})
    kept = stochastic(alpha=1.2, select="random").apply(rows, Draws.of(1, 0, 0, "x"), 40)
    short = int(40**0.6)
    cut = kept.lengths_R < 41
    assert cut.any() and (kept.lengths_R[cut] == short + 1).all()
    assert (kept.lengths_R - kept.user_columns[TARGETS_FROM] == 3).all()


def test_a_session_end_of_each_user_is_drawn_evenly():
    users = 6000
    times = np.tile([0, 10, 5000, 5010, 5020, 9000], users)  # sessions end at places 1, 4 and 5
    rows = Sequences.of(
        np.arange(users), np.arange(users + 1) * 6, item=np.zeros(6 * users, np.int32), time=times
    )
    kept = SessionEnds(SessionEnds.Config(gap=1800)).apply(rows, Draws.of(1, 0, 0, "x"), 50)
    counts = np.bincount(kept.lengths_R, minlength=7)
    assert counts[[2, 5, 6]].sum() == users
    assert np.abs(counts[[2, 5, 6]] / users - 1 / 3).max() < 4 * np.sqrt(2 / 9 / users)
    lone = SessionEnds(SessionEnds.Config()).apply(sequences([1, 0]), Draws.of(1, 0, 0, "x"), 50)
    assert lone.lengths_R.tolist() == [1, 0]


def test_filters_are_seen_by_training_counts_and_requests_alike(dataset):
    bought = FilterActions(FilterActions.Config(types=["buy", "view"], at_least=2))
    bought.check_dataset(dataset)
    with pytest.raises(UserError, match="keeps type 'sell', which"):
        FilterActions(FilterActions.Config(types=["sell"])).check_dataset(dataset)
    seen = dataset.filtered((bought,))
    rows, all_rows = seen.read_rows(0, 75), dataset.read_rows(0, 75)
    kept = np.isin(all_rows.columns["type"], [0, 2]) & (all_rows.columns["value"] >= 2)
    assert rows.items_A.tolist() == all_rows.items_A[kept].tolist()
    split = LeaveOneOut(LeaveOneOut.Config())
    trained = {}
    for batch in batches(dataset, filters=(bought,)):
        trained |= by_ordinal(batch.share)
    lengths = rows.lengths_R
    assert {o: len(i) for o, i in trained.items()} == {
        o: min(max(n - 2, 0), 17) for o, n in enumerate(lengths.tolist())
    }
    assert counted(seen, split).counts_I.sum() == np.maximum(lengths - 2, 0).sum()
    assert counted(dataset, split).counts_I.sum() != counted(seen, split).counts_I.sum()
    asked = list(requests(seen, split, "test", max_length=16, columns={"item"}))
    targets = np.concatenate([r.targets_B.numpy() for r in asked])
    some = lengths >= 2
    assert targets.tolist() == rows.items_A[rows.offsets_R1[1:][some] - 1].tolist()


@pytest.mark.parametrize(
    "transform, sentence",
    [
        ("{name: filter_actions}", "it keeps everything"),
        ("{name: stochastic_length, alpha: 1}", "data.transforms.*alpha.* is 1"),
        ("{name: stochastic_lenght}", "did you mean 'stochastic_length'"),
    ],
)
def test_what_is_wrong_with_a_transform_is_one_sentence(config, transform, sentence):
    with pytest.raises(UserError, match=sentence):
        job.run(config(f"data.transforms=[{transform}]"))


def test_a_transform_says_which_column_it_misses(config):
    with pytest.raises(UserError, match=r"data\.transforms 'filter_actions' needs the column 'value'"):
        job.run(config("data.transforms=[{name: filter_actions, at_least: 4}]"))


def test_a_run_with_transforms_is_resumed_to_the_same_bits(config, tmp_path):
    keys = [
        "data.transforms=[session_ends, {name: stochastic_length, alpha: 1.3}]",
        "eval.splits=[]",
        "train.epochs=1",
    ]
    whole = job.run(config(*keys, f"run.dir={tmp_path}/whole"))
    stopped = job.run(
        config(*keys, f"run.dir={tmp_path}/stopped", "train.max_steps=8", "checkpoint.every_steps=5")
    )
    shutil.rmtree(stopped.path / "checkpoints" / "step-00000008")  # as if it had been killed
    job.resume(stopped.path, ["train.max_steps=null", "checkpoint.every_steps=4"])
    assert_same_run(whole.path, stopped.path)
    with pytest.raises(UserError, match=r"'data.transforms' cannot change on resume"):
        job.resume(stopped.path, ["data.transforms=[]"])


# -- nothing of the future -------------------------------------------------------------------------------------------


def test_what_is_held_out_is_never_trained_on_and_targets_follow_their_inputs(dataset):
    """With items that are never repeated: what a sample holds, and in what order, can be told exactly."""
    rows = dataset.read_rows(0, 75)
    numbered = Sequences.of(
        rows.users_R,
        rows.offsets_R1,
        item=np.arange(len(rows.items_A), dtype=np.int32),
        time=rows.timestamps_A,
    )
    held_out = numbered.items_A[numbered.offsets_R1[1:][numbered.lengths_R > 0] - 1]
    order = Order("f", 3, 75, 16, 2)
    for chosen in [(), *((sampler,) for sampler in EVERY)]:
        plan = Plan(LeaveOneOut(LeaveOneOut.Config(holdout=1)), order, 10, 16, "keep", None, chosen)
        for epoch in range(3):
            made = samples(plan, numbered, epoch).copied()
            assert not np.isin(made.items_A, held_out).any()
            inside = made.owner_A[1:] == made.owner_A[:-1]
            assert (np.diff(made.items_A)[inside] > 0).all(), "a target before its input"
