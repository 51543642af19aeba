"""Whole tiny runs of pre-ranking models: trained, resumed to the bit, exported and evaluated as trained."""

from __future__ import annotations

import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr import config as configs
from gr.data.collate import collate
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.train import job
from gr.train.comparison import compare
from gr.train.exporting import export
from gr.train.rank import rank
from gr.train.runs import open_run

USERS, ITEMS = 40, 30
PRICES = np.linspace(0, 1, ITEMS, dtype=np.float32)
CONFIG = """
run: {{dir: {run}}}
data: {{path: {data}, max_length: 1, split: impressions, window_blocks: 2}}
model:
  name: two_tower
  dim: 8
  table_std: 0.1
  user: {{fields: {{user: {{column: user, rows: 40}}, group: {{column: group, rows: 3}}}}, numbers: [mean]}}
  item: {{fields: {{item: item, genres: {{catalogue: genres}}}}}}
  tasks: {{like: {{column: label, any_of: [1]}}}}
  network: {{name: inttower, tower: [16, 8], heads: 4, item_heads: 4, head_dim: 4, std: 0.1}}
optimizer: {{name: adamw, lr: 0.01}}
train: {{epochs: 2, global_batch: 64, threads: 1}}
eval: {{splits: [valid, test], exclude: none}}
checkpoint: {{every_steps: 4}}
log: {{every_steps: 1, tensorboard: false}}
"""


def make_dataset(path, rows=600, **extra):
    """Impressions of users who like even items or odd ones, with noise."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows).astype(np.int32)
    given = {
        "user": user,
        "group": user % 3,
        "label": ((user % 2 == item % 2) ^ (rng.random(rows) < 0.1)).astype(np.int64),
        "mean": rng.random(rows).astype(np.float32),
        "price": PRICES[item],
        **extra,
    }
    writer = DatasetWriter(path, "tiny", row_order="stream", block_rows=64)
    writer.add(Sequences.of(np.arange(rows), np.arange(rows + 1), item=item, **given))
    genres = pa.array([list(range(i % 4)) for i in range(ITEMS)], pa.list_(pa.int64()))
    counts = np.bincount(item, minlength=ITEMS)
    known = {"item_id": np.arange(ITEMS), "count": counts, "genres": genres, "price": PRICES}
    catalogue = pa.table(known)
    return writer.finish(catalogue, {"protocol": "tiny"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("impressions") / "data"
    make_dataset(path)
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    short = ["train.max_steps=1", "eval.splits=[]", "log.plots=false"]
    return open_run(job.run(load(tmp_path_factory.mktemp("trained"), data, *short)).path)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(job, "plot_run", lambda folder, shown: None)


def load(folder, data, *overrides):
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(run=folder / "run", data=data))
    return configs.load(file, overrides)


def test_it_learns_and_each_row_of_metrics_names_the_protocol(data, tmp_path):
    network = "model.network={name: deepfm, deep: [16, 8], std: 0.1}"
    result = job.run(
        load(tmp_path, data, network, "train.epochs=30", "optimizer.lr=0.03", "log.every_steps=50")
    )
    best = max(r["auc/like"] for r in result.metrics if r["kind"] == "eval" and r["split"] == "test")
    assert best > 0.75
    assert {r["protocol"] for r in result.metrics if r["kind"] == "eval"} == {"tiny"}


def test_a_stopped_run_goes_on_to_the_same_rows_and_its_export_scores_as_it_does(data, tmp_path):
    whole = job.run(load(tmp_path, data, f"run.dir={tmp_path}/whole"))
    steps = []

    def on_step(folder):
        steps.append(folder)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = job.run(load(tmp_path, data), on_step=on_step)
    assert not stopped.finished
    assert job.resume(stopped.path).metrics == whole.metrics, "running means and all"
    opened = open_run(str(whole.path))
    assert opened.model.network.towers["user"].norms[0].running_mean.any()
    export(str(whole.path), str(tmp_path / "export"))
    again = open_run(str(tmp_path / "export"))
    for (name, own), (_, other) in zip(
        opened.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert torch.equal(own, other), name
    last = whole.evaluation("test")
    for path in (whole.path, tmp_path / "export"):
        found = compare(str(path)).results["inttower"]
        assert found.row().items() <= last.items() | found.row().items()
        assert all(last[key] == value for key, value in found.metrics.items())


@pytest.mark.parametrize("table", ["mapped", "lazy"])
def test_other_tables_and_optimisers_of_rows_train(data, tmp_path, table):
    overrides = ["optimizer.name=lazy_adam"]
    if table == "mapped":
        sides = {"user": ("user", "group"), "item": ("item", "genres")}
        fields = [f"model.{side}.fields.{n}.table=mapped" for side, names in sides.items() for n in names]
        overrides = ["optimizer.name=adamw", *fields]
    result = job.run(load(tmp_path, data, "train.epochs=1", f"run.dir={tmp_path}/other", *overrides))
    losses = [r["loss"] for r in result.metrics if r["kind"] == "train"]
    assert result.finished and np.isfinite(losses).all()
    if table == "mapped":
        plain = job.run(load(tmp_path, data, "train.epochs=1"))
        same = [r["loss"] for r in plain.metrics if r["kind"] == "train"]
        np.testing.assert_allclose(losses, same, rtol=1e-4)


def test_a_label_that_is_neither_0_nor_1_stops_training_with_one_sentence(tmp_path):
    labels = np.zeros(600, np.int64)
    labels[::7] = 1
    labels[300] = 3
    make_dataset(tmp_path / "data", label=labels)
    with pytest.raises(UserError, match="column 'label' holds 3"):
        job.run(load(tmp_path, tmp_path / "data", "train.epochs=1"))


def test_rank_gives_what_the_evaluation_gives(data, tmp_path):
    network = "model.network={name: dat, tower: [16, 8], std: 0.1}"
    short = ["train.max_steps=3", "eval.splits=[test]", "model.item.numbers=[price]"]
    run = open_run(job.run(load(tmp_path, data, network, *short)).path)
    rows = run.data.dataset.read_block(0)
    asked = {name: rows.columns[name][:20] for name in ("user", "group", "mean")}
    items = [[int(item), 999, 4] for item in rows.items_A[:20]]
    items[3] = []
    pq.write_table(pa.table({**asked, "item_ids": pa.array(items, pa.list_(pa.int64()))}), tmp_path / "asked")
    with pytest.raises(UserError, match=r"19 candidates of .* are not in the catalogue .*first is 999"):
        rank(run, tmp_path / "asked", tmp_path / "out")
    done = rank(run, tmp_path / "asked", tmp_path / "out", unknown="null")
    assert (done.requests, done.candidates, done.unknown_items, done.unknown_users) == (20, 57, 19, 0)
    found = pq.read_table(tmp_path / "out")["like"].to_pylist()
    assert found[3] == [] and all(len(row) == 3 and row[1] is None for n, row in enumerate(found) if n != 3)
    wanted = run.model.logits(collate(rows, run.model.needs)).sigmoid()[:20, 0].tolist()
    for n, row in enumerate(found):
        assert not row or row[0] == pytest.approx(wanted[n], rel=1e-5)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"mean": None}, r"has no column 'mean' .*the run's model knows 'mean' of a user: add it"),
        ({"user": ["a"]}, "column 'user' of .* is of type string, and the dataset's holds int64"),
        ({"user": [40]}, r"column 'user' holds 40, and its table has rows for 0 to 39 .*unseen: own_row"),
        ({"group": pa.array([None], pa.int64())}, "a request without 'group': fill it in"),
        ({"mean": [float("nan")]}, "column 'mean' of .*asked' holds nan .*give a finite number"),
        # a float32 has no such number
        ({"mean": [1e300], "item_ids": [[]]}, "column 'mean' of .*asked' holds inf"),
        ({"user": [1.5]}, "column 'user' of .* is of type double .*1.5.* and the dataset's holds int64"),
        (
            {"user": pa.array([2**64 - 1], pa.uint64())},
            "column 'user' of .* is of type uint64 .*not in range",
        ),
    ],
)
def test_bad_requests_are_said_in_a_sentence(trained, tmp_path, columns, sentence):
    given = {"user": [1], "group": [1], "mean": [0.5], "item_ids": [[1]], **columns}
    pq.write_table(pa.table({n: c for n, c in given.items() if c is not None}), tmp_path / "asked")
    with pytest.raises(UserError, match=sentence):
        rank(trained, tmp_path / "asked", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_with_the_name_of_a_column_of_requests_cannot_be_ranked(data, tmp_path):
    file = tmp_path / "named.yaml"
    text = CONFIG.format(run=tmp_path / "run", data=data)
    file.write_text(text.replace("tasks: {like:", "tasks: {group:"))
    path = job.run(configs.load(file, ["train.max_steps=1", "eval.splits=[]"])).path
    given = {"user": [1], "group": [1], "mean": [0.5], "item_ids": [[1]]}
    pq.write_table(pa.table(given), tmp_path / "asked")
    with pytest.raises(UserError, match="task 'group' has the name of a column of requests"):
        rank(open_run(path), tmp_path / "asked", tmp_path / "out")


def test_categories_without_a_row_may_share_one_and_are_counted(data, tmp_path):
    few = ["model.user.fields.user.rows=30", "model.user.fields.user.unseen=own_row", "train.max_steps=2"]
    result = job.run(load(tmp_path, data, *few))
    shares = [r["unseen/user"] for r in result.metrics if r["kind"] == "train"]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
    assert open_run(result.path).model.tables["user"].weight.shape[0] == 31


def test_what_reads_sequences_alone_is_refused(data, tmp_path):
    for override in ("train.activation_checkpointing=true", "objective=full_softmax"):
        with pytest.raises(UserError, match="two_tower"):
            job.run(load(tmp_path, data, override))
