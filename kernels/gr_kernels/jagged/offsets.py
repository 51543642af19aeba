"""Where the sequences of a jagged tensor lie: what offsets must satisfy, and which row is whose.

B sequences, T rows. Sequence b is rows offsets[b] to offsets[b + 1]; there may be rows that no sequence has, before the
first and after the last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_offsets(
    operator: str, offsets_B1: Tensor, rows: int, device: torch.device, max_length: int | None = None
) -> None:
    """ValueError, in one sentence, for offsets that don't describe sequences among ``rows`` rows.

    Their values are looked at on CPU only: reading them on a device would wait for it, and in a traced graph there
    are none.
    """
    if offsets_B1.dim() != 1 or offsets_B1.dtype != torch.int64 or offsets_B1.shape[0] < 1:
        raise ValueError(
            f"{operator}: offsets must be (B + 1,) int64, not {tuple(offsets_B1.shape)} {offsets_B1.dtype}."
        )
    if offsets_B1.device != device:
        raise ValueError(
            f"{operator}: the offsets are on {offsets_B1.device}, the rows on {device}: move one."
        )
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths_B = offsets_B1.diff()
    first, last = int(offsets_B1[0]), int(offsets_B1[-1])
    if first < 0 or last > rows:
        raise ValueError(f"{operator}: offsets go from {first} to {last}, outside the {rows} rows.")
    if lengths_B.numel() == 0:
        return
    shortest, longest = int(lengths_B.min()), int(lengths_B.max())
    if shortest < 0:
        raise ValueError(f"{operator}: offsets must not fall, as after sequence {int(lengths_B.argmin())}.")
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"{operator}: sequence {int(lengths_B.argmax())} has {longest} rows, more than max_length {max_length}."
        )


def places_of_rows(offsets_B1: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of ``rows`` rows: its sequence, its place in it from 0, and whether it has one. int64, int64, bool.

    The sequence and place of a row outside every sequence are some valid numbers without meaning.
    """
    row_T = torch.arange(rows, device=offsets_B1.device)
    sequence_T = torch.searchsorted(offsets_B1, row_T, right=True) - 1
    inside_T = (row_T >= offsets_B1[0]) & (row_T < offsets_B1[-1])
    sequence_T = sequence_T.clamp(0, max(offsets_B1.shape[0] - 2, 0))
    return sequence_T, row_T - offsets_B1[sequence_T], inside_T


def take_rows(x: Tensor, index: Tensor, inside: Tensor, fill: float = 0.0) -> Tensor:
    """Rows ``index`` of x (any shape of index), and ``fill`` where not ``inside`` (there the index is not read).

    Differentiable in x.
    """
    if x.shape[0] == 0:
        return x.new_full((*index.shape, *x.shape[1:]), fill)
    rows = x.index_select(0, torch.where(inside, index, 0).flatten()).view(*index.shape, *x.shape[1:])
    outside = ~inside.view(*inside.shape, *(1 for _ in range(x.dim() - 1)))
    return rows.masked_fill(outside, fill)
