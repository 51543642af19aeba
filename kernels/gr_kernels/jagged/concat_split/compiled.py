"""The compiled operators of kernels/csrc: jagged.cpp on CPU, cuda/jagged.cu on NVIDIA GPUs, under one name each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.tracing import constant_when_traced


@constant_when_traced
def why_no_cpp() -> str:
    """ "" once the operators are loaded and differentiable, else why they aren't."""
    reason = native.why_unavailable()
    if not reason:
        _register()
    return reason


@constant_when_traced
def why_no_cuda() -> str:
    """The same for their CUDA implementations."""
    reason = native.why_no_cuda()
    if not reason:
        _register()
    return reason


def concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    return torch.ops.gr_kernels.jagged_concat(list(parts), list(offsets))  # type: ignore[no-any-return]


def split(joined: Tensor, offsets: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return torch.ops.gr_kernels.jagged_split(joined, list(offsets), list(rows))  # type: ignore[no-any-return]


@functools.cache
def _register() -> None:
    """Each is the other's gradient; once, on first use. (Shapes for tracing come from the Meta implementations.)"""
    register_gradients("gr_kernels::jagged_concat", "gr_kernels::jagged_split")


def register_gradients(concat_name: str, split_name: str) -> None:
    """Registers the gradients of a pair of operators with the schemas of ``jagged_concat`` and ``jagged_split``."""
    space, concat_short = concat_name.split("::")
    operators = getattr(torch.ops, space)
    concat_op, split_op = getattr(operators, concat_short), getattr(operators, split_name.split("::")[1])

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

    torch.library.register_autograd(concat_name, backward_of_concat, setup_context=keep_for_concat)
    torch.library.register_autograd(split_name, backward_of_split, setup_context=keep_for_split)
