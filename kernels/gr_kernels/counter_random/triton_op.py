"""Counter-based random numbers in Triton, as one torch operator whose dtype says what becomes of a word.

Shapes: T positions in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.operators import define, signed
from gr_kernels.tracing import once
from gr_kernels.triton_common.available import on, why_unavailable

BLOCKS, WARPS = 256, 4  # of four draws each, a program: two calls of Philox a thread
_MOST_DRAWS = 2**31


def obstacle(coordinates: Tensor, draws: int) -> str:
    """Why this call can't be Triton's, "" when it can."""
    if draws >= _MOST_DRAWS:
        return f"it counts the draws of a row in 31 bits, and there are {draws:,}"
    return why_unavailable(coordinates.device)


def uniform_integers(
    key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int, high: int, dtype: torch.dtype
) -> Tensor:
    """reference.uniform_integers() for a call without obstacle."""
    return _draw(key, ordinals_T, positions_T, draws, high, dtype)


def uniform_floats(key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int) -> Tensor:
    """reference.uniform_floats() for a call without obstacle."""
    return _draw(key, ordinals_T, positions_T, draws, 0, torch.float32)


def row_uniforms(key: int, rows: Tensor, width: int) -> Tensor:
    """reference.row_uniforms() for a call without obstacle."""
    return _draw(key, rows, None, width, 0, torch.float64)


def _draw(
    key: int, ordinals_T: Tensor, positions_T: Tensor | None, draws: int, high: int, dtype: torch.dtype
) -> Tensor:
    if positions_T is not None:
        positions_T = positions_T.long()
    return torch.ops.gr_kernels.counter_draws_triton(  # type: ignore[no-any-return]
        signed(key), ordinals_T.long(), positions_T, draws, high, dtype
    )


def _output(ordinals: Tensor, draws: int, dtype: torch.dtype) -> Tensor:
    return ordinals.new_empty((ordinals.shape[0], draws), dtype=dtype)


def _run(
    key: int, ordinals: Tensor, positions: Tensor | None, draws: int, high: int, dtype: torch.dtype
) -> Tensor:
    from gr_kernels.counter_random import triton_kernel

    out = _output(ordinals, draws, dtype)
    if out.numel():
        rows = ordinals.shape[0]
        with on(ordinals):
            triton_kernel.draw[(-(-rows * ((draws + 3) // 4) // BLOCKS),)](
                out, ordinals.contiguous(), None if positions is None else positions.contiguous(),
                key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF, high, rows, draws,
                BLOCKS=BLOCKS, num_warps=WARPS,
            )  # fmt: skip
    return out


def _fake(
    key: int, ordinals: Tensor, positions: Tensor | None, draws: int, high: int, dtype: torch.dtype
) -> Tensor:
    return _output(ordinals, draws, dtype)


@once
def register() -> None:
    schema = "(int key, Tensor ordinals, Tensor? positions, int draws, int high, ScalarType dtype) -> Tensor"
    define("counter_draws_triton", schema, _run, _fake)
