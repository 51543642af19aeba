"""The C++ operators for CPU: kernels/csrc/counter_random.cpp.

Shapes: T positions in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.operators import signed


def _int64(x: Tensor) -> Tensor:
    return (
        x if x.dtype == torch.int64 else x.long()
    )  # (long() alone takes half a microsecond to find that out)


def obstacle(coordinates: Tensor, draws: int) -> str:
    """Why this call can't be compiled code's, "" when it can."""
    if not coordinates.is_cpu:
        return f"the tensors are on {coordinates.device}, not on CPU"
    return native.why_unavailable()


def uniform_integers(
    key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int, high: int, dtype: torch.dtype
) -> Tensor:
    """reference.uniform_integers() for a call without obstacle."""
    return torch.ops.gr_kernels.counter_integers(  # type: ignore[no-any-return]
        signed(key), _int64(ordinals_T), _int64(positions_T), draws, high, dtype == torch.int32
    )


def uniform_floats(key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int) -> Tensor:
    """reference.uniform_floats() for a call without obstacle."""
    return torch.ops.gr_kernels.counter_floats(  # type: ignore[no-any-return]
        signed(key), _int64(ordinals_T), _int64(positions_T), draws
    )


def row_uniforms(key: int, rows: Tensor, width: int) -> Tensor:
    """reference.row_uniforms() for a call without obstacle."""
    return torch.ops.gr_kernels.counter_row_uniforms(  # type: ignore[no-any-return]
        signed(key), _int64(rows), width
    )
