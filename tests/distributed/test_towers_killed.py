"""Runs with towers of which processes are killed, and that others go on with, more of them or fewer."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs, run_killed
from tests.distributed.rounding import of_losses, of_weights, sgd
from tests.end_to_end.tiny import assert_same_run, weights
from tests.packages import needs
from tests.towers import make_encoder, make_titled, tower_job

needs("transformers")
# 16 users of up to 20 actions, and 17 candidates of each
RATE, TERMS, STEPS, KILLED = 0.1, 16 * 17 * 20, 6, 5
PLAIN = [
    *(f"train.max_steps={STEPS}", f"optimizer={{name: sgd, lr: {RATE}}}"),
    *("eval.splits=[]", "checkpoint.every_steps=2"),
]
ADAPTERS = {"mode": "adapters", "adapters": {"name": "houlsby", "size": 4}}
# Killed at step 5 of 6, after a checkpoint between two steps that form the vectors that are kept: (the tower, the
# run's settings, how many processes, which are killed, how many go on)
FEW = "train.global_batch=2"  # most items stand in no sequence of two users
KILLS = {
    "kept": ({"mode": "tuned", "refresh": 3}, ["objective=full_softmax", FEW], 1, [0], [2]),
    "dealt": (
        *({"name": "fused", "fusion": "gated", "mode": "tuned", "refresh": 3}, ["model.table=mapped", FEW]),
        *(2, [0, 1], [1, 3]),
    ),
    # while a thread writes the checkpoint of step 4
    "adapters": (ADAPTERS, ["checkpoint.asynchronous=true"], 2, [1], [1, 2]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NAME-whole of one process, adapters-of-two of two, and NAME-by-N, with which N processes have gone on."""
    path = tmp_path_factory.mktemp("killed")
    make_titled(path / "data")
    make_encoder(path / "encoder")
    going_on: dict[int, list[dict]] = {}
    for name, (tower, settings, processes, ranks, after) in KILLS.items():
        run_killed(path, tower_job(path, name, tower, *PLAIN, *settings), ranks, KILLED, processes)
        assert not (path / name / "checkpoints" / f"step-{STEPS:08d}").exists()
        for number in after:
            shutil.copytree(path / name, path / f"{name}-by-{number}")
            going_on.setdefault(number, []).append({"resume": path / f"{name}-by-{number}"})
    whole = [tower_job(path, f"{name}-whole", KILLS[name][0], *PLAIN, *KILLS[name][1]) for name in KILLS]
    of_two = tower_job(path, "adapters-of-two", ADAPTERS, *PLAIN)
    going_on[1] += whole
    going_on[2].append(of_two)
    for number, jobs in going_on.items():
        assert run_jobs(path, jobs, number) == [[None] * number] * len(jobs)
    return path


@pytest.mark.parametrize(
    ("name", "processes"), [(name, number) for name, kill in KILLS.items() for number in kill[4]]
)
def test_others_go_on_with_the_same_batches_and_losses(folder, name, processes):
    found, expected = (folder / f"{name}-{which}" for which in (f"by-{processes}", "whole"))
    rows, others = (
        [r for r in RunFolder(f).read_metrics() if r["kind"] == "train"] for f in (found, expected)
    )
    assert [r["step"] for r in rows] == [*range(1, STEPS + 1)]
    for key in ("data_digest", "targets"):
        assert [r[key] for r in rows] == [r[key] for r in others]
    losses = [[r["loss"] for r in of] for of in (rows, others)]
    np.testing.assert_allclose(*losses, rtol=of_losses(STEPS, TERMS))
    tensors, whole = weights(found), weights(expected)
    assert tensors.keys() == whole.keys() and ("kept/items/content" in whole) == ("refresh" in KILLS[name][0])
    bound = of_weights(STEPS, sgd(RATE), TERMS)
    for key in (key for key in whole if key.startswith(("model/", "kept/"))):
        torch.testing.assert_close(tensors[key], whole[key], rtol=0, atol=bound, msg=f"{name} {key}")


def test_as_many_go_on_to_the_same_bits(folder):
    assert_same_run(folder / "adapters-by-2", folder / "adapters-of-two")
