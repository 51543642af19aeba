"""Towers under every engine, and where processes share sequences, train as on one process; and any number of processes
evaluates what came of it as the run itself did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gr.train.comparison import compare
from gr.train.exporting import export
from gr.train.folder import RunFolder
from tests.distributed.group import in_group
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import of_losses, of_weights, sgd
from tests.end_to_end.tiny import weights
from tests.packages import needs
from tests.towers import make_encoder, make_titled, tower_job

needs("transformers", "torchrec", "fbgemm_gpu", "deepspeed")
RATE, TERMS, STEPS = 0.1, 16 * 17 * 20, 3
PLAIN = [
    *(f"train.max_steps={STEPS}", "eval.splits=[test]", "checkpoint.every_steps=null"),
    "train.micro_batch_actions=35",
]
SGD = f"optimizer={{name: sgd, lr: {RATE}}}"
# of two users, and of one: all processes have a part of its sequence, or one has none
TWO, ONE = "train.global_batch=2", "train.global_batch=1"
TOWERS = {
    "kept": (
        {"name": "fused", "fusion": "gated", "mode": "tuned", "refresh": 2},
        ["model.table=mapped", TWO, SGD],
    ),
    "one user": ({"mode": "tuned", "refresh": 2}, [ONE, SGD]),
    # clipped, the scale of a part of the gradients shows beside the others
    "frozen": (
        {"name": "fused", "fusion": "concat"},
        [
            "model.table={name: torchrec, sharding: row_wise}",
            SGD,
            "optimizer.momentum=0.9",
            "train.clip_norm=0.3",
        ],
    ),
    "prompt": ({"mode": "adapters", "adapters": {"name": "prompt", "size": 3}}, [SGD]),
}
SETTINGS = {
    "all_reduce": "train.engine=all_reduce",
    "fsdp": "train.engine=fsdp",
    "zero1": "train.engine={name: deepspeed, zero: 1}",
    "zero2": "train.engine={name: deepspeed, zero: 2}",
    "zero3": "train.engine={name: deepspeed, zero: 3, whole_below: 0}",
    "context": "train.context=2",
}
CASES = [
    *(("kept", "fsdp"), ("kept", "zero3"), ("one user", "context"), ("one user", "all_reduce")),
    *(("frozen", "zero2"), ("prompt", "zero1")),
]
JUDGED = ("hr@10", "ndcg@10", "mrr", "loss", "users")


def evaluated(runs: str) -> list[list[float]]:
    """What is judged of the test split, of each of ``runs`` (JSON)."""
    results = [[*compare(run).results.values()][-1].row() for run in json.loads(runs)]
    return [[row[name] for name in JUDGED] for row in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NAME of one process, and NAME-SETTING of two."""
    path = tmp_path_factory.mktemp("engines")
    make_titled(path / "data")
    make_encoder(path / "encoder")
    one = [tower_job(path, name, tower, *PLAIN, *asked) for name, (tower, asked) in TOWERS.items()]
    two = [
        tower_job(path, f"{name}-{setting}", TOWERS[name][0], *PLAIN, *TOWERS[name][1], SETTINGS[setting])
        for name, setting in CASES
    ]
    for processes, jobs in ((1, one), (2, [{**job, "dirty": True} for job in two])):
        assert run_jobs(path, jobs, processes) == [[None] * processes] * len(jobs)
    return path


def rows(run, kind):
    return [row for row in RunFolder(run).read_metrics() if row["kind"] == kind]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_two_processes_train_as_one(folder, name, setting):
    many, one = folder / f"{name}-{setting}", folder / name
    found, expected = rows(many, "train"), rows(one, "train")
    assert len(found) == len(expected) == STEPS
    for key in ("data_digest", "targets", "tokens"):
        assert [r[key] for r in found] == [r[key] for r in expected], key
    for key in ("loss", "grad_norm") if "grad_norm" in expected[0] else ("loss",):
        values = [[r[key] for r in of] for of in (found, expected)]
        np.testing.assert_allclose(*values, rtol=of_losses(STEPS, TERMS), err_msg=key)
    assert [r["flops"] for r in found] == pytest.approx([r["flops"] for r in expected], rel=1e-9)
    tensors, others = weights(many), weights(one)
    assert tensors.keys() == others.keys()
    for key in (key for key in others if key.startswith(("model/", "kept/"))):
        bound = of_weights(STEPS, sgd(RATE), TERMS)
        torch.testing.assert_close(tensors[key], others[key], rtol=0, atol=bound, msg=key)


def test_any_number_of_processes_evaluates_runs_and_exports_as_the_run_did(folder):
    """To the bit as many as trained; ranks are the same for others, losses but for rounding."""
    runs = [folder / f"{name}-{setting}" for name, setting in CASES]
    exports = [folder / f"{run.name}.export" for run in runs]
    for run, out in zip(runs, exports, strict=True):
        export(run, out)
    logged = [[rows(run, "eval")[-1][name] for name in JUDGED] for run in runs]
    for processes, paths in ((1, exports), (2, exports), (3, runs)):
        asked = json.dumps([str(path) for path in paths])
        for found in in_group(evaluated, processes, folder / f"by {processes}", asked, by_hand=processes > 1):
            np.testing.assert_allclose(found, logged, rtol=0 if processes == 2 else 1e-6)
