"""The ways to pad jagged tensors and back."""

from __future__ import annotations

from torch import Tensor

from gr_kernels.dispatch import Implementation
from gr_kernels.jagged.dense import reference, triton_op


def _none(x: Tensor) -> str:
    return ""


# `obstacle` is given the tensor that is moved.
TO_DENSE = (
    Implementation("triton", triton_op.obstacle, triton_op.to_dense, "one pass", device="cuda"),
    Implementation("reference", _none, reference.to_dense, "plain PyTorch, any device"),
)
TO_JAGGED = (
    Implementation("triton", triton_op.obstacle, triton_op.to_jagged, "one pass", device="cuda"),
    Implementation("reference", _none, reference.to_jagged, "plain PyTorch, any device"),
)
