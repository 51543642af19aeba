"""A ranking model over processes: the same losses, weights and metrics but for rounding, the same order of scores."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import of_losses, of_weights, sgd
from tests.end_to_end.tiny import ROOT, weights
from tests.precision import tolerance
from tests.programs import run_python, torchrun
from tests.unit.test_ranking_run import CONFIG, make_dataset

RATE, TERMS = 0.5, 2 * 16 * 20  # labels of two tasks, of the actions of 16 users
NO_DROPOUT = ["model.input.dropout=0", "model.encoder.dropout=0"]
# Log-odds of unit size, by a head's and an encoder's sums of up to 32 terms: a batch of another number of rows may be
# multiplied in another order.  A log loss moves by as much at most, and the entropy and the share of labels that it
# and a sum of probabilities are divided by are 1/8 at least.
ODDS = 8 * tolerance(32, stages=10, size=3.0)["atol"]
ROUNDED = ("ne/", "log_loss/", "calibration/")
PLAIN = [
    *("train.epochs=1", "eval.splits=[test]"),
    f"optimizer={{name: sgd, lr: {RATE}}}",  # its steps are as large as the gradients: a wrong scale would show
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranking")
    make_dataset(path / "data")
    return path


def run(folder, processes, **jobs):
    """Run each of ``jobs`` (overrides by name) on so many processes."""
    asked = []
    for name, overrides in jobs.items():
        file = folder / f"{name}.yaml"
        file.write_text(CONFIG.format(run=folder / name, data=folder / "data"))
        another = any(one.startswith("model={") for one in overrides)  # has no dropout to begin with
        asked.append({"config": file, "overrides": [*PLAIN, *([] if another else NO_DROPOUT), *overrides]})
    assert run_jobs(folder, asked, processes) == [[None] * processes] * len(jobs)


def trained(folder, name):
    rows = RunFolder(folder / name).read_metrics()
    tensors = {key: value for key, value in weights(folder / name).items() if key.startswith("model/")}
    return [r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "baseline"], tensors


def evaluated(folder, name, processes):
    out = folder / f"{name}-{processes}.json"
    program = [ROOT / "launch/evaluate.py", folder / name, "--baselines", "prior", "--buckets", "--json", out]
    program.append("eval.batch=37")
    done = run_python(program) if processes == 1 else torchrun(processes, program)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())["results"]


def alike(one, other):
    """Assert that two evaluations are the same: counts, and what only the order of scores decides, to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            if name.startswith(ROUNDED):
                assert other[name] == pytest.approx(one[name], abs=ODDS, rel=0), name
            else:
                alike(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other):
            alike(*pair)
    else:
        assert one == other


def test_processes_micro_batches_engines_and_tables_train_alike(folder):
    micro = ["train.micro_batch_actions=60"]
    run(folder, 1, one=[], micro=micro)
    mapped = ["model.table=mapped"]
    run(folder, 2, ddp=[], all_reduce=["train.engine=all_reduce", *micro], mapped=mapped)
    rows, baselines, tensors = trained(folder, "one")
    for name in ("micro", "ddp", "all_reduce", "mapped"):
        other_rows, other_baselines, other = trained(folder, name)
        for key in ("step", "targets", "samples", "data_digest"):
            assert [r[key] for r in other_rows] == [r[key] for r in rows], name
        assert other_baselines == baselines, f"{name}: not the same bits"
        losses = [[r["loss"] for r in found] for found in (other_rows, rows)]
        steps = len(rows)
        np.testing.assert_allclose(*losses, rtol=of_losses(steps, TERMS), err_msg=name)
        for key, tensor in tensors.items():
            atol = of_weights(steps, sgd(RATE), TERMS)
            np.testing.assert_allclose(other[key], tensor, atol=atol, rtol=0, err_msg=f"{name} {key}")


def test_two_processes_measure_what_one_does(folder):
    if not (folder / "one").exists():
        run(folder, 1, one=[])
    (text, alone), (_, both) = (evaluated(folder, "one", processes) for processes in (1, 2))
    alike(alone, both)
    lines = " ".join(text.split())
    assert "targets: 0.00% never a training action" in lines and "labels of the last action" in lines
    row = alone["hstu"]
    assert {"auc/like", "cold_targets", "repeated_targets", "tied_targets", "notes", "buckets"} <= row.keys()
    assert 0 < row["repeated_targets"] < 1 and 0.3 < row["tied_targets"] < 0.7


def spread_times(users=200):
    """Of make_dataset's users: the actions of all of them between 0 and 29,000, no two of a user at once."""
    lengths = np.random.default_rng(0).integers(1, 30, users)
    return np.concatenate([np.arange(n) * (29_000 // n) + user % 7 for user, n in enumerate(lengths)])


SPLIT = "data.split={name: global_time, train_from: 2000, valid_from: 20000, test_from: 24000, held_out: all}"
SEQUENCES = {
    "interleaved": ["model.actions=interleaved", "model.interaction=product"],
    "together": ["model.actions=together", "model.interaction=product"],
    "din": [
        "model={name: din, dim: 16, tasks: {like: {column: value, at_least: 4}}, attention: [8], hidden: [8]}"
    ],
}


def test_models_over_sequences_train_and_are_measured_alike_on_any_number_of_processes(folder):
    make_dataset(folder / "spread", time=spread_times())
    own = [f"data.path={folder / 'spread'}", SPLIT]
    few = ["train.global_batch=3", "train.max_steps=3", "eval.splits=[]", "eval.baselines=[]"]
    sharded = "model.table={name: torchrec, sharding: row_wise}"
    cases = {
        **SEQUENCES,
        "few": [*SEQUENCES["together"], *few],
    }  # of three samples four processes get, one gets none
    for processes in (1, 2, 4):
        jobs = {f"{name}{processes}": [*own, *keys] for name, keys in cases.items()}
        if processes == 2 and find_spec("torchrec"):
            jobs["interleaved2"] += [sharded]
        run(folder, processes, **jobs)
    for name in cases:
        rows, baselines, tensors = trained(folder, f"{name}1")
        for processes in (2, 4):
            other_rows, other_baselines, other = trained(folder, f"{name}{processes}")
            assert other_baselines == baselines, "not the same bits"
            assert [r["targets"] for r in other_rows] == [r["targets"] for r in rows]
            losses = [[r["loss"] for r in found] for found in (other_rows, rows)]
            np.testing.assert_allclose(*losses, rtol=of_losses(len(rows), TERMS), err_msg=name)
            for key, tensor in tensors.items():
                atol = of_weights(len(rows), sgd(RATE), TERMS)
                np.testing.assert_allclose(other[key], tensor, atol=atol, rtol=0, err_msg=f"{name} {key}")
    (_, alone), (_, both) = (evaluated(folder, "interleaved1", processes) for processes in (1, 2))
    alike(alone, both)
    assert {"gauc/like", "gauc_mean/like", "gauc_users/like", "one_class_users/like"} <= alone["hstu"].keys()
    assert alone["hstu"]["users"] > 2 * alone["hstu"]["gauc_users/like"] > 20
