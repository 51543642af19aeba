"""x scale + position table + time table in plain PyTorch: any device and precision.

B sequences, T rows, D width, P entries of the position table.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.jagged.offsets import covers_all_rows, places_in_cover, places_of_rows
from gr_kernels.jagged.positions_and_times.bucket_op import bucket
from gr_kernels.jagged.positions_and_times.problem import CountFrom, Problem


def position_entries(
    offsets_B1: Tensor, targets_B: Tensor | None, rows: int, count_from: CountFrom
) -> tuple[Tensor, Tensor]:
    """(T,) int64, the entry of the position table of each row, 0 for rows of no sequence; (T,) bool, who has one."""
    sequence_T, place_T, inside_T = places_of_rows(offsets_B1, rows)
    if offsets_B1.shape[0] == 1:  # no sequence: nothing to ask about lengths
        return torch.zeros_like(place_T), inside_T
    if targets_B is None and count_from == "front":
        return torch.where(inside_T, place_T, 0), inside_T
    history_B = offsets_B1.diff()
    if targets_B is not None:
        history_B = history_B - targets_B
    history_T = history_B[sequence_T]
    entry_T = (
        torch.minimum(place_T, history_T) if count_from == "front" else (history_T - place_T).clamp_min(0)
    )
    return torch.where(inside_T, entry_T, 0), inside_T


def add_positions_and_times(x_TD: Tensor, problem: Problem) -> Tensor:
    """(T, D): computed in float32 at least, rounded once; zeros in rows of no sequence.

    Tables are widened before rows are taken: their gradients are sums, which wouldn't be 16 bits' to make.
    """
    rows, inside_T = x_TD.shape[0], None
    covered = covers_all_rows(problem.offsets, rows)
    if (
        covered and problem.targets is None and problem.count_from == "front"
    ):  # training on a CPU: the least work
        entry_T = places_in_cover(problem.offsets, rows)
    else:
        entry_T, inside_T = position_entries(problem.offsets, problem.targets, rows, problem.count_from)
    sum_TD = x_TD if x_TD.dtype in (torch.float32, torch.float64) else x_TD.float()
    if problem.position is None:
        sum_TD = sum_TD * problem.scale
    else:
        position_TD = F.embedding(entry_T, problem.position.to(sum_TD.dtype))
        sum_TD = torch.add(position_TD, sum_TD, alpha=problem.scale)
    if problem.time is not None:
        assert problem.time_differences is not None
        bucket_T = bucket(problem.time_differences, problem.buckets)
        sum_TD = sum_TD + F.embedding(bucket_T, problem.time.to(sum_TD.dtype))
    if inside_T is not None and not covered:
        sum_TD = sum_TD.masked_fill(~inside_T[:, None], 0.0)
    return sum_TD.to(x_TD.dtype)
