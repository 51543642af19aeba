"""Jagged to padded and back: checks a call, picks an implementation, runs it.

B sequences, T rows (sum of lengths), N places of the padded tensor.
"""

from __future__ import annotations

from torch import Tensor

from gr_kernels.dispatch import Choice, Implementation, choose, takes_all
from gr_kernels.jagged.dense import reference, triton_op
from gr_kernels.jagged.offsets import check_offsets

_TO_DENSE, _TO_JAGGED = "jagged_to_dense", "dense_to_jagged"


# `obstacle` is given the tensor that is moved.
TO_DENSE, TO_JAGGED = (
    (
        Implementation(
            "triton", triton_op.obstacle, of_triton, "one pass", device="cuda", register=triton_op.register
        ),
        Implementation("reference", takes_all, of_reference, "plain PyTorch, any device"),
    )
    for of_triton, of_reference in (
        (triton_op.to_dense, reference.to_dense),
        (triton_op.to_jagged, reference.to_jagged),
    )
)


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
    choice = _choose_dense(x, offsets_B1, max_length, implementation)
    return choice.implementation.run(x, offsets_B1, max_length, fill)  # type: ignore[no-any-return]


def _choose_dense(x: Tensor, offsets_B1: Tensor, max_length: int, name: str) -> Choice:
    if x.dim() < 1:
        raise ValueError(f"{_TO_DENSE}: x must have rows; this one is a single number.")
    if max_length < 0:
        raise ValueError(f"{_TO_DENSE}: max_length must be at least 0, not {max_length}.")
    check_offsets(_TO_DENSE, offsets_B1, x.shape[0], x.device, max_length)
    return choose(_TO_DENSE, TO_DENSE, x.device, (x,), name)


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
    choice = _choose_jagged(dense, offsets_B1, rows, implementation)
    return choice.implementation.run(dense, offsets_B1, rows)  # type: ignore[no-any-return]


def _choose_jagged(dense: Tensor, offsets_B1: Tensor, rows: int, name: str) -> Choice:
    if dense.dim() < 2 or dense.shape[0] != offsets_B1.shape[0] - 1:
        raise ValueError(
            f"{_TO_JAGGED}: dense must be (B, N, ...) with the B = {offsets_B1.shape[0] - 1} sequences of the offsets, "
            f"not {tuple(dense.shape)}."
        )
    if rows < 0:
        raise ValueError(f"{_TO_JAGGED}: rows must be at least 0, not {rows}.")
    check_offsets(_TO_JAGGED, offsets_B1, rows, dense.device, dense.shape[1])
    return choose(_TO_JAGGED, TO_JAGGED, dense.device, (dense,), name)
