"""Settings of the process that a run's numbers hang on: made for the run, and as they were afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from gr.config import RunConfig
from gr.errors import UserError
from gr_kernels.dispatch import CannotRun, preferring

NEED_A_GPU = ("triton", "cuda")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def numerics(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Determinism, the generators' states and the preferred kernels of a run.  The process's own come back."""
    kernels = config.train.kernels
    if kernels in NEED_A_GPU and device.type != "cuda":
        raise UserError(
            f"train.kernels is {kernels}, which needs an NVIDIA GPU, and this run is on the CPU: "
            "use auto (or cpp, reference)",
            everywhere=True,
        )
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), _deterministic(config.train.deterministic), preferring(kernels):
        try:
            yield
        except CannotRun as error:
            raise UserError(f"train.kernels is {kernels}, and {str(error).rstrip('.')}: use auto") from error


def seed_generators(device: torch.device, seed: int) -> None:
    """What ``torch.manual_seed`` does, on the CPU and the run's device: it goes through every kind of device, and where
    there is none it notes who asked, which takes milliseconds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms where there are any; somebody's stricter mode stays as it is."""
    if not wanted:
        yield
        return
    was, warned_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled, workspace = deterministic.fill_uninitialized_memory, os.environ.get(WORKSPACE)  # type: ignore[attr-defined]
    os.environ.setdefault(WORKSPACE, ":4096:8")  # without it cuBLAS adds in any order
    torch.use_deterministic_algorithms(True, warn_only=warned_only or not was)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # our kernels fill theirs
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned_only)
        deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
