"""A log in the order in which it happened: every action is a target once, after what came before it, and each period is
asked about before it is trained on."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr.batch import TARGETS_FROM
from gr.data.batches import Plan
from gr.data.dataset import SequenceDataset
from gr.data.loader import Direct
from gr.data.order import Order
from gr.data.periods import Chronological
from gr.data.requests import requests
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.models.tasks import NextItem
from gr.train import job
from gr.train.comparison import compare
from tests.end_to_end.tiny import assert_same_run

HOUR, START = 3600, 7200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SequenceDataset:
    """Every action has an item of its own, by which it is known; users 0 and 1 have none and one."""
    rng = np.random.default_rng(2)
    lengths = np.concatenate([[0, 1], rng.integers(1, 50, 58)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.concatenate([np.sort(rng.integers(0, 30 * HOUR, n)) for n in lengths])
    times = np.where((times >= 12 * HOUR) & (times < 15 * HOUR), 12 * HOUR - 1, times)  # nothing happens then
    items = np.arange(offsets[-1])
    writer = DatasetWriter(tmp_path_factory.mktemp("c") / "set", "t", block_rows=8)
    writer.add(Sequences.of(np.arange(60), offsets, item=items.astype(np.int32), time=times))
    return writer.finish(pa.table({"item_id": items, "count": np.ones_like(items)}))


def split(dataset, **keys) -> Chronological:
    return Chronological(Chronological.Config(**{"period": "1h", "start": START, **keys})).on(dataset)


def plan(dataset, max_length=5, window_blocks=3, tail="keep", **keys) -> Plan:
    order = Order(dataset.manifest.fingerprint, 3, dataset.users, 8, window_blocks)
    return Plan(split(dataset, **keys), order, 10, max_length, tail, frozenset({"item", "time"}))


def epoch(dataset, made, number, start=0, rank=0, ranks=1):
    return list(Direct(Direct.Config(), dataset, made, rank=rank, ranks=ranks).epoch(number, start))


@pytest.mark.parametrize("max_length, window_blocks", [(2, 3), (5, 1), (100, 20)])
def test_every_action_is_a_target_once_in_its_period_and_inputs_come_before(
    dataset, max_length, window_blocks
):
    made = plan(dataset, max_length, window_blocks)
    rows = dataset.read_rows(0, 60)
    times = rows.timestamps_A
    targets: Counter[int] = Counter()
    for number in range(made.epochs):
        batches = epoch(dataset, made, number)
        assert [b.index for b in batches] == list(range(made.in_epoch(number)))
        for batch in batches:
            share = batch.share
            supervised = NextItem(NextItem.Config()).supervise(share, 0)
            found = supervised.targets_S.tolist()
            targets.update(found)
            assert all(START + number * HOUR <= times[i] < START + (number + 1) * HOUR for i in found)
            inputs = supervised.tokens_T[supervised.queries_S].tolist()
            assert inputs == [i - 1 for i in found], "the input of a target is the user's action before it"
            assert share.columns["time"].max() < START + (number + 1) * HOUR
            assert max(share.lengths) <= max_length + 1
    expected = [i for i in rows.items_A.tolist() if rows.places_A[i] > 0 and times[i] >= START]
    assert targets == Counter(expected)


def test_periods_do_not_depend_on_ranks_or_restarts_and_an_empty_one_has_no_batch(dataset):
    made = plan(dataset)
    assert made.in_epoch(11) == 0 and epoch(dataset, made, 11) == []
    for number in (0, 7, made.epochs - 1):
        whole = epoch(dataset, made, number)
        for start in range(len(whole) + 1):
            again = epoch(dataset, made, number, start)
            assert [b.digest for b in again] == [b.digest for b in whole[start:]]
        shares = [epoch(dataset, made, number, rank=rank, ranks=3) for rank in range(3)]
        for k, batch in enumerate(whole):
            assert {s[k].digest for s in shares} == {batch.digest}
            assert (
                sum(s[k].samples == batch.samples and s[k].share.sequences for s in shares) == batch.samples
            )
            assert all((TARGETS_FROM in s[k].share.user_columns) for s in shares)


def test_what_is_asked_of_a_period_is_each_users_first_action_in_it(dataset):
    made = split(dataset)
    rows = dataset.read_rows(0, 60)
    for number in (0, 9, 25):
        bound = made.at(number)
        begin, end = bound.bounds()
        asked = list(requests(dataset, bound, "test", max_length=5, columns={"item", "time"}))
        found = [t for request in asked for t in request.targets_B.tolist()]
        inside = (rows.timestamps_A >= begin) & (rows.timestamps_A < end) & (rows.places_A > 0)
        first = {int(rows.owner_A[a]): a for a in np.flatnonzero(inside)[::-1].tolist()}
        assert sorted(found) == sorted(first.values())
        trained = [i for b in epoch(dataset, plan(dataset), number) for i in b.share.items_T.tolist()]
        assert set(found) <= set(trained), "and is trained on afterwards"
    assert list(requests(dataset, made.at(11), "test", max_length=5)) == []


def test_what_was_seen_before_a_period(dataset):
    made = split(dataset)
    rows = dataset.read_rows(0, 60)
    for number in (0, 5):
        before = rows.timestamps_A < START + number * HOUR
        assert (made.at(number).seen(dataset.catalogue) > 0).tolist() == before.tolist()


def test_the_last_period_may_wait(dataset):
    assert split(dataset, last="wait").epochs == (dataset.manifest.last_time - START) // HOUR
    assert split(dataset, last="wait").epochs == split(dataset).epochs - 1


# -- runs ------------------------------------------------------------------------------------------------------------

CHRONOLOGICAL = [
    "data.split={name: chronological, period: 7h, start: 1003000}",
    "eval.splits=[test]",
    "eval.baselines=[popularity]",
]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """One pass of the tiny data, its first file at step 7 kept."""
    from gr import config as configs
    from tests.end_to_end.tiny import CONFIG

    folder = tmp_path_factory.mktemp("run")
    file = folder / "tiny.yaml"
    file.write_text(CONFIG.format(run=folder / "run", data=data))
    return job.run(configs.load(file, [*CHRONOLOGICAL, "checkpoint.keep=1000", "train.global_batch=32"]))


def test_each_period_is_evaluated_before_it_is_trained_on(finished):
    rows = finished.metrics
    evaluations = [r for r in rows if r["kind"] == "eval"]
    assert len(evaluations) >= 4 and evaluations[0]["step"] == 0
    assert [r["epoch"] for r in evaluations] == sorted({r["epoch"] for r in rows if r["kind"] == "train"})
    for row in evaluations:
        trained = [r["step"] for r in rows if r["kind"] == "train" and r["epoch"] == row["epoch"]]
        before = [r["step"] for r in rows if r["kind"] == "train" and r["epoch"] < row["epoch"]]
        assert max(before, default=0) == row["step"] == trained[0] - 1
        assert np.datetime64(row["period"]) == np.datetime64(1003000 + row["epoch"] * 7 * 3600, "s")
    assert evaluations[0]["cold_targets"] > evaluations[-1]["cold_targets"]
    baselines = [r for r in rows if r["kind"] == "baseline"]
    assert [r["epoch"] for r in baselines] == [r["epoch"] for r in evaluations]
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3, "it learns on the way"


def test_killed_inside_a_period_and_between_two_it_goes_on_to_the_same_bits(finished, tmp_path):
    steps = sorted(int(p.name[5:]) for p in (finished.path / "checkpoints").iterdir())
    ends = [r["step"] for r in finished.metrics if r["kind"] == "eval"][2:]
    inside = next(s for s in steps if s not in ends and s > 6)
    between = next(s for s in steps if s in ends)
    for killed_at in (inside, between):
        run = tmp_path / f"killed-{killed_at}"
        shutil.copytree(finished.path, run)
        for path in (run / "checkpoints").iterdir():
            if int(path.name[5:]) > killed_at:
                shutil.rmtree(path)
        job.resume(run)
        assert_same_run(finished.path, run)


def test_a_finished_pass_has_nothing_left_to_be_asked(finished):
    with pytest.raises(UserError, match="append newer actions to it first"):
        compare(str(finished.path), "test")


@pytest.mark.parametrize(
    "keys, sentence",
    [
        (["data.split.start=99999999999"], "no action of .* is at or after data.split.start"),
        (["data.split.period=5x"], "data.split.period"),
        (["data.split.start=yesterday"], "data.split.start.*write a moment in UTC"),
        (["eval.splits=[valid]"], "split 'valid' is not held out"),
        (["data.transforms=[session_ends]"], "goes through the log once, and transform 'session_ends'"),
        (
            ["objective={name: in_batch}"],
            "would count items that are still to come: use objective.logq=false",
        ),
        (["model.task=cloze", "model.encoder={name: transformer}"], "model.task cloze has targets anywhere"),
        (["train.early_stopping={patience: 1}"], "early_stopping"),
        (["data.follow={every: 1}", "schedule.name=cosine"], "no last step"),
        (["data.split={name: leave_one_out}", "data.follow={every: 1}"], "use data.split=chronological"),
    ],
    ids=str,
)
def test_what_does_not_go_with_one_pass_is_one_sentence(config, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        job.run(config(*CHRONOLOGICAL, *keys))


def test_a_last_period_that_waits_is_said_where_nothing_else_is_there(config, capsys):
    run = job.run(
        config("data.split={name: chronological, period: 90d, start: 1000000, last: wait}", CHRONOLOGICAL[1])
    )
    assert run.finished and not [r for r in run.metrics if r["kind"] == "train"]
    assert (
        "nothing is left to train on yet: the last period waits for later actions" in capsys.readouterr().out
    )


def test_a_moment_may_be_a_day(dataset):
    assert Chronological.Config(start="1970-01-02", period="2d").start == 86400
    assert Chronological.Config(start="1970-01-01T01:30").start == 5400


def test_the_loss_is_of_the_periods_targets_alone(config):
    """A gradient that any other target would have moved is zero."""
    from gr.processes import Processes
    from gr.train.parts import build

    made = config(*CHRONOLOGICAL, "data.max_length=8")
    parts = build(made, Processes(torch.device("cpu")))
    batch = next(parts.batches.epoch(3))
    supervised = parts.model.supervise(batch.share, 1)
    from_B = batch.share.user_columns[TARGETS_FROM]
    assert supervised.count == (torch.tensor(batch.share.lengths) - from_B).sum()
    assert supervised.count < sum(batch.share.lengths) - batch.share.sequences
