"""What the Triton kernels know at compile time: one frozen value, passed as a constexpr and named S there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A kernel is compiled once for each of these (and for the types of its arguments).

    ROWS, KEYS: the tile of scores. WIDTH_Q, WIDTH_V: a head's widths; BLOCK_Q, BLOCK_V: the next powers of two, at
    least 16. CAUSAL, TARGETS, WINDOW, CONTEXTS: features of the mask. CROSS: queries have offsets of their own.
    PART: stretches of longer sequences. POSITION, TIME: which tables the bias has; SQRT: buckets of the root, not of
    the logarithm. SOFTMAX: instead of SiLU. FAST: tanh.approx. PRECISION: of float32 products. ORDERED: sequences come
    in a given order. ATOMIC: the pass over keys adds up the gradient of the queries as well.
    FAR: a tile's rows, or the heads, are 2^31 numbers apart or more: addresses take 64 bits, and more registers.
    ALIGNED: every row of q, k, v and the other tensors of rows starts at a multiple of so many bytes, at most 16; 0:
    as far as Triton finds out by itself.
    """

    ROWS: int
    KEYS: int
    WIDTH_Q: int
    WIDTH_V: int
    BLOCK_Q: int
    BLOCK_V: int
    CAUSAL: bool = True
    TARGETS: bool = False
    WINDOW: bool = False
    CONTEXTS: bool = False
    CROSS: bool = False
    PART: bool = False
    POSITION: bool = False
    TIME: bool = False
    SQRT: bool = False
    SOFTMAX: bool = False
    DROPOUT: bool = False
    FAST: bool = False
    PRECISION: str = "ieee"
    ORDERED: bool = False
    ATOMIC: bool = False
    FAR: bool = False
    ALIGNED: int = 0

    @property
    def UNIT(self) -> float:
        """What scores come multiplied by: SiLU is cheapest from x / 2."""
        return 1.0 if self.SOFTMAX else 0.5
