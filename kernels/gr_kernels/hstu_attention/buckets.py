"""Buckets of time differences: integer thresholds, and a quick way to count those below many differences."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

import torch
from torch import Tensor

from gr_kernels.tracing import on_paper_now, with_numbers

NEVER = 2**63 - 1  # the threshold of a bucket that no time difference reaches
LONGEST = NEVER - 1  # |dt| is at most this
_MANTISSA_BITS = 23  # of a float32


@dataclass(frozen=True)
class TimeBuckets:
    """Maps a time difference |dt| (an integer, in the unit of the timestamps) to one of `count` buckets.

    kind "log":  floor(ln(max(|dt|, 1)) / width), the HSTU paper's bucket (0.301 in its published configurations);
    kind "sqrt": floor(sqrt(|dt|) / width); both clipped to [0, count - 1].

    |dt| is the exact distance of any two int64 times, or the exact size of any int64 dt; what is longer than LONGEST
    counts as LONGEST. Buckets are found by comparing with integer thresholds, so all implementations agree on all of
    them, free of the rounding of a floating-point logarithm.
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
        """(count - 1,) int64, ascending: |dt| is in bucket #{b : |dt| >= thresholds[b]}. NEVER is above any |dt|."""
        return torch.tensor(_thresholds(self.kind, self.count, self.width), dtype=torch.int64)

    def last(self) -> int:
        """The bucket of LONGEST: no difference has a higher one."""
        return sum(threshold <= LONGEST for threshold in _thresholds(self.kind, self.count, self.width))

    def bucket(self, dt: Tensor) -> Tensor:
        """Bucket of every time difference: int64 of any shape in, int64 of the same shape out."""
        return self._bucket(dt.clamp(-LONGEST, LONGEST).abs_())

    def bucket_between(self, a: Tensor, b: Tensor) -> Tensor:
        """Bucket of the time difference of int64 times that broadcast: int64."""
        return self._bucket(distance(a, b))

    def _bucket(self, size: Tensor) -> Tensor:
        """Bucket of every |dt|, which is overwritten."""
        with with_numbers():  # kept from call to call
            cells = _cells(self) if size.device.type == "cpu" else None
        if cells is not None:
            return cells.bucket(size)
        with with_numbers():
            thresholds = device_thresholds(self, size.device)
        return torch.bucketize(size, thresholds, right=True)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| of int64 times that broadcast, exactly, up to LONGEST."""
    if a.device.type == "cpu" and (
        on_paper_now() or _span(a, b) <= LONGEST
    ):  # nearly always: one pass instead of five
        return (a - b).abs_()
    difference = torch.maximum(a, b) - torch.minimum(a, b)  # negative where it is 2^63 or more
    return torch.where(difference < 0, LONGEST, difference).clamp_max_(LONGEST)


def _span(a: Tensor, b: Tensor) -> int:
    """How far the earliest and the latest of all times are apart."""
    edges = [int(edge) for times in (a, b) if times.numel() for edge in times.aminmax()]
    return max(edges) - min(edges) if edges else 0


@functools.lru_cache(maxsize=64)
def device_thresholds(buckets: TimeBuckets, device: torch.device) -> Tensor:
    """``buckets.thresholds()`` on a device, copied there once. (For kernels: a traced graph would keep a constant.)"""
    return buckets.thresholds().to(device)


@functools.cache
def _thresholds(kind: str, count: int, width: float) -> tuple[int, ...]:
    exact = Context(prec=60)
    step = Decimal(repr(width))  # 0.301 means the decimal number, not the nearest binary one
    limit = Decimal(NEVER)
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
class _Cells:
    """Buckets by looking up instead of searching, several times faster than torch.bucketize on CPU.

    The leading bits of |dt| as a float32 are its cell. Rounding never changes the order of two numbers, so a threshold
    in a lower cell is below |dt| and one in a higher cell above it; where no cell has two thresholds, one comparison
    is left.
    """

    shift: int
    threshold_C: Tensor  # int64, that of the cell; 0 without
    reached_C: Tensor  # int64, thresholds that a |dt| in this cell has reached if it has reached threshold_C

    def bucket(self, size: Tensor) -> Tensor:
        size_N = size.flatten()
        cell_N = _cell(size_N, self.shift)
        # The sign bit of the difference, all over the number: -1 below the cell's threshold, 0 from there on.
        short_N = size_N.sub_(self.threshold_C.index_select(0, cell_N)).bitwise_right_shift_(63)
        return self.reached_C.index_select(0, cell_N).add_(short_N).view(size.shape)


def _cell(size: Tensor, shift: int) -> Tensor:
    return size.to(torch.float32).view(torch.int32).bitwise_right_shift_(shift)


@functools.cache
def _cells(buckets: TimeBuckets) -> _Cells | None:
    """The cells of these buckets, None where 8 bits of the mantissa don't tell their thresholds apart."""
    threshold_K = buckets.thresholds()
    threshold_K = threshold_K[threshold_K <= LONGEST]
    last = torch.tensor([LONGEST])
    for bits in range(3, 9):
        shift = _MANTISSA_BITS - bits
        cells = int(_cell(last, shift)) + 1
        # Integers up to here have a cell each: whoever is in such a threshold's cell has reached it.
        alone_K = threshold_K < 2 ** (bits + 1)
        cell_K = _cell(threshold_K, shift).long()
        compared_K = cell_K[~alone_K]
        if compared_K.unique().shape[0] < compared_K.shape[0]:
            continue
        threshold_C = torch.zeros(cells, dtype=torch.int64)
        threshold_C[compared_K] = threshold_K[~alone_K]
        return _Cells(shift, threshold_C, torch.searchsorted(cell_K, torch.arange(cells), right=True))
    return None
