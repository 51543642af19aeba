"""A jagged tensor taken apart: checks a call, picks an implementation, runs it.

B sequences, T rows (sum of lengths).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.dispatch import Choice, choose
from gr_kernels.jagged.concat_split.implementations import IMPLEMENTATIONS
from gr_kernels.jagged.offsets import check_offsets

_NAME = "split_jagged"


def split_jagged(
    joined: Tensor,
    offsets_B1: Tensor,
    tail_lengths_B: Tensor,
    *,
    tail_rows: int,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cuts the last rows off every sequence: the inverse of ``concat_jagged`` for two parts.

    Args:
        joined: (T, ...) of any dtype.
        offsets_B1: (B + 1,) int64, ascending: sequence b is rows offsets[b] to offsets[b + 1].
        tail_lengths_B: (B,) int64 or int32: how many of its last rows each sequence loses to the tail.
        tail_rows: their sum, which the host must know: it is the size of a result.
        implementation: "auto", or "cuda", "triton", "cpp", "reference".

    Returns:
        head (T - tail_rows, ...), its (B + 1,) offsets, tail (tail_rows, ...), its (B + 1,) offsets. Rows that belong
        to no sequence are zero. Differentiable in ``joined``.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run. (The
            values of offsets and lengths on a device are trusted: looking at them would wait for it.)
    """
    choice = _choose(joined, offsets_B1, tail_lengths_B, tail_rows, implementation)
    tail_offsets_B1 = torch.nn.functional.pad(tail_lengths_B.to(torch.int64).cumsum(0), (1, 0))
    head_offsets_B1 = offsets_B1 - tail_offsets_B1
    rows = (joined.shape[0] - tail_rows, tail_rows)
    head, tail = choice.implementation.run.split(joined, (head_offsets_B1, tail_offsets_B1), rows)
    return head, head_offsets_B1, tail, tail_offsets_B1


def _choose(joined: Tensor, offsets_B1: Tensor, tail_lengths_B: Tensor, tail_rows: int, name: str) -> Choice:
    if joined.dim() < 1:
        raise ValueError(f"{_NAME}: the joined tensor must have rows; this one is a single number.")
    check_offsets(_NAME, offsets_B1, joined.shape[0], joined.device)
    sequences = offsets_B1.shape[0] - 1
    if tail_lengths_B.shape != (sequences,) or tail_lengths_B.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{_NAME}: tail_lengths must be ({sequences},) int64 or int32, one a sequence, not "
            f"{tuple(tail_lengths_B.shape)} {tail_lengths_B.dtype}."
        )
    if tail_lengths_B.device != joined.device:
        raise ValueError(
            f"{_NAME}: tail_lengths are on {tail_lengths_B.device}, the rows on {joined.device}: move one."
        )
    if not 0 <= tail_rows <= joined.shape[0]:
        raise ValueError(
            f"{_NAME}: tail_rows must lie between 0 and the {joined.shape[0]} rows, not at {tail_rows}."
        )
    if joined.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_tails(offsets_B1, tail_lengths_B, tail_rows)
    return choose(_NAME, IMPLEMENTATIONS, joined.device, (joined, 2), name)


def _check_tails(offsets_B1: Tensor, tail_lengths_B: Tensor, tail_rows: int) -> None:
    if int(tail_lengths_B.sum()) != tail_rows:
        raise ValueError(
            f"{_NAME}: tail_rows is {tail_rows}, but the tail_lengths add to {int(tail_lengths_B.sum())}."
        )
    wrong_B = (tail_lengths_B < 0) | (tail_lengths_B > offsets_B1.diff())
    if bool(wrong_B.any()):
        b = int(wrong_B.to(torch.int8).argmax())
        raise ValueError(
            f"{_NAME}: sequence {b} has {int(offsets_B1.diff()[b])} rows, of which a tail of {int(tail_lengths_B[b])} "
            "can't be cut."
        )
