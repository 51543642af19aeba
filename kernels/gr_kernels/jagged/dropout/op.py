"""Jagged dropout: checks a call, picks an implementation, runs it.

T rows (sum of lengths), C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.dispatch import Choice, Implementation, choose, takes_all
from gr_kernels.jagged.dropout import reference, triton_op
from gr_kernels.jagged.dropout.schema import Operator

_NAME = "jagged_dropout"


TRITON = Operator("jagged_dropout_triton", triton_op.dropout)
REFERENCE = Operator("jagged_dropout_reference", reference.dropout)


IMPLEMENTATIONS = (
    Implementation(
        "triton",
        triton_op.obstacle,
        TRITON,
        "one pass, no stored mask",
        device="cuda",
        register=TRITON.register,
    ),
    Implementation(
        "reference",
        takes_all,
        REFERENCE,
        "PyTorch on counter-based words, no stored mask",
        register=REFERENCE.register,
    ),
)


def jagged_dropout(
    x: Tensor, probability: float, *, key: int, rows: Tensor | None = None, implementation: str = "auto"
) -> Tensor:
    """Zeroes each number with ``probability`` and divides the others by 1 - probability.

    The decision for column c of row t (dimensions after the first count as one) is a pure function of (key, t, c): a
    32-bit word of Philox4x32-10, the same on every device. Nothing is stored for the backward pass, which decides
    again. Pass another key at every step and layer (``gr_kernels.derive_key``).

    Args:
        x: (T, ...) floating.
        probability: at least 0 and below 1; 0 returns x itself.
        key: 64-bit.
        rows: (T,) int64: t of each row of x, where these are some rows of a larger tensor; None: 0, 1, 2, ...
        implementation: "auto", or "triton", "reference".

    Returns:
        x's shape and dtype, contiguous; computed in float32 (float64 for that) and rounded once. Differentiable.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run.
    """
    choice = _choose(x, probability, key, rows, implementation)
    return x if probability == 0.0 else choice.implementation.run(x, probability, key, rows)


def _choose(x: Tensor, probability: float, key: int, rows: Tensor | None, name: str) -> Choice:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"{_NAME}: x must be floating, with rows, not {tuple(x.shape)} {x.dtype}.")
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"{_NAME}: probability must be at least 0 and below 1, not {probability}.")
    if not 0 <= key < 2**64:
        raise ValueError(f"{_NAME}: key must be a 64-bit number of at least 0, not {key}.")
    if rows is not None and (
        rows.shape != x.shape[:1] or rows.dtype != torch.int64 or rows.device != x.device
    ):
        raise ValueError(
            f"{_NAME}: rows must be ({x.shape[0]},) int64 on {x.device}, not {tuple(rows.shape)} {rows.dtype} on "
            f"{rows.device}."
        )
    return choose(_NAME, IMPLEMENTATIONS, x.device, (x,), name)
