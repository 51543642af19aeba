"""Whether Triton kernels can run on tensors of a device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import subprocess
from typing import Any

import torch
from torch import Tensor

from gr_kernels.tracing import constant_when_traced, device_type, on_paper_now

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_SHARED = 166_912  # bytes a block: an A100's


def interpreting() -> bool:
    """Whether Triton's interpreter is on: kernels then run in numpy, on tensors of any device.

    Triton reads the variable when a kernel is defined, so it must be set before triton is first imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def wrong_dtype(dtype: torch.dtype, name: str = "") -> str:
    """In a few words why kernels can't compute on this dtype (of the argument of this name); "" when they can."""
    if dtype in DTYPES:
        return ""
    return "it takes float32, float16 or bfloat16, " + (f"and {name} is {dtype}" if name else f"not {dtype}")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_small(index: int | None) -> str:
    """Tensor cores that multiply bfloat16 came with compute capability 8.0; tiles are made for an A100's memory."""
    index = torch.cuda.current_device() if index is None else index
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the GPU's compute capability is {major}.{minor}, below 8.0"
    try:
        from triton.runtime import driver

        # Triton's first look at a GPU compiles a piece of C, which it needs for every launch
        shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    except Exception as error:  # no compiler, no Python.h, no libcuda: each fails in a way of its own
        return (
            "Triton can't build its launcher, for which it needs a C compiler and Python's headers at run time "
            f"({_in_brief(error)})"
        )
    if shared < LEAST_SHARED:
        return f"a block of this GPU has {shared:,} bytes of shared memory, fewer than {LEAST_SHARED:,}"
    return ""


def _in_brief(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):  # its message is the whole command line
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{program} failed with status {error.returncode}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@constant_when_traced
def why_unavailable(device: torch.device) -> str:
    """In a few words why Triton kernels can't run on tensors of ``device``; "" when they can.

    They can on NVIDIA GPUs of compute capability 8.0 and later with an A100's shared memory, where Triton finds a C
    compiler to build its launcher with, and in Triton's interpreter, which is for tests.
    """
    if on_paper_now() and device_type(device) == "cuda":
        return ""
    if not _installed():
        return "triton isn't installed"
    if interpreting():
        return ""
    if device.type == "cpu":
        return "the tensors are on CPU, where it runs only in its interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it is for NVIDIA GPUs, not {device}"
    return _too_small(device.index)
