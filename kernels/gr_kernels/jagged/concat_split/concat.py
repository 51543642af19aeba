"""Jagged tensors put together: checks a call, picks an implementation, runs it.

B sequences, T rows (sum of lengths).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gr_kernels.dispatch import Choice, choose
from gr_kernels.jagged.concat_split import reference
from gr_kernels.jagged.concat_split.implementations import IMPLEMENTATIONS, check_same_rows
from gr_kernels.jagged.offsets import check_offsets

_NAME = "concat_jagged"


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
    choice = _choose(parts, offsets, implementation)
    edges = [offsets_B1.contiguous() for offsets_B1 in offsets]
    return choice.implementation.run.concat(parts, edges), reference.joined_offsets(edges)


def _choose(parts: Sequence[Tensor], offsets: Sequence[Tensor], name: str) -> Choice:
    if len(parts) == 0 or len(parts) != len(offsets):
        raise ValueError(f"{_NAME}: {len(parts)} parts come with {len(offsets)} offsets; each needs its own.")
    check_same_rows(_NAME, parts)
    first = parts[0]
    for part, offsets_B1 in zip(parts, offsets):
        check_offsets(_NAME, offsets_B1, part.shape[0], first.device)
        if offsets_B1.shape != offsets[0].shape:
            raise ValueError(
                f"{_NAME}: the parts have {offsets[0].shape[0] - 1} and {offsets_B1.shape[0] - 1} sequences; "
                "they must be of the same batch."
            )
    return choose(_NAME, IMPLEMENTATIONS, first.device, (first, len(parts)), name)
