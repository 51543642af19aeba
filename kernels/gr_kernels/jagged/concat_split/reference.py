"""Concatenation and split of jagged tensors in plain PyTorch: any device, any dtype.

Part p has sequence b in rows offsets[p][b] to offsets[p][b + 1]; the joined tensor's offsets are the sum of the parts'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gr_kernels.jagged.offsets import places_of_rows, take_rows


def joined_offsets(offsets: Sequence[Tensor]) -> Tensor:
    """(B + 1,) int64: the offsets of the joined tensor."""
    total = offsets[0]
    for more in offsets[1:]:
        total = total + more
    return total


def concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> Tensor:
    """The parts of sequence 0, then those of sequence 1, ...; rows of no sequence are zero."""
    rows = sum(part.shape[0] for part in parts)
    sequence_T, place_T, inside_T = places_of_rows(joined_offsets(offsets), rows)
    everything = torch.cat(list(parts))
    source_T = torch.zeros_like(place_T)
    first_row = 0  # of this part in `everything`
    for part, offsets_B1 in zip(parts, offsets):
        begin_T, end_T = (
            offsets_B1[sequence_T],
            offsets_B1[(sequence_T + 1).clamp(max=offsets_B1.shape[0] - 1)],
        )
        here_T = (place_T >= 0) & (place_T < end_T - begin_T)
        source_T = torch.where(here_T, first_row + begin_T + place_T, source_T)
        place_T = place_T - (end_T - begin_T)  # in the parts that follow
        first_row += part.shape[0]
    return take_rows(everything, source_T, inside_T)


def split(joined: Tensor, offsets: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """The inverse of concat: part p with ``rows[p]`` rows, those of no sequence zero."""
    start_B1 = joined_offsets(offsets)  # of each sequence's next part in the joined tensor
    parts = []
    for offsets_B1, count in zip(offsets, rows):
        sequence_T, place_T, inside_T = places_of_rows(offsets_B1, count)
        parts.append(take_rows(joined, start_B1[sequence_T] + place_T, inside_T))
        start_B1 = torch.cat([start_B1[:-1] + offsets_B1.diff(), start_B1[-1:]])
    return parts
