"""A run leaves the process as it found it: determinism, generators, threads, variables; also when it fails."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import torch
from torch.utils import deterministic

from gr.errors import UserError
from gr.processes import processes
from gr.train import job
from gr.train.numerics import WORKSPACE, numerics, seed_generators
from gr_kernels.dispatch import preferred

CPU = torch.device("cpu")
MODES = {"off": (False, False), "warn only": (True, True), "strict": (True, False)}
INSIDE = {"off": "warn only", "warn only": "warn only", "strict": "strict"}
"""Which mode a deterministic run has in a process of each mode: never a laxer one."""


@pytest.fixture
def config(config):
    return lambda *overrides: config("train.max_steps=2", *overrides)


def mode() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.fixture(params=MODES)
def given(request):
    """The process in one of the modes, with memory filled or not as torch has it."""
    enabled, warn_only = MODES[request.param]
    before = (*mode(), deterministic.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    yield request.param
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    deterministic.fill_uninitialized_memory = before[2]


def state() -> dict:
    """All of the process that a run may touch."""
    return {
        "mode": mode(),
        "filled": deterministic.fill_uninitialized_memory,
        "generator": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "kernels": preferred(),
        "gradients": torch.is_grad_enabled(),
    }


@contextmanager
def unchanged():
    torch.manual_seed(1234)
    before = state()
    try:
        yield
    finally:
        assert state() == before


@pytest.mark.parametrize("workspace", [None, ":16:8"])
@pytest.mark.parametrize("filled", [False, True])
def test_a_deterministic_run_is_never_laxer_than_the_process(config, given, monkeypatch, workspace, filled):
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", filled)
    monkeypatch.delenv(WORKSPACE, raising=False)
    if workspace is not None:
        monkeypatch.setenv(WORKSPACE, workspace)
    with unchanged(), numerics(config(), CPU):
        assert mode() == MODES[INSIDE[given]]
        assert os.environ[WORKSPACE] == (workspace or ":4096:8"), "somebody's choice stands"
        assert not deterministic.fill_uninitialized_memory
        torch.rand(3)
    with unchanged(), numerics(config("train.deterministic=false"), CPU):
        assert mode() == MODES[given]
        assert os.environ.get(WORKSPACE) == workspace


def test_a_run_leaves_the_process_as_it_found_it(config, given):
    with unchanged():
        job.run(config("train.threads=2"))
    with unchanged():
        job.resume(config().run.dir, ["train.max_steps=4"])


def test_so_does_one_that_fails(config, given, monkeypatch):
    def breaks(folder):
        torch.rand(5)
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError

    with unchanged(), pytest.raises(ZeroDivisionError):
        job.run(config("train.threads=2"), on_step=breaks)
    with unchanged(), pytest.raises(UserError, match="needs an NVIDIA GPU"):
        job.run(config("run.dir=null", "train.kernels=triton", "train.device=cpu"))
    with unchanged(), pytest.raises(UserError, match="leaves no training sequence"):
        job.run(config("data.split={name: records, train: 0.0, valid: 0.5}"))


def test_what_a_run_computes_does_not_hang_on_the_generators_state(config, given):
    torch.manual_seed(1)
    first = job.run(config())
    torch.manual_seed(2)
    second = job.run(config(f"run.dir={config().run.dir}-again"))
    assert first.metrics == second.metrics


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_a_step_draws_what_torch_draws_from_its_seed(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        expected = torch.rand(5)
        seed_generators(CPU, seed)
        assert torch.equal(torch.rand(5), expected)


def test_processes_join_and_leave_alone(given):
    with unchanged(), processes("cpu", threads=3) as joined:
        assert torch.get_num_threads() == 3
        assert joined.is_main and joined.world.size == joined.data.size == joined.local.size == 1
