"""The buckets of time differences as one operator: a graph then holds the call, and not how thresholds are computed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gr_kernels.hstu_attention.buckets import TimeBuckets
from gr_kernels.operators import define
from gr_kernels.tracing import once


def bucket(differences_T: Tensor, buckets: TimeBuckets) -> Tensor:
    """(T,) int64: the bucket of each |dt|. Needs ``register`` before."""
    return torch.ops.gr_kernels.time_buckets(  # type: ignore[no-any-return]
        differences_T, buckets.kind, buckets.count, buckets.width
    )


def _run(differences: Tensor, kind: Literal["log", "sqrt"], count: int, width: float) -> Tensor:
    return TimeBuckets(kind, count, width).bucket(differences)


def _fake(differences: Tensor, kind: str, count: int, width: float) -> Tensor:
    return torch.empty_like(differences)


@once
def register() -> None:
    define("time_buckets", "(Tensor differences, str kind, int count, float width) -> Tensor", _run, _fake)
