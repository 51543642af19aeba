"""Jagged to padded: checks a call, picks an implementation, runs it.

B sequences, T rows (sum of lengths), N places of the padded tensor.
"""

from __future__ import annotations

from torch import Tensor

from gr_kernels.dispatch import Choice, choose
from gr_kernels.jagged.dense.implementations import TO_DENSE
from gr_kernels.jagged.offsets import check_offsets

_NAME = "jagged_to_dense"


def jagged_to_dense(
    x: Tensor, offsets_B1: Tensor, *, max_length: int, fill: float = 0.0, implementation: str = "auto"
) -> Tensor:
    """A jagged tensor (rows of vectors, scores, ids) as a padded one.

    Args:
        x: (T, ...) of any dtype.
        offsets_B1: (B + 1,) int64, ascending: sequence b is rows offsets[b] to offsets[b + 1].
        max_length: N, which no sequence exceeds.
        fill: what the places after a sequence's end hold, -inf for scores, say; a number that x's dtype has.
        implementation: "auto", or "triton", "reference".

    Returns:
        (B, N, ...), contiguous. Differentiable in x; rows of no sequence get zero gradients.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run. (The
            values of offsets on a device are trusted; there, rows past max_length would be left out.)
    """
    choice = _choose(x, offsets_B1, max_length, implementation)
    return choice.implementation.run(x, offsets_B1, max_length, fill)  # type: ignore[no-any-return]


def _choose(x: Tensor, offsets_B1: Tensor, max_length: int, name: str) -> Choice:
    if x.dim() < 1:
        raise ValueError(f"{_NAME}: x must have rows; this one is a single number.")
    if max_length < 0:
        raise ValueError(f"{_NAME}: max_length must be at least 0, not {max_length}.")
    check_offsets(_NAME, offsets_B1, x.shape[0], x.device, max_length)
    return choose(_NAME, TO_DENSE, x.device, (x,), name)
