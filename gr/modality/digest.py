"""What tells contents from others: a digest of their bits, or a sketch of vectors, which rounding leaves as it is.

Shapes: I items, R of them in a stretch, E width of their vectors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gr_kernels.counter_random import derive_key, truncated_normal_rows

SUMS = 8
ROUNDING = 2.0**-10
"""Relative, what another machine may have rounded away: TF32 keeps ten bits."""
ROWS_AT_ONCE = 1 << 14


def digest(content: str | bytes) -> str:
    """32 hexadecimal digits."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_of(tensors: Mapping[str, Tensor], said: str = "") -> str:
    """32 hexadecimal digits of ``said`` and of tensors: their names, sizes, dtypes and bytes, in the order of names."""
    digest = hashlib.blake2b(said.encode(), digest_size=16)
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {list(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Sketch:
    """Of the vectors that ``file`` has for the first ``rows`` items: ``SUMS`` sums of all their numbers, each times a
    random one of its own, and the root of the sum of their squares.

    Where each number is off by a share of its size, a sum is off by about that share of ``size``: vectors that were
    encoded again are the same, and other ones of k items in n are told from them up to about n = 10^6 k.
    """

    file: str
    rows: int
    sums: list[float]
    size: float

    def differs(self, other: Sketch) -> bool:
        """Whether these are vectors of other contents."""
        apart = max(abs(one - two) for one, two in zip(self.sums, other.sums, strict=True))
        return apart > ROUNDING * max(self.size, other.size)


def sums_of(vectors_RE: Tensor, first: int) -> list[float]:
    """What a stretch of items from number ``first`` on adds to a sketch: its sums, and its squares' behind them."""
    across_ES = truncated_normal_rows(
        derive_key(0, "sketch", "columns"), range(vectors_RE.shape[1]), SUMS, 1.0
    )
    total = torch.zeros(SUMS + 1, dtype=torch.float64)
    for start in range(0, len(vectors_RE), ROWS_AT_ONCE):
        some_CE = vectors_RE[start : start + ROWS_AT_ONCE].cpu().double()
        rows = range(first + start, first + start + len(some_CE))
        down_CS = truncated_normal_rows(derive_key(0, "sketch", "rows"), rows, SUMS, 1.0)
        total[:SUMS] += (down_CS.double() * (some_CE @ across_ES.double())).sum(0)
        total[SUMS] += some_CE.square().sum()
    return total.tolist()


def sketched(file: str, rows: int, sums: Sequence[float]) -> Sketch:
    """From what all stretches add."""
    return Sketch(file, rows, list(sums[:SUMS]), math.sqrt(sums[SUMS]))
