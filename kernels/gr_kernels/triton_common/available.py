"""Whether Triton kernels can run on tensors of a device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def interpreting() -> bool:
    """Whether Triton's interpreter is on: kernels then run in numpy, on tensors of any device.

    Triton reads the variable when a kernel is defined, so it must be set before triton is first imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old(index: int | None) -> str:
    """Tensor cores that multiply bfloat16 came with compute capability 8.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"the GPU's compute capability is {major}.{minor}, below 8.0"


def why_unavailable(device: torch.device) -> str:
    """In a few words why Triton kernels can't run on tensors of ``device``; "" when they can.

    They can on NVIDIA GPUs of compute capability 8.0 and later, and in Triton's interpreter, which is for tests.
    """
    if not _installed():
        return "triton isn't installed"
    if interpreting():
        return ""
    if device.type == "cpu":
        return "the tensors are on CPU, where it runs only in its interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it is for NVIDIA GPUs, not {device}"
    return _too_old(device.index)


# torch.compile calls it instead of tracing into it (torch.compiler.assume_constant_result would import the compiler).
why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
