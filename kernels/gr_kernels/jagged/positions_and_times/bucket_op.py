"""The buckets of time differences as one operator: a graph then holds the call, and not how thresholds are computed."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from gr_kernels.hstu_attention.buckets import TimeBuckets


def bucket(differences_T: Tensor, buckets: TimeBuckets) -> Tensor:
    """(T,) int64: the bucket of each |dt|. Needs ``register`` before."""
    return torch.ops.gr_kernels.time_buckets(  # type: ignore[no-any-return]
        differences_T, buckets.kind, buckets.count, buckets.width
    )


@functools.cache
def register() -> None:
    """Defines the operator, once, on first use."""

    def run(differences: Tensor, kind: Literal["log", "sqrt"], count: int, width: float) -> Tensor:
        return TimeBuckets(kind, count, width).bucket(differences)

    operator = torch.library.custom_op(
        "gr_kernels::time_buckets",
        run,
        mutates_args=(),
        schema="(Tensor differences, str kind, int count, float width) -> Tensor",
    )
    operator.register_fake(lambda differences, kind, count, width: torch.empty_like(differences))
