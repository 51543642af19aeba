"""Queries against rows of a table: what all operators over them check, and the chunks they work in.

Shapes: T queries, K candidates of a query, I rows of the table, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.tracing import values_are_at_hand

ROW_NUMBERS = (torch.int64, torch.int32)


def check_inputs(queries_TD: Tensor, table_ID: Tensor, normalize_eps: float | None) -> None:
    """ValueError or TypeError, in one sentence, for queries and a table that don't fit, or an eps that isn't one."""
    if queries_TD.dim() != 2 or table_ID.dim() != 2 or queries_TD.shape[1] != table_ID.shape[1]:
        raise ValueError(
            "queries must be (T, D) and the table (I, D) with the same D, not "
            f"{tuple(queries_TD.shape)} and {tuple(table_ID.shape)}"
        )
    if queries_TD.dtype != table_ID.dtype or not queries_TD.dtype.is_floating_point:
        raise TypeError(
            f"queries and table must share a float dtype, not {queries_TD.dtype} and {table_ID.dtype}"
        )
    if queries_TD.device != table_ID.device:
        raise ValueError(f"queries are on {queries_TD.device}, the table on {table_ID.device}: move one")
    if normalize_eps is not None and not normalize_eps > 0:
        raise ValueError(
            f"normalize_eps must be positive (or None for plain inner products), got {normalize_eps}"
        )


def check_kind(rows: Tensor, what: str) -> None:
    """TypeError for rows that aren't numbers of rows."""
    if rows.dtype not in ROW_NUMBERS:
        raise TypeError(f"{what} must be int64 or int32, not {rows.dtype}")


def check_range(rows: Tensor, catalogue: int, what: str) -> None:
    """IndexError for the first row outside [0, catalogue), where ``values_are_at_hand``."""
    if not values_are_at_hand(rows) or rows.numel() == 0:
        return
    low, high = torch.aminmax(rows)
    if low >= 0 and high < catalogue:
        return
    first = int(((rows < 0) | (rows >= catalogue)).flatten().nonzero()[0])
    where = (
        f"{what} {first}"
        if rows.dim() == 1
        else f"query {first // rows.shape[1]}, {what} {first % rows.shape[1]}"
    )
    raise IndexError(
        f"{what} row {int(rows.flatten()[first])} ({where}) is outside the table of {catalogue} rows: "
        f"rows must lie in [0, {catalogue})"
    )


def chunks(count: int, each: int, most: int) -> list[slice]:
    """Stretches of ``count`` queries, each of which needs ``each`` numbers, that need ``most`` at most together.

    A query that alone needs more is a chunk of its own.
    """
    step = max(1, most // max(1, each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
