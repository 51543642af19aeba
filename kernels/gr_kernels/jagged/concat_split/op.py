"""Jagged tensors put together and taken apart: checks a call, picks an implementation, runs it.

B sequences, T rows (sum of lengths).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gr_kernels.dispatch import Choice, Implementation, choose, takes_all
from gr_kernels.jagged.concat_split import cpp, reference, triton_op
from gr_kernels.jagged.offsets import check_offsets
from gr_kernels.tracing import values_are_at_hand

_CONCAT, _SPLIT = "concat_jagged", "split_jagged"


@dataclass(frozen=True)
class Way:
    """The two operators of one implementation."""

    concat: Any
    split: Any


# `obstacle` is given one of the tensors and the number of parts; `run` is a Way.
IMPLEMENTATIONS = (
    Implementation(
        "cuda",
        cpp.cuda_obstacle,
        Way(cpp.concat, cpp.split),
        "one compiled pass",
        device="cuda",
        register=cpp.register,
    ),
    Implementation(
        "triton",
        triton_op.obstacle,
        Way(triton_op.concat, triton_op.split),
        "a pass a part",
        device="cuda",
        register=triton_op.register,
    ),
    Implementation(
        "cpp",
        cpp.cpp_obstacle,
        Way(cpp.concat, cpp.split),
        "compiled, on every thread",
        device="cpu",
        register=cpp.register,
    ),
    Implementation(
        "reference", takes_all, Way(reference.concat, reference.split), "plain PyTorch, any device"
    ),
)


def concat_jagged(
    parts: Sequence[Tensor], offsets: Sequence[Tensor], *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The sequences of several jagged tensors end to end: a history and the candidates to score after it, say.

    Args:
        parts: one or more (T_p, ...) tensors of any dtype, which differ in their number of rows only.
        offsets: for each part (B + 1,) int64, ascending: its sequence b is its rows offsets[b] to offsets[b + 1].
        implementation: "auto", or "cuda", "triton", "cpp", "reference".

    Returns:
        (sum of T_p, ...): the rows of sequence 0 of part 0, of part 1, ..., then those of sequence 1, and so on; and
        the (B + 1,) int64 offsets, the sum of the parts' offsets. Rows that belong to no sequence are zero.
        Differentiable in the parts.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run. (The
            values of offsets on a device are trusted: looking at them would wait for it.)
    """
    choice = _choose_concat(parts, offsets, implementation)
    edges = [offsets_B1.contiguous() for offsets_B1 in offsets]
    return choice.implementation.run.concat(parts, edges), reference.joined_offsets(edges)


def _choose_concat(parts: Sequence[Tensor], offsets: Sequence[Tensor], name: str) -> Choice:
    if len(parts) == 0 or len(parts) != len(offsets):
        raise ValueError(
            f"{_CONCAT}: {len(parts)} parts come with {len(offsets)} offsets; each needs its own."
        )
    _check_same_rows(parts)
    first = parts[0]
    for part, offsets_B1 in zip(parts, offsets):
        check_offsets(_CONCAT, offsets_B1, part.shape[0], first.device)
        if offsets_B1.shape != offsets[0].shape:
            raise ValueError(
                f"{_CONCAT}: the parts have {offsets[0].shape[0] - 1} and {offsets_B1.shape[0] - 1} sequences; "
                "they must be of the same batch."
            )
    return choose(_CONCAT, IMPLEMENTATIONS, first.device, (first, len(parts)), name)


def _check_same_rows(tensors: Sequence[Tensor]) -> None:
    """ValueError unless the tensors' rows are alike: shape, dtype, device."""
    first = tensors[0]
    for number, tensor in enumerate(tensors):
        if tensor.dim() < 1 or tensor.shape[1:] != first.shape[1:] or tensor.dtype != first.dtype:
            raise ValueError(
                f"{_CONCAT}: part {number} is {tuple(tensor.shape)} {tensor.dtype}, which doesn't fit part 0's "
                f"{tuple(first.shape)} {first.dtype}: only the number of rows may differ."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{_CONCAT}: part {number} is on {tensor.device}, part 0 on {first.device}: move one."
            )


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
    choice = _choose_split(joined, offsets_B1, tail_lengths_B, tail_rows, implementation)
    tail_offsets_B1 = torch.nn.functional.pad(tail_lengths_B.to(torch.int64).cumsum(0), (1, 0))
    head_offsets_B1 = offsets_B1 - tail_offsets_B1
    rows = (joined.shape[0] - tail_rows, tail_rows)
    head, tail = choice.implementation.run.split(joined, (head_offsets_B1, tail_offsets_B1), rows)
    return head, head_offsets_B1, tail, tail_offsets_B1


def _choose_split(
    joined: Tensor, offsets_B1: Tensor, tail_lengths_B: Tensor, tail_rows: int, name: str
) -> Choice:
    if joined.dim() < 1:
        raise ValueError(f"{_SPLIT}: the joined tensor must have rows; this one is a single number.")
    check_offsets(_SPLIT, offsets_B1, joined.shape[0], joined.device)
    sequences = offsets_B1.shape[0] - 1
    if tail_lengths_B.shape != (sequences,) or tail_lengths_B.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{_SPLIT}: tail_lengths must be ({sequences},) int64 or int32, one a sequence, not "
            f"{tuple(tail_lengths_B.shape)} {tail_lengths_B.dtype}."
        )
    if tail_lengths_B.device != joined.device:
        raise ValueError(
            f"{_SPLIT}: tail_lengths are on {tail_lengths_B.device}, the rows on {joined.device}: move one."
        )
    if not 0 <= tail_rows <= joined.shape[0]:
        raise ValueError(
            f"{_SPLIT}: tail_rows must lie between 0 and the {joined.shape[0]} rows, not at {tail_rows}."
        )
    if values_are_at_hand(joined):
        _check_tails(offsets_B1, tail_lengths_B, tail_rows)
    return choose(_SPLIT, IMPLEMENTATIONS, joined.device, (joined, 2), name)


def _check_tails(offsets_B1: Tensor, tail_lengths_B: Tensor, tail_rows: int) -> None:
    if int(tail_lengths_B.sum()) != tail_rows:
        raise ValueError(
            f"{_SPLIT}: tail_rows is {tail_rows}, but the tail_lengths add to {int(tail_lengths_B.sum())}."
        )
    wrong_B = (tail_lengths_B < 0) | (tail_lengths_B > offsets_B1.diff())
    if bool(wrong_B.any()):
        b = int(wrong_B.to(torch.int8).argmax())
        raise ValueError(
            f"{_SPLIT}: sequence {b} has {int(offsets_B1.diff()[b])} rows, of which a tail of {int(tail_lengths_B[b])} "
            "can't be cut."
        )
