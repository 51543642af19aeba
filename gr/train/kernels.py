"""train.kernels: one setting for the implementations of all operators, and what can't be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gr.config import RunConfig
from gr.errors import UserError
from gr_kernels.dispatch import CannotRun

NEED_A_GPU = ("triton", "cuda")


def check_kernels(config: RunConfig, device: torch.device) -> None:
    """Refuse what needs a GPU where the run is on the CPU."""
    kernels = config.train.kernels
    if kernels in NEED_A_GPU and device.type != "cuda":
        raise UserError(
            f"train.kernels is {kernels}, which needs an NVIDIA GPU, and this run is on the CPU: "
            "use auto (or cpp, reference)"
        )


@contextmanager
def advice_on_kernels(config: RunConfig) -> Iterator[None]:
    """Turn an operator's refusal of the named implementation into a user error."""
    try:
        yield
    except CannotRun as error:
        raise UserError(
            f"train.kernels is {config.train.kernels}, and {str(error).rstrip('.')}: use auto"
        ) from error
