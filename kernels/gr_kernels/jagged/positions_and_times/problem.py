"""What one call of add_positions_and_times is asked to compute, apart from x."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gr_kernels.hstu_attention.buckets import TimeBuckets

CountFrom = Literal["front", "back"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The fields are add_positions_and_times()'s arguments."""

    offsets: Tensor  # (B + 1,) int64
    max_length: int
    scale: float = 1.0
    position: Tensor | None = None  # (P, D)
    time: Tensor | None = None  # (buckets.count, D)
    time_differences: Tensor | None = None  # (T,) int64
    buckets: TimeBuckets = field(default_factory=TimeBuckets)
    targets: Tensor | None = None  # (B,) int64 or int32
    count_from: CountFrom = "front"
