"""The ways to put jagged tensors together and take them apart, and what each can't do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gr_kernels.dispatch import Implementation
from gr_kernels.jagged.concat_split import compiled, reference, triton_op

MOST_CUDA_PARTS = 8  # JaggedParts::kMost in csrc/cuda/jagged.h


@dataclass(frozen=True)
class Way:
    """The two operators of one implementation."""

    concat: Any
    split: Any


def _none(tensor: Tensor, parts: int) -> str:
    return ""


def _cpp(tensor: Tensor, parts: int) -> str:
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, not on CPU"
    return compiled.why_no_cpp()


def _cuda(tensor: Tensor, parts: int) -> str:
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}, not on an NVIDIA GPU"
    if parts > MOST_CUDA_PARTS:
        return f"it takes {MOST_CUDA_PARTS} parts at most, not {parts}"
    return compiled.why_no_cuda()


# `obstacle` is given one of the tensors and the number of parts; `run` is a Way.
IMPLEMENTATIONS = (
    Implementation("cuda", _cuda, Way(compiled.concat, compiled.split), "one compiled pass", device="cuda"),
    Implementation(
        "triton", triton_op.obstacle, Way(triton_op.concat, triton_op.split), "a pass a part", device="cuda"
    ),
    Implementation(
        "cpp", _cpp, Way(compiled.concat, compiled.split), "compiled, on every thread", device="cpu"
    ),
    Implementation("reference", _none, Way(reference.concat, reference.split), "plain PyTorch, any device"),
)


def check_same_rows(operator: str, tensors: Sequence[Tensor]) -> None:
    """ValueError unless the tensors' rows are alike: shape, dtype, device."""
    first = tensors[0]
    for number, tensor in enumerate(tensors):
        if tensor.dim() < 1 or tensor.shape[1:] != first.shape[1:] or tensor.dtype != first.dtype:
            raise ValueError(
                f"{operator}: part {number} is {tuple(tensor.shape)} {tensor.dtype}, which doesn't fit part 0's "
                f"{tuple(first.shape)} {first.dtype}: only the number of rows may differ."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{operator}: part {number} is on {tensor.device}, part 0 on {first.device}: move one."
            )
