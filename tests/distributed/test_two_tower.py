"""Pre-ranking models over processes: what is normalised or contrasted over a batch is so over the global one."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import of_losses
from tests.end_to_end.tiny import weights
from tests.unit.test_two_tower_run import CONFIG, make_dataset

PLAIN = ["train.epochs=1", "eval.splits=[test]", "model.network.dropout=0", "optimizer={name: sgd, lr: 0.05}"]
SHARDED = "{name: torchrec, sharding: row_wise}"
FIELDS = {"user": ("user", "group"), "item": ("item", "genres")}
NETWORKS = {
    "inttower": [],
    "sharded": [
        f"model.{side}.fields.{name}.table={SHARDED}" for side, names in FIELDS.items() for name in names
    ],
    # four processes have a share of three impressions, one of them none
    "few": ["train.global_batch=3", "train.max_steps=4", "eval.splits=[]"],
    "dat": ["model.network={name: dat, tower: [16, 8], std: 0.1, dropout: 0}"],
    "dcn": ["model.network={name: dcn, deep: [16, 8], std: 0.1, dropout: 0}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("two_tower")
    make_dataset(path / "data", rows=300)
    return path


def train(folder, processes):
    asked = []
    for name, overrides in NETWORKS.items():
        file = folder / f"{name}-{processes}.yaml"
        file.write_text(CONFIG.format(run=folder / f"{name}-{processes}", data=folder / "data"))
        another = any(one.startswith("model.network={") for one in overrides)
        plain = [one for one in PLAIN if not (another and one.startswith("model"))]
        if name == "sharded" and (processes == 1 or find_spec("torchrec") is None):
            overrides = []  # what the others are compared with
        asked.append({"config": file, "overrides": [*plain, *overrides]})
    assert run_jobs(folder, asked, processes) == [[None] * processes] * len(asked)
    return {name: RunFolder(folder / f"{name}-{processes}").read_metrics() for name in NETWORKS}


def test_one_two_and_four_processes_have_the_same_losses(folder):
    found = {processes: train(folder, processes) for processes in (1, 2, 4)}
    for name in NETWORKS:
        alone = [r for r in found[1][name] if r["kind"] == "train"]
        for processes in (2, 4):
            rows = [r for r in found[processes][name] if r["kind"] == "train"]
            assert [(r["step"], r["targets"], r["data_digest"]) for r in rows] == [
                (r["step"], r["targets"], r["data_digest"]) for r in alone
            ]
            losses = [[r["loss"] for r in some] for some in (rows, alone)]
            assert np.isfinite(losses).all()
            # sums over the batch's impressions in another order, in each of a dozen stages
            bound = 12 * of_losses(len(alone), 64)
            np.testing.assert_allclose(*losses, rtol=bound, err_msg=f"{name} {processes}")
            one, several = (weights(folder / f"{name}-{number}") for number in (1, processes))
            for key in (key for key in one if "running" in key):
                # what is averaged is less than ten times as large as the largest of its means
                atol = 10 * bound * float(one[key].abs().max())
                torch.testing.assert_close(
                    several[key], one[key], rtol=0, atol=atol, msg=f"{name} {processes} {key}"
                )
