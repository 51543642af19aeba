"""Whether rows lie in the table.

Shapes: T queries, K candidates of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(rows: Tensor, catalogue: int, what: str = "candidate") -> None:
    """IndexError for the first row outside [0, catalogue). On an accelerator this would wait for it: skipped."""
    if rows.device.type != "cpu" or rows.numel() == 0:
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
