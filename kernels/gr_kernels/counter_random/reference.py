"""Philox4x32-10 in plain torch, on any device.

Shapes: T positions in a batch, C width of a row.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A 32-bit word is held
in an int64; products of two words wrap modulo 2^64, and the mask after the shift undoes the sign extension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(key: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of Philox4x32-10 for each counter (c0, c1, c2, c3).

    key: 64 bits, its low half is the first key word. Counters: int64 tensors holding uint32 values, broadcast
    together. Returns four int64 tensors holding uint32 values.
    """
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK32) ^ c1 ^ k0,
            product_1 & _MASK32,
            ((product_0 >> 32) & _MASK32) ^ c3 ^ k1,
            product_0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def draw_words(key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int) -> Tensor:
    """(T, draws) int64 words: draw d is word d%4 of counter (position, d//4, ordinal low, ordinal high)."""
    ordinals = ordinals_T.to(torch.int64)[:, None]
    positions = positions_T.to(torch.int64)[:, None]
    blocks = torch.arange((draws + 3) // 4, dtype=torch.int64, device=ordinals.device)[None, :]
    words = philox(key, positions & _MASK32, blocks, ordinals & _MASK32, (ordinals >> 32) & _MASK32)
    shape = (ordinals.shape[0], blocks.shape[1])
    return torch.stack([w.expand(shape) for w in words], dim=-1).flatten(1)[:, :draws]


def uniform_integers(
    key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int, high: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """(T, draws) integers in [0, high): (word * high) >> 32."""
    words = draw_words(key, ordinals_T, positions_T, draws)
    # the product in two halves of 16 bits, which no high up to 2^32 can overflow
    return (((words >> 16) * high + (((words & 0xFFFF) * high) >> 16)) >> 16).to(dtype)


def uniform_floats(key: int, ordinals_T: Tensor, positions_T: Tensor, draws: int) -> Tensor:
    """(T, draws) float32 in [0, 1): the 24 high bits of the word, so that every value is exact."""
    return (draw_words(key, ordinals_T, positions_T, draws) >> 8).to(torch.float32) * 2.0**-24


def row_uniforms(key: int, rows: Tensor, width: int) -> Tensor:
    """(len(rows), width) float64 in (-1, 1), symmetric about 0: (2 word + 1) / 2^32 - 1, exactly.

    Column c of row r is word c%4 of counter (0, c//4, r low, r high).
    """
    words = draw_words(key, rows, torch.zeros_like(rows), width)
    return (2 * words + 1).to(torch.float64) * 2.0**-32 - 1.0


def truncated_normal(uniforms: Tensor, std: float, cut: float) -> Tensor:
    """float32 of a normal law cut at +-cut standard deviations: the inverse CDF of uniforms in (-1, 1)."""
    spread = math.erf(cut / math.sqrt(2.0))
    return (torch.erfinv(uniforms * spread) * (std * math.sqrt(2.0))).to(torch.float32)
