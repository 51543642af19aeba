"""Padded to jagged: checks a call, picks an implementation, runs it.

B sequences, T rows (sum of lengths), N places of the padded tensor.
"""

from __future__ import annotations

from torch import Tensor

from gr_kernels.dispatch import Choice, choose
from gr_kernels.jagged.dense.implementations import TO_JAGGED
from gr_kernels.jagged.offsets import check_offsets

_NAME = "dense_to_jagged"


def dense_to_jagged(dense: Tensor, offsets_B1: Tensor, *, rows: int, implementation: str = "auto") -> Tensor:
    """The rows of a padded tensor that belong to sequences, end to end: the inverse of ``jagged_to_dense``.

    Args:
        dense: (B, N, ...) of any dtype.
        offsets_B1: (B + 1,) int64, ascending: sequence b, of at most N rows, becomes rows offsets[b] to offsets[b + 1].
        rows: T, which the host must know: it is the size of the result.
        implementation: "auto", or "triton", "reference".

    Returns:
        (T, ...), contiguous; rows of no sequence are zero. Differentiable in ``dense``: padding gets zero gradients.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run. (The
            values of offsets on a device are trusted; there, rows past N would be zero.)
    """
    choice = _choose(dense, offsets_B1, rows, implementation)
    return choice.implementation.run(dense, offsets_B1, rows)  # type: ignore[no-any-return]


def _choose(dense: Tensor, offsets_B1: Tensor, rows: int, name: str) -> Choice:
    if dense.dim() < 2 or dense.shape[0] != offsets_B1.shape[0] - 1:
        raise ValueError(
            f"{_NAME}: dense must be (B, N, ...) with the B = {offsets_B1.shape[0] - 1} sequences of the offsets, not "
            f"{tuple(dense.shape)}."
        )
    if rows < 0:
        raise ValueError(f"{_NAME}: rows must be at least 0, not {rows}.")
    check_offsets(_NAME, offsets_B1, rows, dense.device, dense.shape[1])
    return choose(_NAME, TO_JAGGED, dense.device, (dense,), name)
