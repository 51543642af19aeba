"""Whole tiny runs in this process: when it evaluates, saves, stops, and what it goes on with."""

import itertools
import json
import os
import signal

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr import config as configs
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.models.retrieval import Retrieval
from gr.processes import Axis, Processes
from gr.train import checkpoint, job, trainer as trainer_module
from gr.train.cursor import Cursor
from gr.train.folder import RunFolder
from gr.train.parts import build
from gr.train.report import final_rows
from gr.train.reproduction import reproduce as reproduction
from gr.train.runs import find_checkpoint, open_run
from gr.train.trainer import Trainer
from tests.end_to_end.tiny import CONFIG, weights


def evaluated(result, split="test"):
    return [r["step"] for r in result.metrics if r["kind"] == "eval" and r["split"] == split]


def saved_steps(result):
    return [step for step, _ in checkpoint.listed(RunFolder(result.path).checkpoints)]


def test_steps_and_epochs_say_when_to_evaluate_and_each_moment_counts_once(config):
    result = job.run(config("eval.every_steps=5", "eval.every_epochs=2", "checkpoint.keep=99"))
    assert evaluated(result) == [5, 10, 15, 20, 25, 30]
    assert {4, 8, 12, 16, 20, 24, 28, 10, 30} <= set(saved_steps(result))


@pytest.mark.parametrize(("most", "expected"), [(99, [20, 30]), (13, [13])], ids=["epochs end it", "cut"])
def test_it_evaluates_at_the_end_wherever_that_is(config, most, expected):
    result = job.run(config("eval.every_epochs=2", "eval.splits=[test]", f"train.max_steps={most}"))
    assert evaluated(result) == expected and result.metrics[-2]["step"] == expected[-1]


def test_a_step_is_saved_once(config, monkeypatch):
    saved = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: saved.append(given[2].step) or real(*given))
    job.run(config("checkpoint.every_steps=5"))
    assert saved == sorted(set(saved)) and {5, 10, 15, 20, 25, 30} <= set(saved)


def test_every_micro_batch_drops_differently(config, monkeypatch):
    """Though the batches' lengths may be the same."""
    keys, real = [], Retrieval.supervise
    monkeypatch.setattr(
        Retrieval, "supervise", lambda model, *given: keys.append(given[-1]) or real(model, *given)
    )
    job.run(config("train.max_steps=4", "train.micro_batch_actions=30"))
    assert len(keys) > 4 and len(set(keys)) == len(keys)


def test_every_rank_and_step_drops_by_seeds_of_its_own(config, monkeypatch, tmp_path):
    """Those of torch's generator, and keys."""
    device, seeds, keys = torch.device("cpu"), [], []
    parts = build(config(), Processes(device))
    supervise = parts.model.supervise
    monkeypatch.setattr(parts.model, "supervise", lambda *given: keys.append(given[-1]) or supervise(*given))
    monkeypatch.setattr(trainer_module, "seed_generators", lambda device, seed: seeds.append(seed))
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        processes = Processes(device, data=Axis(rank, 2))
        trainer = Trainer(config(), parts, processes, RunFolder(tmp_path / str(rank)), Cursor("g"))
        for batch in itertools.islice(parts.batches.epoch(0), 2):
            trainer.step(batch)
        trainer.metrics.close()
        trainer.progress.close()
    for drawn in (seeds, keys):
        assert len(drawn) == len(set(drawn)) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("encoder", ["hstu", "sasrec", "transformer"])
def test_a_step_does_not_wait_for_the_gpu(config, encoder):
    """From the third step on, when kernels are compiled and caches filled, any waiting operation is an error."""
    steps = 0

    def after_step(folder):
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error" if 2 <= steps < 8 else "default")

    rare = ["log.every_steps=99", "eval.every_epochs=99", "checkpoint={every_epochs: 99, every_steps: null}"]
    short = ["train.max_steps=8", "train.device=cuda", f"model.encoder={{name: {encoder}}}"]
    try:
        job.run(config(*rare, *short), on_step=after_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == 8


def test_the_best_checkpoint_is_there_wherever_it_was_found(config):
    rare = ["checkpoint.every_steps=null", "checkpoint.every_epochs=99", "eval.every_steps=3"]
    result = job.run(config(*rare, "checkpoint.keep=1", "optimizer.lr=0.1"))
    valid = [r for r in result.metrics if r["kind"] == "eval" and r["split"] == "valid"]
    best = max(valid, key=lambda r: r["ndcg@10"])["step"]
    assert find_checkpoint(RunFolder(result.path), "best").name == f"step-{best:08d}"
    # an epoch has several evaluations here: the one that was chosen is reported, not the last of its epoch
    rows = final_rows(result)
    assert rows["test, best on valid"]["step"] == best
    assert saved_steps(result) == sorted({best, 30})


def test_early_stopping_stops_saves_and_stays_stopped(config):
    early = ["train.epochs=30", "optimizer.lr=0.5", "train.early_stopping={metric: hr@10, patience: 2}"]
    result = job.run(config(*early))
    values = [r["hr@10"] for r in result.metrics if r["kind"] == "eval" and r["split"] == "valid"]
    assert result.finished and len(values) < 30
    assert max(values) == values[-3] and max(values[:-3], default=0) < values[-3]
    before = RunFolder(result.path).metrics.read_text()
    again = job.resume(result.path)
    assert again.finished and RunFolder(result.path).metrics.read_text() == before


@pytest.mark.parametrize(
    "overrides,sentence",
    [
        (["eval.splits=[test]", "train.early_stopping={}"], "looks at split 'valid'"),
        (["objective=full_softmax", "model.table=mapped"], "full_softmax needs the gradient of every row"),
        (["train.early_stopping={metric: ndcg@5}"], "'ndcg@5' is not evaluated .did you mean 'ndcg@10'"),
        (["data.split={name: records, train: 0.0, valid: 0.5}"], "leaves no training sequence"),
        (
            ["train.global_batch=500", "data.tail=drop"],
            "150 training sequences, fewer than train.global_batch 500",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_made(config, overrides, sentence):
    wanted = config("eval.splits=[valid, test]", *overrides)
    with pytest.raises(UserError, match=sentence):
        job.run(wanted)
    assert not os.path.exists(wanted.run.dir)


def test_a_batch_larger_than_the_dataset_trains(config):
    result = job.run(config("train.global_batch=500", "train.epochs=2"))
    assert [r["samples"] for r in result.metrics if r["kind"] == "train"] == [150, 150]


def test_a_signal_while_evaluating_saves_after_the_next_step(config):
    steps = []

    def on_step(folder):
        steps.append(folder)
        if len(steps) == 10:  # the evaluation at the end of the first epoch comes next
            os.kill(os.getpid(), signal.SIGTERM)

    wanted = config()
    stopped = job.run(wanted, on_step=on_step)
    assert not stopped.finished
    assert saved_steps(stopped)[-1] == 11
    whole = job.run(configs.override(wanted, [f"run.dir={wanted.run.dir}-whole"]))
    assert job.resume(stopped.path).metrics == whole.metrics
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_may_change_on_resume(config):
    result = job.run(config("train.max_steps=5"))
    with pytest.raises(UserError, match=r"'run.dir' cannot change on resume"):
        job.resume(result.path, ["run.dir=elsewhere"])
    assert job.resume(result.path, ["train.max_steps=7"]).metrics[-1]["step"] == 7


def test_a_falling_rate_holds_the_number_of_steps_fixed(config):
    result = job.run(config("train.max_steps=5", "schedule.name=cosine"))
    for change in ("train.max_steps=7", "train.epochs=9"):
        with pytest.raises(UserError, match=r"where schedule\.name is cosine"):
            job.resume(result.path, [change])


def test_lost_rows_are_said_and_training_goes_on(config, caplog):
    result = job.run(config("train.max_steps=8"))
    metrics = RunFolder(result.path).metrics
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]) + '{"kind": "tr')
    again = job.resume(result.path, ["train.max_steps=9"])
    assert "has lost rows: 3 of the 10" in caplog.text
    assert [r["step"] for r in again.metrics if r["kind"] == "train"] == [1, 2, 3, 9]
    state = checkpoint.read_state(checkpoint.newest(RunFolder(result.path).checkpoints))
    assert state["cursor"]["metrics_rows"] == len(again.metrics)


def test_weights_without_moments_do_not_go_on(config):
    """They are enough to evaluate, and for an optimiser that keeps no moments."""
    result = job.run(config("train.max_steps=5"))
    folder = RunFolder(result.path)
    newest = checkpoint.newest(folder.checkpoints)
    cursor = Cursor(**checkpoint.read_state(newest)["cursor"])
    parameters = {name: v for name, v in weights(result.path).items() if name.startswith("model/")}
    checkpoint.save(folder.checkpoints, parameters, cursor, {}, Processes(torch.device("cpu")))
    before = {file: file.read_bytes() for file in (folder.metrics, folder.config)}
    with pytest.raises(UserError) as refusal:
        job.resume(result.path, ["train.max_steps=7"])
    assert str(refusal.value) == (
        f"checkpoint '{newest}' has the weights but no exp_avg of 'encoder.layers.0.output.bias', without which "
        "training can't go on: choose an older checkpoint, or start a new run"
    )
    assert all(file.read_bytes() == content for file, content in before.items())
    assert open_run(result.path).step == 5

    plain = ["optimizer={name: sgd, lr: 0.05}", f"run.dir={result.path}-sgd"]
    result = job.run(config("train.max_steps=5", *plain))
    assert all(name.startswith("model/") for name in weights(result.path))
    assert job.resume(result.path, ["train.max_steps=7"]).metrics[-1]["step"] == 7


def test_a_checkpoint_of_another_format_is_refused(config):
    result = job.run(config("train.max_steps=5"))
    folder = RunFolder(result.path)
    newest = checkpoint.newest(folder.checkpoints)
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"format_version": 1}))
    files = json.loads((newest / "complete.json").read_text())
    files["state.json"] = checkpoint._fingerprint(newest / "state.json")
    (newest / "complete.json").write_text(json.dumps(files))
    before = {file: file.read_bytes() for file in (folder.metrics, folder.config)}
    for attempt in (lambda: job.resume(result.path, ["train.max_steps=7"]), lambda: open_run(result.path)):
        with pytest.raises(UserError) as refusal:
            attempt()
        assert str(refusal.value) == (
            f"checkpoint '{newest}' has format version 1, this gr reads {checkpoint.FORMAT_VERSION}: continue it with "
            "the gr that wrote it"
        )
    assert all(file.read_bytes() == content for file, content in before.items())


def test_parameters_that_are_not_finite_are_never_saved(config, monkeypatch):
    """A finite loss whose gradients are not: the step is refused before its checkpoint."""
    real = torch.nn.utils.get_total_norm

    def overflow(gradients):
        gradients[0].fill_(float("inf"))
        return real(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", overflow)
    wanted = config("checkpoint.every_steps=1")
    with pytest.raises(UserError, match=r"the update of step 1 is not finite.*last good checkpoint is none"):
        job.run(wanted)
    folder = RunFolder(wanted.run.dir)
    assert not folder.checkpoints.exists()
    (file,) = folder.path.glob("nonfinite-*")
    assert len(json.loads(file.read_text())["ordinals"]) == 16


def test_a_micro_batch_of_shared_sequences_has_the_actions_of_all_who_share_them(config, tmp_path):
    device, most = torch.device("cpu"), 60
    parts = build(config(), Processes(device))
    share = next(parts.batches.epoch(0)).share
    for ranks in (1, 2):
        processes, few = (
            Processes(device, context=Axis(0, ranks)),
            f"train.micro_batch_actions={most // ranks}",
        )
        (tmp_path / str(ranks)).mkdir()
        trainer = Trainer(config(few), parts, processes, RunFolder(tmp_path / str(ranks)), Cursor("g"))
        found = [part.ordinals_B.tolist() for part in trainer._micro_batches(share)]
        assert found == [part.ordinals_B.tolist() for part in share.split(most)] and len(found) > 2
        trainer.metrics.close()
        trainer.progress.close()


@pytest.mark.parametrize(
    ("what", "flag", "then"), [("loss", -2, "step"), ("loss", -2, "save"), ("update", -1, "save")]
)
def test_what_another_process_finds_broken_stops_this_one(config, monkeypatch, tmp_path, what, flag, then):
    """Here everything is a number: if one stopped alone, the others would wait for it."""
    parts = build(config(), Processes(torch.device("cpu")))
    trainer = Trainer(config(), parts, Processes(torch.device("cpu")), RunFolder(tmp_path), Cursor("g"))
    batches = parts.batches.epoch(0)

    def with_anothers(self, counts):
        counts[flag] += 1
        return counts

    try:
        trainer.step(next(batches))
        monkeypatch.setattr(Trainer, "_sum", with_anothers)
        with pytest.raises(UserError, match=f"the {what} of step 1 is not finite"):
            trainer.step(next(batches)) if then == "step" else trainer.save()
    finally:
        trainer.metrics.close()
        trainer.progress.close()
    assert trainer.cursor.step == 1 and not (tmp_path / "checkpoints").exists()


def test_bf16_and_sgd_train(config):
    result = job.run(config("train.precision=bf16", "train.epochs=1", "optimizer={name: sgd, lr: 0.05}"))
    losses = [r["loss"] for r in result.metrics if r["kind"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.ks=[10]", r"the table of 'ml-1m' shows hr@50: add its k to eval\.ks=\[10\]"),
        ("eval.splits=[]", r"'SASRec' needs split 'test': add it to eval\.splits=\[\]"),
    ],
)
def test_a_table_that_could_not_be_printed_is_refused_before_training(override, message):
    with pytest.raises(UserError, match=message):
        reproduction.reproduce("ml-1m", None, rows=["sasrec"], overrides=[override])


def test_a_dataset_without_a_training_target_is_refused(tmp_path):
    writer = DatasetWriter(tmp_path / "data", "short", block_rows=2)
    users, offsets = np.arange(5), np.arange(0, 18, 3)
    writer.add(Sequences.of(users, offsets, item=np.zeros(15, np.int32), time=np.arange(15)))
    writer.finish(pa.table({"item_id": [7], "count": [15]}))
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", data=tmp_path / "data"))
    with pytest.raises(UserError, match=r"no user of dataset .* two actions to train on"):
        job.run(configs.load(file))
    assert not (tmp_path / "run").exists()
