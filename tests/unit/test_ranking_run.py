"""Whole tiny runs of a ranking model: it trains, is judged, chosen, resumed, compared and refused as it should be."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pyarrow as pa
import pytest

from gr import config as configs
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.train import job
from gr.train.comparison import compare, to_json
from gr.train.folder import RunFolder
from gr.train.recommend import recommend
from gr.train.report import final_rows, print_result
from gr.train.runs import open_run
from gr.train.selection import metric_names, selection_metric
from tests.precision import after_steps

CONFIG = """
run: {{dir: {run}}}
data: {{path: {data}, max_length: 20, window_blocks: 2, split: {{name: leave_one_out, holdout: 2}}}}
model:
  name: ranking
  dim: 16
  encoder: {{name: hstu, layers: 1, heads: 2, qk_dim: 8, v_dim: 8, dropout: 0.2}}
  tasks: {{like: {{column: value, at_least: 4}}, bought: {{column: type, any_of: [buy]}}}}
optimizer: {{name: adamw, lr: 0.01}}
train: {{epochs: 4, global_batch: 16, clip_norm: 1.0, threads: 1}}
eval: {{splits: [valid, test], baselines: [prior]}}
checkpoint: {{every_steps: 4}}
log: {{every_steps: 1, tensorboard: false, plots: false}}
"""


def make_dataset(path, users=200, items=30, **columns):
    """Users who like even items or odd ones, and say so with noise; what is bought is even."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, users)
    actions = lengths.sum()
    items_A = rng.integers(0, items, actions).astype(np.int32)
    taste_A = np.repeat(rng.integers(0, 2, users), lengths)
    liked_A = (items_A % 2 == taste_A) ^ (rng.random(actions) < 0.1)
    values = np.where(liked_A, 5, 2).astype(np.float32)
    values[rng.random(actions) < 0.1] = np.nan
    types = (items_A % 2 ^ (rng.random(actions) < 0.2)).astype(np.int32)
    times = np.arange(actions, dtype=np.int64) // 2 * 60
    writer = DatasetWriter(path, "tiny", block_rows=32, action_type_names=["buy", "view"])
    given = {"value": values, "type": types, "time": times, **columns}
    writer.add(
        Sequences.of(np.arange(users), np.concatenate([[0], np.cumsum(lengths)]), item=items_A, **given)
    )
    counts = np.bincount(items_A, minlength=items)
    return writer.finish(pa.table({"item_id": np.arange(items), "count": counts}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranking") / "data"
    make_dataset(path)
    return path


@pytest.fixture
def config(data, tmp_path):
    def made(*overrides, path=data):
        file = tmp_path / "ranking.yaml"
        file.write_text(CONFIG.format(run=tmp_path / "run", data=path))
        return configs.load(file, overrides)

    return made


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "ranking.yaml").write_text(CONFIG.format(run=folder / "run", data=data))
    return job.run(configs.load(folder / "ranking.yaml", ["train.epochs=10", "log.plots=true"]))


def rows_of(result, kind, split="test"):
    return [r for r in result.metrics if r["kind"] == kind and r["split"] == split]


def test_it_learns_what_the_prior_does_not_know(trained):
    (prior,), last = rows_of(trained, "baseline"), rows_of(trained, "eval")[-1]
    assert prior["auc/like"] == prior["auc/bought"] == 0.5
    # a target without bias would give 1 to the last digit; the prior knows the training actions' base rate alone
    assert 1 <= prior["ne/like"] < 1.02 and 1 <= prior["ne/bought"] < 1.02
    assert last["auc/like"] > 0.75 and last["auc/bought"] > 0.75 and last["ne/like"] < 0.9
    assert last["labels/bought"] == last["users"] > last["labels/like"]
    assert "exclude" not in last, "nothing is ranked, so nothing is left out"


def test_an_epoch_is_chosen_by_auc_of_the_first_task_unless_told_otherwise(trained, config):
    assert metric_names(config()) == [
        f"{kind}/{task}"
        for task in ("like", "bought")
        for kind in ("auc", "ne", "log_loss", "gauc", "gauc_mean")
    ]
    assert selection_metric(config()) == trained.selection == "auc/like"
    assert selection_metric(config("train.early_stopping={patience: 2}")) == "auc/like"
    assert selection_metric(config("train.early_stopping.metric=ne/bought")) == "ne/bought"
    best = max(rows_of(trained, "eval", "valid"), key=lambda r: r["auc/like"])
    assert final_rows(trained)["test, best on valid"]["step"] == best["step"]


def test_early_stopping_knows_that_a_lower_ne_is_better(config):
    early = "train.early_stopping={metric: ne/bought, patience: 2}"
    result = job.run(config(early, "train.epochs=60", "optimizer.lr=0.05"))
    values = [r["ne/bought"] for r in rows_of(result, "eval", "valid")]
    assert result.finished and len(values) < 60
    assert min(values) == values[-3] and min(values[:-3], default=9) > values[-3]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.actions=interleaved"],
        ["model.actions=together"],
        [
            "model={name: din, dim: 8, tasks: {like: {column: value, at_least: 4}}, attention: [4], hidden: [4]}"
        ],
    ],
    ids=["interleaved", "together", "din"],
)
def test_models_over_sequences_go_on_to_the_same_rows(config, tmp_path, overrides):
    short = [
        *overrides,
        "train.epochs=1",
        "train.global_batch=64",
        "checkpoint.every_steps=1",
        "eval.baselines=[]",
    ]
    whole = job.run(config(f"run.dir={tmp_path}/whole", *short))

    def on_step(folder):
        os.kill(os.getpid(), signal.SIGTERM)

    stopped = job.run(config(*short), on_step=on_step)
    assert not stopped.finished
    assert job.resume(stopped.path).metrics == whole.metrics


def test_a_stopped_run_goes_on_to_the_same_rows_and_a_mapped_table_to_the_same_losses(config, tmp_path):
    whole = job.run(config(f"run.dir={tmp_path}/whole", "train.epochs=2"))
    steps = []

    def on_step(folder):
        steps.append(folder)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = job.run(config("train.epochs=2"), on_step=on_step)
    assert not stopped.finished and stopped.metrics[-1]["step"] == 8
    assert job.resume(stopped.path).metrics == whole.metrics
    mapped = job.run(config(f"run.dir={tmp_path}/mapped", "model.table=mapped", "train.epochs=2"))
    losses = [[r["loss"] for r in result.metrics if r["kind"] == "train"] for result in (whole, mapped)]
    # its gradients are added up row by row: sums over the labels of 16 users of up to 20 actions in another order, of
    # which both runs round; of a relative change of the parameters a loss has twice as much at most
    off = 2 * after_steps(len(losses[0]), terms=2 * 16 * 20, condition=2.0)
    np.testing.assert_allclose(losses[0], losses[1], rtol=off)


def test_the_final_table_the_picture_and_what_is_next_speak_of_this_model(trained, capsys):
    print_result(trained)
    text = capsys.readouterr().out
    assert "auc/like" in text and "ne/bought" in text and "hr@10" not in text and "test, prior" in text
    assert "python -m gr evaluate" in text and "python -m gr recommend" not in text
    picture = (RunFolder(trained.path).plots / "training.svg").read_text()
    assert picture.count("<!-- AUC/LIKE") == 1 and picture.count("<!-- NE/LIKE") == 1 and "prior" in picture


def test_comparison_has_the_rows_of_training_and_more(trained, tmp_path):
    done = compare(str(trained.path), "test", ["prior"], ["eval.buckets=true"])
    last, (prior,) = rows_of(trained, "eval")[-1], rows_of(trained, "baseline")
    content = json.loads(to_json(done))["results"]
    for name, row in (("hstu", last), ("prior", prior)):
        assert {k: row[k] for k in content[name] if k in row} == {
            k: v for k, v in content[name].items() if k in row
        }
        assert {"auc/like", "cold_targets", "repeated_targets", "tied_targets", "labels/like"} <= row.keys()
    assert sum(b["users"] for b in content["hstu"]["buckets"]["history"]) == last["users"]


def test_recommendation_and_baselines_that_rank_are_refused(trained, config, tmp_path):
    with pytest.raises(UserError, match="scores given items and can't search the catalogue"):
        recommend(open_run(trained.path), tmp_path / "out.parquet")
    sentence = r"'popularity' ranks the catalogue, and this model gives probabilities of labels: known: prior"
    with pytest.raises(UserError, match=sentence):
        job.run(config("eval.baselines=[popularity]"))
    with pytest.raises(UserError, match=sentence):
        compare(str(trained.path), "test", ["popularity"])
    with pytest.raises(
        UserError, match=r"'eval.exclude' has no effect on run .* \(the metrics of model ranking"
    ):
        compare(str(trained.path), "test", overrides=["eval.exclude=all"])
    model = "model={name: retrieval, encoder: hstu}"
    with pytest.raises(
        UserError, match=r"'prior' gives probabilities of labels, and this model ranks.*item_knn"
    ):
        job.run(config(model, "objective=bpr"))
    with pytest.raises(UserError, match=r"'objective' is missing"):
        job.run(config(model, "eval.baselines=[]"))
    with pytest.raises(UserError, match=r"'hr@10' is not evaluated .*: change it$"):
        job.run(config("train.early_stopping.metric=hr@10"))
    assert not (tmp_path / "run").exists()


def test_labels_that_are_all_the_same_are_said_and_only_early_stopping_minds(tmp_path, config, capsys):
    make_dataset(tmp_path / "same", value=np.full(_actions(tmp_path), 5, np.float32))
    short = ["train.epochs=1", "eval.splits=[valid]"]
    result = job.run(config(*short, path=tmp_path / "same"))
    (row,) = rows_of(result, "eval", "valid")
    assert "auc/like" not in row and row["log_loss/like"] < 0.7 and row["base_rate/like"] == 1
    said = capsys.readouterr().out
    assert said.count("valid: no auc/like and no ne/like: all") == 1, "once, though the prior is judged too"
    job.resume(result.path, ["train.epochs=2"])
    early = [*short, "train.early_stopping={}", f"run.dir={tmp_path}/early"]
    with pytest.raises(
        UserError, match="early_stopping looks at auc/like, and the labels of split 'valid' have none"
    ):
        job.run(config(*early, path=tmp_path / "same"))


def _actions(folder):
    return make_dataset(folder / "count").manifest.actions


def test_a_label_that_is_neither_0_nor_1_stops_training_with_one_sentence(config):
    task = ["model.tasks.like.at_least=null", "model.tasks.like.any_of=[1]"]  # where values are 2 and 5
    with pytest.raises(UserError, match=r"column 'value' holds [25], and a label that is 1 or isn't"):
        job.run(config(*task, "eval.splits=[]", "eval.baselines=[]"))


def test_a_dataset_without_a_tasks_column_is_refused_before_training(tmp_path, config):
    make_dataset(tmp_path / "bare", value=None)
    with pytest.raises(
        UserError, match=r"'model.tasks.like.column' is 'value', which is no column.*known: item, time"
    ):
        job.run(config(path=tmp_path / "bare"))
    assert not (tmp_path / "run").exists()
