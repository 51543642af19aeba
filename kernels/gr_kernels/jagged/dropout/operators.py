"""Jagged dropout as torch operators, one an implementation. Each is its own gradient, for which it decides again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Tensor, float, int], Tensor]


def call(name: str, x: Tensor, probability: float, key: int) -> Tensor:
    """The operator registered for an implementation."""
    operator = getattr(torch.ops.gr_kernels, f"jagged_dropout_{name}")
    return operator(x, probability, key - 2**64 if key >= 2**63 else key)  # type: ignore[no-any-return]


@functools.cache
def register(name: str, run: Run) -> None:
    """Defines the operator of an implementation, once, on its first use. ``run`` is given the key as 64 bits."""
    full_name = f"gr_kernels::jagged_dropout_{name}"

    def forward(x: Tensor, probability: float, key: int) -> Tensor:
        return run(x, probability, key % 2**64)

    def fake(x: Tensor, probability: float, key: int) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def keep_settings(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings = inputs[1:]

    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        return operator(d_out, *ctx.settings), None, None

    operator = torch.library.custom_op(
        full_name, forward, mutates_args=(), schema="(Tensor x, float probability, int key) -> Tensor"
    )
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=keep_settings)
