"""Checkpoints of sharded tables: damage, asynchronous ones, other numbers of processes one after the other, and runs
whose batches don't suffice for all."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from gr.train import checkpoint
from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.end_to_end.tiny import assert_same_run, make_dataset, tensors_in, write_config
from tests.packages import needs

needs("torchrec", "fbgemm_gpu")

# 33 users in batches of 16: an epoch is two batches and one of a single sequence, fewer than there are processes
USERS, EPOCH, END = 33, 3, 9
PLAIN = [
    "model.input.dropout=0",
    "model.encoder.dropout=0",
    "data.window_blocks=1",
    "checkpoint.every_steps=null",
]
ROWS = "model.table={name: torchrec, sharding: row_wise}"
WHOLE = "model.table={name: torchrec, sharding: table_wise}"
BACKGROUND = "checkpoint.asynchronous=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    make_dataset(path / "data", users=USERS)

    def job(name, *overrides):
        config = write_config(path, path / "data", path / name)
        return {"config": config, "overrides": [*PLAIN, "eval.splits=[]", *overrides]}

    def on(name, *overrides):
        return {"resume": path / name, "overrides": overrides}

    four = [
        job("rows-4", ROWS),
        job("chain", ROWS, f"train.max_steps={EPOCH}"),
        job("whole-4", WHOLE),
        job("edge-4", WHOLE, f"train.max_steps={EPOCH}"),
        on("edge-4", f"train.max_steps={2 * EPOCH - 1}", BACKGROUND),
        on("edge-4", "train.max_steps=null"),
    ]
    two = [
        on("chain", f"train.max_steps={2 * EPOCH - 1}"),
        job("damaged", ROWS, "checkpoint.keep=9"),
        job("background", ROWS, "checkpoint.keep=9", BACKGROUND),
    ]
    one = [on("chain", "train.max_steps=null")]
    for processes, jobs in ((4, four), (2, two), (1, one)):
        assert run_jobs(path, jobs, processes) == [[None] * processes] * len(jobs)
    return path


def losses(run):
    return {
        r["step"]: (r["data_digest"], r["loss"])
        for r in RunFolder(run).read_metrics()
        if r["kind"] == "train"
    }


def test_at_an_epochs_edge_and_before_a_short_batch_it_goes_on_to_the_same_bits(folder):
    """One process holds the table, three nothing of it; the last batch of an epoch has one sequence for the four."""
    assert_same_run(folder / "edge-4", folder / "whole-4")
    kept = {step for step, _ in checkpoint.listed(folder / "whole-4" / "checkpoints")}
    assert END in kept


def test_from_four_processes_to_two_to_one(folder):
    found, expected = losses(folder / "chain"), losses(folder / "rows-4")
    assert list(found) == list(expected) == list(range(1, END + 1))
    assert [digest for digest, _ in found.values()] == [digest for digest, _ in expected.values()]
    # sums of some hundred float32 terms in other orders, carried on by nine steps of AdamW (tests/distributed)
    np.testing.assert_allclose(
        [loss for _, loss in found.values()], [loss for _, loss in expected.values()], rtol=3e-5
    )


def test_an_asynchronous_checkpoint_is_a_synchronous_one(folder):
    for step in (EPOCH, 2 * EPOCH, END):
        one, other = (
            tensors_in(folder / run / "checkpoints" / f"step-{step:08d}") for run in ("damaged", "background")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert_same_run(folder / "background", folder / "damaged")


def test_whatever_is_damaged_is_named_and_the_one_before_is_used(folder, caplog):
    saved = folder / "damaged" / "checkpoints"
    newest, before = saved / f"step-{END:08d}", saved / f"step-{2 * EPOCH:08d}"
    assert checkpoint.newest(saved) == newest
    names = {file.name for file in newest.iterdir()}
    assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "complete.json"}
    assert all((newest / f"__{rank}_0.distcp").stat().st_size > 1000 for rank in (0, 1)), "both have written"
    for name in sorted(names):
        for how in ("flip", "truncate", "delete"):
            content = (newest / name).read_bytes()
            damage(newest / name, how)
            caplog.clear()
            assert checkpoint.newest(saved) == before, (name, how)
            said = f"skipping damaged checkpoint '{newest}': "
            assert said in caplog.text
            assert name in caplog.text.partition(said)[2] or name == "complete.json"
            (newest / name).write_bytes(content)
    assert checkpoint.newest(saved) == newest


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return
    if how == "truncate":
        del content[-1:]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_processes_look_for_damage_together(folder):
    """Each at its share of the files: a damaged one is skipped by all."""
    run = folder / "skipping"
    shutil.copytree(folder / "damaged", run)
    for rank, step in ((0, END), (1, 2 * EPOCH)):
        damage(run / "checkpoints" / f"step-{step:08d}" / f"__{rank}_0.distcp", "flip")
    assert run_jobs(folder, [{"resume": run}], 2) == [[None, None]]
    assert_same_run(run, folder / "damaged")
