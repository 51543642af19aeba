"""Scores of given candidates: those of the evaluation, whatever is asked together, and what is said of bad requests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.train import job, rank as library
from gr.train.rank import rank
from gr.train.runs import open_run
from tests.precision import tolerance
from tests.unit.test_ranking_run import CONFIG, make_dataset

INTERLEAVED = ["model.actions=interleaved", "model.interaction=product"]
PAST = "{name: %s, dim: 16, tasks: {like: {column: value, at_least: 4}}%s}"
MODELS = {
    "interleaved": INTERLEAVED,
    "together": ["model.actions=together", "model.interaction=product"],
    "summed": [],
    "din": ["model=" + PAST % ("din", ", attention: [8], hidden: [8]")],
    "dlrm": ["model=" + PAST % ("dlrm", ", hidden: [8]")],
}
# probabilities: a slope of 1/4 at most, of logits that are sums of up to 50 terms in some layers
OFF = tolerance(50, stages=20, size=10.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    times = np.arange(10**5, dtype=np.int64) * 3600  # no two actions at once
    actions = make_dataset(folder / "count").manifest.actions
    make_dataset(folder / "data", time=times[:actions])
    found = {}
    for name, overrides in MODELS.items():
        file = folder / f"{name}.yaml"
        file.write_text(CONFIG.format(run=folder / name, data=folder / "data"))
        short = ["train.max_steps=2", "eval.splits=[test]", "eval.baselines=[]"]
        job.run(configs.load(file, [*short, *overrides]))
        found[name] = open_run(folder / name)
    return found


def write(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def held_out(run):
    """(users, items, times, probabilities) of the test split as the evaluation asks."""
    from gr.train.evaluation import Evaluation

    evaluation = Evaluation(
        run.data.dataset,
        run.data.split,
        run.config,
        run.data.catalogue,
        judged_by="pointwise",
        columns=run.model.needs | {"time"},
    )
    parts = []
    for request in evaluation.requests("test"):
        last = request.batch.offsets_B1[1:] - 1
        times = request.batch.timestamps_T[last]
        parts.append(
            (
                request.users,
                request.targets_B.numpy(),
                times.numpy(),
                run.model.logits(request.batch).sigmoid(),
            )
        )
    return [np.concatenate(column) for column in zip(*parts)]


def scores(file, names):
    table = pq.read_table(file)
    return [[np.array(row) for row in table[name].to_pylist()] for name in names]


@pytest.mark.parametrize("name", MODELS)
def test_rank_gives_what_the_evaluation_gives_and_the_order_of_requests_is_theirs(runs, tmp_path, name):
    run = runs[name]
    users, items, times, wanted = held_out(run)
    mixed = np.random.default_rng(0).permutation(len(users))
    others = [[int(item), (int(item) + 1) % 30, 3] for item in items[mixed]]
    asked = write(tmp_path / "asked.parquet", user_id=users[mixed], item_ids=others, time=times[mixed])
    done = rank(run, asked, tmp_path / "out.parquet", at_once=2)
    assert (done.requests, done.candidates, done.without_history) == (len(users), 3 * len(users), 0)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["user_id"].to_pylist() == users[mixed].tolist() and table["item_ids"].to_pylist() == others
    for task, found in enumerate(scores(tmp_path / "out.parquet", run.model.labels.names)):
        first = torch.tensor([row[0] for row in found])
        torch.testing.assert_close(first, torch.tensor(wanted[mixed, task]), **OFF, check_dtype=False)


@pytest.mark.parametrize("name", ["interleaved", "din"])
def test_how_much_is_computed_at_a_time_changes_nothing_but_rounding(runs, tmp_path, monkeypatch, name):
    run = runs[name]
    users = run.data.dataset.read_user_ids(0)[:6].tolist()
    lists = [[i % 30 for i in range(n)] for n in (40, 0, 3, 9, 1, 5)]
    asked = write(tmp_path / "asked.parquet", user_id=users, item_ids=pa.array(lists, pa.list_(pa.int64())))
    rank(run, asked, tmp_path / "whole.parquet")
    monkeypatch.setattr(library, "CANDIDATES", 7)
    monkeypatch.setattr(library, "ACTIONS", 40)
    monkeypatch.setattr(library, "REQUESTS", 4)
    done = rank(run, asked, tmp_path / "cut.parquet", at_once=3)
    assert done.candidates == 58
    for whole, cut in zip(*(scores(tmp_path / f"{n}.parquet", ["like"])[0] for n in ("whole", "cut"))):
        assert len(whole) == len(cut)
        np.testing.assert_allclose(cut, whole, **OFF)


def test_what_the_dataset_does_not_have_is_refused_or_null_and_counted(runs, tmp_path):
    run = runs["interleaved"]
    user = run.data.dataset.read_user_ids(0)[0]
    asked = write(tmp_path / "asked.parquet", user_id=[user, 10**6], item_ids=[[3, 999], [4]])
    with pytest.raises(UserError, match=r"1 of 2 users are not in the dataset.*the first is 1000000"):
        rank(run, asked, tmp_path / "out.parquet")
    done = rank(run, asked, tmp_path / "out.parquet", unknown="null")
    assert (done.unknown_users, done.unknown_items) == (1, 1)
    ((first, second), (third,)) = pq.read_table(tmp_path / "out.parquet")["like"].to_pylist()
    assert 0 < first < 1 and second is None and third is None
    write(asked, user_id=[user], item_ids=[[3, 999]])
    with pytest.raises(
        UserError, match=r"1 candidates of .* are not in the catalogue of .*first is 999.*--unknown null"
    ):
        rank(run, asked, tmp_path / "no.parquet")
    assert not (tmp_path / "no.parquet").exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_request_before_all_that_its_user_did_is_answered_and_counted(runs, tmp_path, name):
    run = runs[name]
    user = run.data.dataset.read_user_ids(0)[0]
    asked = write(tmp_path / "asked.parquet", user_id=[user], item_ids=[[1, 2]], time=[-1])
    assert rank(run, asked, tmp_path / "out.parquet").without_history == 1
    (found,) = pq.read_table(tmp_path / "out.parquet")["like"].to_pylist()
    assert all(0 < p < 1 for p in found)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"item_ids": [[1]]}, r"has no column 'user_id' \(it has item_ids\), and a request needs it"),
        ({"user_id": [1], "item_ids": [1]}, "column item_ids of .* is of type int64: give a list"),
        (
            {"user_id": [1], "item_ids": [["x"]]},
            "item_ids of .* are of type string, and the dataset's items are int64",
        ),
        ({"user_id": [1], "item_ids": [[1]], "time": ["now"]}, "column time of .* holds no integers"),
        ({"user_id": [1], "item_ids": [[1]], "time": pa.array([None], pa.int64())}, "a request without time"),
        ({"user_id": pa.array([None], pa.int64()), "item_ids": [[1]]}, "a request without user_id"),
        (
            {"user_id": pa.array([], pa.int64()), "item_ids": pa.array([], pa.list_(pa.int64()))},
            "has no request",
        ),
    ],
)
def test_bad_requests_are_said_in_a_sentence(runs, tmp_path, columns, sentence):
    asked = write(tmp_path / "asked.parquet", **columns)
    with pytest.raises(UserError, match=sentence):
        rank(runs["summed"], asked, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
