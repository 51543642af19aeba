"""Counter-based random numbers: every value is a pure function of (key, its own coordinates).

Shapes: T positions in a batch. No state, no order: any split of a batch, any number of ranks or threads and
any device give the same integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.counter_random import reference

_ROW_BLOCK_VALUES = 1 << 20  # float64 values in flight while a long range of rows is drawn


def _choose(implementation: str, *tensors: Tensor) -> str:
    if implementation not in ("auto", "reference", "cpp"):
        raise ValueError(f"implementation must be 'auto', 'reference' or 'cpp', not {implementation!r}")
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    if implementation == "auto":
        return "cpp" if on_cpu and native.available() else "reference"
    if implementation == "cpp" and not on_cpu:
        raise ValueError("counter_random: implementation 'cpp' takes CPU tensors; use 'auto' or 'reference'")
    if implementation == "cpp" and not native.available():
        raise RuntimeError(f"counter_random: implementation 'cpp' is missing: {native.why_unavailable()}")
    return implementation


def _signed(key: int) -> int:
    """The int64 with the bits of a 64-bit key: what a C++ operator accepts."""
    if not 0 <= key < 1 << 64:
        raise ValueError(f"a key is an integer in [0, 2^64), not {key}: make it with derive_key")
    return key - (1 << 64) if key >= 1 << 63 else key


def _check_counters(ordinals_T: Tensor, positions_T: Tensor, draws: int) -> None:
    if ordinals_T.dim() != 1 or ordinals_T.shape != positions_T.shape:
        raise ValueError(
            "ordinals and positions must be vectors of one length, not "
            f"{tuple(ordinals_T.shape)} and {tuple(positions_T.shape)}"
        )
    if draws < 0:
        raise ValueError(f"draws must not be negative, got {draws}")


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

    Returns (T, draws). Raises ValueError for a high, dtype, shape or implementation outside the above.
    """
    _check_counters(ordinals_T, positions_T, draws)
    limits = {torch.int64: 1 << 32, torch.int32: 1 << 31}
    if dtype not in limits:
        raise ValueError(f"uniform_integers gives torch.int64 or torch.int32, not {dtype}")
    if not 1 <= high <= limits[dtype]:
        raise ValueError(f"high must lie in [1, {limits[dtype]}] for {dtype}, got {high}")
    signed = _signed(key)
    if _choose(implementation, ordinals_T, positions_T) == "reference":
        return reference.uniform_integers(key, ordinals_T, positions_T, draws, high).to(dtype)
    return torch.ops.gr_kernels.counter_integers(
        signed, ordinals_T.long(), positions_T.long(), draws, high, dtype == torch.int32
    )


def uniform_floats(
    key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int, *, implementation: str = "auto"
) -> Tensor:
    """Uniform float32 in [0, 1) on a grid of 2^-24; counters as in ``uniform_integers``. Returns (T, draws)."""
    _check_counters(ordinals_T, positions_T, draws)
    signed = _signed(key)
    if _choose(implementation, ordinals_T, positions_T) == "reference":
        return reference.uniform_floats(key, ordinals_T, positions_T, draws)
    return torch.ops.gr_kernels.counter_floats(signed, ordinals_T.long(), positions_T.long(), draws)


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
    signed = _signed(key)
    native_words = _choose(implementation, rows) == "cpp"
    rows = rows.long()
    out = torch.empty(rows.shape[0], width, dtype=torch.float32, device=rows.device)
    block = max(1, _ROW_BLOCK_VALUES // max(1, width))
    for start in range(0, rows.shape[0], block):
        some = rows[start : start + block]
        if native_words:
            uniforms = torch.ops.gr_kernels.counter_row_uniforms(signed, some, width)
        else:
            uniforms = reference.row_uniforms(key, some, width)
        out[start : start + block] = reference.truncated_normal(uniforms, std, cut)
    return out
