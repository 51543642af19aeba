"""What one call of the attention is asked to compute, apart from q, k and v.

B sequences, T rows in the batch (sum of lengths), H heads, P entries of the position table.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["silu", "softmax"]
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a row sees: with `causal` its own and earlier ones, else every key of its sequence."""

    causal: bool = True


@functools.cache
def _thresholds(kind: str, count: int, width: float) -> tuple[int, ...]:
    exact = Context(prec=60)
    step = Decimal(repr(width))  # 0.301 means the decimal number, not the nearest binary one
    limit = Decimal(INT64_MAX)
    thresholds = []
    for bucket in range(1, count):
        edge = exact.multiply(step, Decimal(bucket))
        if kind == "log":
            edge = exact.exp(edge) if edge < 44 else limit  # e^44 > 2^63
        else:
            edge = exact.multiply(edge, edge)
        thresholds.append(int(min(edge, limit).to_integral_value(rounding=ROUND_CEILING)))
    return tuple(thresholds)


@dataclass(frozen=True)
class TimeBuckets:
    """Maps a time difference |dt| (an integer, in the unit of the timestamps) to one of `count` buckets.

    kind "log":  floor(ln(max(|dt|, 1)) / width), the HSTU paper's bucket (0.301 in its published configurations);
    kind "sqrt": floor(sqrt(|dt|) / width); both clipped to [0, count - 1].

    Buckets are found by comparing with integer thresholds, so every implementation agrees on every |dt| < 2^63,
    free of the rounding of a floating-point logarithm.
    """

    kind: Literal["log", "sqrt"] = "log"
    count: int = 129
    width: float = 0.301

    def __post_init__(self) -> None:
        if self.kind not in ("log", "sqrt"):
            raise ValueError(f"TimeBuckets.kind is 'log' or 'sqrt', not {self.kind!r}.")
        if not 1 <= self.count <= 65536:
            raise ValueError(f"TimeBuckets.count must be between 1 and 65536, not {self.count}.")
        if not (self.width > 0 and math.isfinite(self.width)):
            raise ValueError(f"TimeBuckets.width must be a positive number, not {self.width}.")

    def thresholds(self) -> Tensor:
        """(count - 1,) int64, ascending: |dt| is in bucket #{b : |dt| >= thresholds[b]}."""
        return torch.tensor(_thresholds(self.kind, self.count, self.width), dtype=torch.int64)

    def bucket(self, dt: Tensor) -> Tensor:
        """Bucket of every time difference: int64 of any shape in, int64 of the same shape out."""
        return torch.bucketize(dt.abs(), self.thresholds().to(dt.device), right=True)


@dataclass(frozen=True)
class RelativeBias:
    """The bias added to the scaled score of query row i and key j of a sequence, the same for every head.

    position:    (P,) float32; entry i - j is added (causal attention only); P must reach the longest sequence.
    time:        (buckets.count,) float32; the entry of the bucket of |query_times[i] - key_times[j]| is added.
    query_times: (T,) int64; HSTU uses the time of the action to be predicted, t_{i+1}, for row i.
    key_times:   (T,) int64.
    Either table may be None; a time table comes with both times.
    """

    position: Tensor | None = None
    time: Tensor | None = None
    query_times: Tensor | None = None
    key_times: Tensor | None = None
    buckets: TimeBuckets = field(default_factory=TimeBuckets)


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """What an implementation needs beside q, k and v; the fields are hstu_attention()'s arguments."""

    offsets: Tensor  # (B + 1,) int64
    max_length: int
    divisor: float
    scale: float = 1.0
    activation: Activation = "silu"
    mask: AttentionMask = AttentionMask()
    bias: RelativeBias = field(default_factory=RelativeBias)
    dropout: float = 0.0
    dropout_key: int = 0

    @property
    def drop_below(self) -> int:
        """A weight is kept when its 32-bit random word is at least this."""
        return math.ceil(self.dropout * 2**32)

    @property
    def keep_scale(self) -> float:
        """What a kept weight is multiplied by."""
        return 1.0 / (1.0 - self.dropout)
