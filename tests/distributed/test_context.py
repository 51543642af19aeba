"""Runs whose processes share sequences: the losses, the evaluations and the weights of a run on one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.end_to_end.tiny import make_dataset, weights, write_config
from tests.packages import needs
from tests.precision import UNIT, growth

needs("torchrec", "fbgemm_gpu")

STEPS = 4
PLAIN = [
    *("eval.splits=[test]", "checkpoint.every_steps=null", "data.window_blocks=1", "log.every_steps=1"),
    *("model.encoder.attention_dropout=0.1", "optimizer={name: sgd, lr: 0.5}", "train.clip_norm=null"),
]
SOFTMAX = "model.encoder.activation=softmax"
DRY = ("model.encoder.dropout=0", "model.encoder.attention_dropout=0", "model.input.dropout=0")
RECOMPUTE = "train.activation_checkpointing=true"
SHARDED = "model.table={name: torchrec, sharding: row_wise}"
# 16 sequences of at most 20 rows, of which every gradient and loss sums a few hundred float32 terms a dozen times a
# step; steps of SGD hand the errors on as they are
ALIKE = STEPS * 12 * float(growth(300)) * UNIT[torch.float32]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """On one process, and the same shared by four."""
    folder = tmp_path_factory.mktemp("context")
    make_dataset(folder / "data", users=40)

    def asked(name, *overrides):
        config = write_config(folder, folder / "data", folder / name)
        return {"config": config, "overrides": [*PLAIN, f"train.max_steps={STEPS}", *overrides]}

    one = [asked("one"), asked("one-softmax", SOFTMAX), asked("one-dry", *DRY)]
    assert run_jobs(folder, one, 1) == [[None]] * len(one)
    four = [
        asked("four", "train.context=4"),
        asked("four-softmax", SOFTMAX, "train.context=4", "train.engine=all_reduce", RECOMPUTE),
        asked("four-sharded", SHARDED, "train.context=4"),
        asked("sharded-two-by-two", SHARDED, *DRY, "train.context=2"),
        asked("two-by-two", *DRY, "train.context=2", "train.max_steps=2"),  # and then otherwise
        {"resume": folder / "two-by-two", "overrides": [f"train.max_steps={STEPS}", "train.context=4"]},
        asked("refused", "train.context=3"),
    ]
    refusals = run_jobs(folder, four, 4)
    assert refusals[:-1] == [[None] * 4] * (len(four) - 1)
    assert "4 processes can't be cut into groups of 3 that share a sequence" in refusals[-1][0]
    return folder


def rows(folder, name, kind):
    return [r for r in RunFolder(folder / name).read_metrics() if r["kind"] == kind]


PAIRS = [
    *(("four", "one"), ("four-softmax", "one-softmax"), ("two-by-two", "one-dry")),
    *(("four-sharded", "one"), ("sharded-two-by-two", "one-dry")),
]


@pytest.mark.parametrize(("shared", "alone"), PAIRS)
def test_losses_are_those_of_one_process(runs, shared, alone):
    found, expected = rows(runs, shared, "train"), rows(runs, alone, "train")
    assert len(found) == len(expected) == STEPS
    counts = ("tokens",) if "softmax" in shared else ("tokens", "flops")  # which forms its layers again
    for key in ("step", "targets", "samples", "data_digest", "lr", *counts):
        assert [r[key] for r in found] == [r[key] for r in expected], key
    losses = [[r["loss"] for r in of] for of in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=ALIKE)


@pytest.mark.parametrize(("shared", "alone"), PAIRS)
def test_weights_and_evaluations_are_those_of_one_process(runs, shared, alone):
    """Every request is asked once, by whichever process."""
    found, expected = (rows(runs, name, "eval")[-1] for name in (shared, alone))
    assert found["users"] == expected["users"] > 0
    assert found["mrr"] == pytest.approx(expected["mrr"], rel=1e-3)
    one, many = weights(runs / alone), weights(runs / shared)
    assert one.keys() == many.keys(), "a checkpoint knows nothing of who shared sequences"
    for name, value in one.items():
        size = value.abs().max().clamp_min(1e-6) if value.numel() else 1.0
        assert float((many[name] - value).abs().max() / size) <= 10 * ALIKE, name
