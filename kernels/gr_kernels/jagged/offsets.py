"""Where the sequences of a jagged tensor lie: what offsets must satisfy, and which row is whose.

B sequences, T rows. Sequence b is rows offsets[b] to offsets[b + 1]; there may be rows that no sequence has, before the
first and after the last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.tracing import values_are_at_hand


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
    if not values_are_at_hand(offsets_B1):
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


def covers_all_rows(offsets_B1: Tensor, rows: int) -> bool:
    """Whether every row is known to be in a sequence: CPU offsets are looked at, others and traced ones can't be."""
    if not values_are_at_hand(offsets_B1):
        return False
    return int(offsets_B1[0]) == 0 and int(offsets_B1[-1]) == rows


def places_in_cover(offsets_B1: Tensor, rows: int) -> Tensor:
    """(T,) int64: each row's place in its sequence, from 0, where every row has a sequence."""
    start_T = torch.repeat_interleave(offsets_B1[:-1], offsets_B1.diff(), output_size=rows)
    return torch.arange(rows, device=offsets_B1.device).sub_(start_T)


def places_of_rows(offsets_B1: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of ``rows`` rows: its sequence, its place in it from 0, and whether it has one. int64, int64, bool.

    The sequence and place of a row outside every sequence are some valid numbers without meaning.
    """
    sequences = offsets_B1.shape[0] - 1
    # the rows before and after all sequences are stretches of their own: with them every row is in one
    edges = F.pad(F.pad(offsets_B1, (1, 0)), (0, 1), value=rows)
    stretch = torch.arange(sequences + 2, device=offsets_B1.device)
    stretch_T = torch.repeat_interleave(stretch, edges.diff(), output_size=rows)
    inside_T = (stretch_T > 0) & (stretch_T <= sequences)
    return (stretch_T - 1).clamp_(0, max(sequences - 1, 0)), places_in_cover(edges, rows), inside_T


def take_rows(x: Tensor, index: Tensor, inside: Tensor, fill: float = 0.0) -> Tensor:
    """Rows ``index`` of x (any shape of index), and ``fill`` where not ``inside`` (there the index is not read).

    Differentiable in x.
    """
    if x.shape[0] == 0:
        return x.new_full((*index.shape, *x.shape[1:]), fill)
    rows = x.index_select(0, torch.where(inside, index, 0).flatten()).view(*index.shape, *x.shape[1:])
    outside = ~inside.view(*inside.shape, *(1 for _ in range(x.dim() - 1)))
    return rows.masked_fill(outside, fill)
