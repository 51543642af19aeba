"""Counter-based random numbers: every value is a pure function of (key, its own coordinates).

Shapes: T positions in a batch. No state, no order: any split of a batch, any number of ranks or threads and
any device give the same integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.counter_random import cpp, reference, triton_op
from gr_kernels.dispatch import Implementation, choose, takes_all

_LIMITS = {torch.int64: 1 << 32, torch.int32: 1 << 31}  # of `high`
_ROW_BLOCK_VALUES = 1 << 20  # float64 values in flight while a long range of rows is drawn

# In order of preference. Each is a module of uniform_integers, uniform_floats and row_uniforms.
IMPLEMENTATIONS = (
    Implementation("cpp", cpp.obstacle, cpp, "compiled, on every thread", device="cpu"),
    Implementation(
        "triton",
        triton_op.obstacle,
        triton_op,
        "one pass, each draw written once",
        device="cuda",
        register=triton_op.register,
    ),
    Implementation("reference", takes_all, reference, "plain PyTorch, any device"),
)


def _check_key(key: int) -> None:
    if not 0 <= key < 1 << 64:
        raise ValueError(f"a key is an integer in [0, 2^64), not {key}: make it with derive_key")


def _check(key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int) -> None:
    vectors = ordinals_T.dim() == 1 and positions_T.dim() == 1
    if not vectors or ordinals_T.numel() != positions_T.numel():
        raise ValueError(
            "ordinals and positions must be vectors of one length, not "
            f"{tuple(ordinals_T.shape)} and {tuple(positions_T.shape)}"
        )
    if ordinals_T.device != positions_T.device:
        raise ValueError(
            f"ordinals are on {ordinals_T.device} and positions on {positions_T.device}: move one to the other's device"
        )
    if draws < 0:
        raise ValueError(f"draws must not be negative, got {draws}")
    _check_key(key)


def uniform_integers(
    key: int,
    ordinals_T: Tensor,
    positions_T: Tensor,
    draws: int,
    high: int,
    *,
    dtype: torch.dtype = torch.int64,
    implementation: str = "auto",
) -> Tensor:
    """Uniform integers in [0, high), one row of draws for each (sample ordinal, position).

    ordinals_T: (T,) integers (64 bits used); positions_T: (T,) integers (low 32 bits used); high in [1, 2^32].
    Draw d is ``(word * high) >> 32`` of word d%4 of Philox4x32-10 at counter (position, d//4, ordinal low,
    ordinal high): a bias of at most high / 2^32 in relative frequency. dtype: int64, or int32 for high <= 2^31.
    implementation: 'auto', 'cpp', 'triton', 'reference'; gr_kernels.explain tells what 'auto' takes.

    Returns (T, draws) on the tensors' device. Raises ValueError for a high, dtype, shape or implementation outside
    the above.
    """
    _check(key, ordinals_T, positions_T, draws)
    if dtype not in _LIMITS:
        raise ValueError(f"uniform_integers gives torch.int64 or torch.int32, not {dtype}")
    if not 1 <= high <= _LIMITS[dtype]:
        raise ValueError(f"high must lie in [1, {_LIMITS[dtype]}] for {dtype}, got {high}")
    way = choose("uniform_integers", IMPLEMENTATIONS, ordinals_T.device, (ordinals_T, draws), implementation)
    return way.implementation.run.uniform_integers(  # type: ignore[no-any-return]
        key, ordinals_T, positions_T, draws, high, dtype
    )


def uniform_floats(
    key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int, *, implementation: str = "auto"
) -> Tensor:
    """Uniform float32 in [0, 1) on a grid of 2^-24; counters as in ``uniform_integers``. Returns (T, draws)."""
    _check(key, ordinals_T, positions_T, draws)
    way = choose("uniform_floats", IMPLEMENTATIONS, ordinals_T.device, (ordinals_T, draws), implementation)
    return way.implementation.run.uniform_floats(  # type: ignore[no-any-return]
        key, ordinals_T, positions_T, draws
    )


def truncated_normal_rows(
    key: int,
    rows: Tensor | range,
    width: int,
    std: float,
    cut: float = 2.0,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Rows of a table initialised from N(0, std^2) cut at ``+-cut * std``.

    rows: (n,) integers or a range: which rows. The value at (row, column) depends on (key, row, column) alone,
    so that a sharded table starts as a local one does. The inverse CDF, ``std * sqrt(2) * erfinv(u * erf(cut /
    sqrt(2)))`` for u uniform in (-1, 1), is taken in float64 and rounded.

    Returns (n, width) float32 on the device of rows (CPU for a range). Raises ValueError for a negative width
    or std, or a cut that is not positive.
    """
    if width < 0 or std < 0 or not cut > 0:
        raise ValueError(f"need width >= 0, std >= 0 and cut > 0, got width={width}, std={std}, cut={cut}")
    if isinstance(rows, range):
        rows = torch.arange(rows.start, rows.stop, rows.step, dtype=torch.int64)
    if rows.dim() != 1:
        raise ValueError(f"rows must be a vector, not of shape {tuple(rows.shape)}")
    _check_key(key)
    way = choose("truncated_normal_rows", IMPLEMENTATIONS, rows.device, (rows, width), implementation)
    out = torch.empty(rows.shape[0], width, dtype=torch.float32, device=rows.device)
    block = max(1, _ROW_BLOCK_VALUES // max(1, width))
    for start in range(0, rows.shape[0], block):
        uniforms = way.implementation.run.row_uniforms(key, rows[start : start + block], width)
        out[start : start + block] = reference.truncated_normal(uniforms, std, cut)
    return out
