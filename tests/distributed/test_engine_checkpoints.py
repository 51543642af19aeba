"""A checkpoint of any engine goes on under any other, over any number of processes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import adamw, of_losses, of_weights
from tests.end_to_end.tiny import assert_same_run, make_dataset, tensors_in, write_config
from tests.packages import needs

needs("torchrec", "fbgemm_gpu", "deepspeed")

ENGINES = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "zero1": "{name: deepspeed, zero: 1}",
    "zero2": "{name: deepspeed, zero: 2}",
    "zero3": "{name: deepspeed, zero: 3, whole_below: 0}",
}
TABLES = ["local", "{name: torchrec, sharding: row_wise}", "mapped"]
# One process shares nothing out: fsdp is ddp then, and zero2 is zero1
LOADING = {1: ["ddp", "zero1", "zero3"], 2: list(ENGINES), 4: list(ENGINES)}
SAVED, END, RATE = 3, 6, 0.01
PLAIN = [
    *("model.input.dropout=0", "model.encoder.dropout=0", "eval.splits=[]", "data.window_blocks=1"),
    *("checkpoint.every_steps=null", "train.micro_batch_actions=35"),
    f"optimizer={{name: adamw, lr: {RATE}, weight_decay: 0.1, groups: [{{match: bias, lr: 0.003}}]}}",
]


def choosing(engine, table):
    return [f"train.engine={ENGINES[engine]}", f"model.table={TABLES[table % len(TABLES)]}"]


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def losses(run):
    return {r["step"]: r["loss"] for r in RunFolder(run).read_metrics() if r["kind"] == "train"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two processes under every engine: ENGINE-saved, of SAVED steps, and ENGINE-whole."""
    path = tmp_path_factory.mktemp("engines")
    make_dataset(path / "data")
    jobs = []
    for number, engine in enumerate(ENGINES):
        for name, steps in (("saved", SAVED), ("whole", END)):
            config = write_config(path, path / "data", path / f"{engine}-{name}")
            chosen = choosing(engine, number)
            jobs.append({"config": config, "overrides": [*PLAIN, *chosen, f"train.max_steps={steps}"]})
    assert run_jobs(path, jobs, 2) == [[None, None]] * len(jobs)
    return path


def test_every_engine_names_the_same_tensors(folder):
    expected = tensors_in(checkpoint(folder / "ddp-saved", SAVED))
    assert {f"optimizer/{m}/input.positions" for m in ("step", "exp_avg", "exp_avg_sq")} < expected.keys()
    for engine in ENGINES:
        tensors = tensors_in(checkpoint(folder / f"{engine}-saved", SAVED))
        assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in expected.items()
        }, engine
        assert all(t == SAVED for n, t in tensors.items() if n.startswith("optimizer/step/")), engine


def test_the_same_processes_go_on_to_the_same_bits(folder):
    """And what they save then while training goes on is what they would have saved in step."""
    jobs = []
    for engine in ENGINES:
        shutil.copytree(folder / f"{engine}-saved", folder / f"{engine}-resumed")
        overrides = [f"train.max_steps={END}", "checkpoint.asynchronous=true"]
        jobs.append({"resume": folder / f"{engine}-resumed", "overrides": overrides})
    assert run_jobs(folder, jobs, 2) == [[None, None]] * len(jobs)
    for engine in ENGINES:
        assert_same_run(folder / f"{engine}-resumed", folder / f"{engine}-whole")


@pytest.mark.parametrize("processes", LOADING)
def test_other_engines_and_numbers_of_processes_go_on(folder, processes):
    """Loaded and saved again, not a bit of any tensor changes; and training goes on as it would have."""
    jobs, loaded, gone_on = [], [], []
    for first, engine in enumerate(ENGINES):
        others = [other for other in LOADING[processes] if (other, processes) != (engine, 2)]
        for number, other in enumerate(others):
            run = folder / f"{engine}-to-{other}-{processes}"
            shutil.copytree(folder / f"{engine}-saved", run)
            chosen = choosing(other, first + number)
            jobs.append({"resume": run, "overrides": [*chosen, f"train.max_steps={SAVED}"]})
            loaded.append((engine, run))
            if number == first % len(others):
                jobs.append({"resume": run, "overrides": [f"train.max_steps={END}"]})
                gone_on.append(run)
    assert run_jobs(folder, jobs, processes) == [[None] * processes] * len(jobs)
    for engine, run in loaded:
        saved, again = (tensors_in(checkpoint(of, SAVED)) for of in (folder / f"{engine}-saved", run))
        assert saved.keys() == again.keys()
        assert all(torch.equal(saved[name], again[name]) for name in saved), run.name
    expected, end = losses(folder / "ddp-whole"), tensors_in(checkpoint(folder / "ddp-whole", END))
    for run in gone_on:
        found, tensors = losses(run), tensors_in(checkpoint(run, END))
        assert list(found) == list(expected) == list(range(1, END + 1))
        values = (list(found.values()), list(expected.values()))
        np.testing.assert_allclose(*values, rtol=of_losses(END), err_msg=run.name)
        for name, value in end.items():
            np.testing.assert_allclose(
                tensors[name], value, atol=of_weights(END, adamw(RATE)), rtol=0, err_msg=f"{run.name} {name}"
            )
