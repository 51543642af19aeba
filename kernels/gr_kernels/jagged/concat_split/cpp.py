"""The compiled operators of kernels/csrc: jagged.cpp on CPU, cuda/jagged.cu on NVIDIA GPUs, under one name each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.tracing import once

MOST_CUDA_PARTS = 8  # JaggedParts::kMost in csrc/cuda/jagged.h


def cpp_obstacle(tensor: Tensor, parts: int) -> str:
    """Why a call can't be the C++ operators', "" when it can."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, not on CPU"
    return native.why_unavailable()


def cuda_obstacle(tensor: Tensor, parts: int) -> str:
    """Why a call can't be the CUDA operators', "" when it can."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}, not on an NVIDIA GPU"
    if parts > MOST_CUDA_PARTS:
        return f"it takes {MOST_CUDA_PARTS} parts at most, not {parts}"
    return native.why_no_cuda()


def concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    return torch.ops.gr_kernels.jagged_concat(list(parts), list(offsets))  # type: ignore[no-any-return]


def split(joined: Tensor, offsets: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return torch.ops.gr_kernels.jagged_split(joined, list(offsets), list(rows))  # type: ignore[no-any-return]


@once
def register() -> None:
    """Each is the other's gradient. (Shapes for tracing come from the Meta implementations.)"""
    register_gradients("jagged_concat", "jagged_split")


def register_gradients(concat_name: str, split_name: str) -> None:
    """Registers the gradients of a pair of operators with the schemas of ``jagged_concat`` and ``jagged_split``."""
    concat_op, split_op = (getattr(torch.ops.gr_kernels, name) for name in (concat_name, split_name))

    def keep_for_concat(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        parts, offsets = inputs
        ctx.save_for_backward(*offsets)
        ctx.rows = [part.shape[0] for part in parts]

    def backward_of_concat(ctx: Any, d_joined: Tensor) -> tuple[list[Tensor], list[None]]:
        offsets = list(ctx.saved_tensors)
        return split_op(d_joined.contiguous(), offsets, ctx.rows), [None] * len(offsets)

    def keep_for_split(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1])

    def backward_of_split(ctx: Any, d_parts: list[Tensor]) -> tuple[Tensor, list[None], None]:
        offsets = list(ctx.saved_tensors)
        return concat_op([d_part.contiguous() for d_part in d_parts], offsets), [None] * len(offsets), None

    for name, backward, keep in (
        (concat_name, backward_of_concat, keep_for_concat),
        (split_name, backward_of_split, keep_for_split),
    ):
        torch.library.register_autograd(f"gr_kernels::{name}", backward, setup_context=keep)
