"""The tiles of the Triton kernels: one function, used by the launches and by the compile gates."""

from __future__ import annotations

from typing import Literal, NamedTuple

Pass = Literal["forward", "d_q", "d_kv", "tables"]


class Tile(NamedTuple):
    """Rows and keys of a tile of scores, and how a program computes it."""

    rows: int
    keys: int
    warps: int
    stages: int


# Histories of up to so many rows fill 64-row tiles better than 128-row ones.
SHORT = 256


def choose(
    which: Pass,
    width: int,
    bytes_each: int,
    longest: int,
    biased: bool,
    softmax: bool,
    dropout: bool = False,
    ragged: bool = False,
    interpreting: bool = False,
) -> Tile:
    """The tile of a pass.

    width: of the heads, a power of two (the wider of keys and values). bytes_each: a number's. longest: rows of the
    longest sequence. biased: whether scores have a bias, whose addresses take registers. softmax: whether the
    backward reads each row's sums of softmax. dropout: whether weights are dropped; a tile's random words are in
    registers at once. ragged: whether a head's width is no power of two, so that its rows come in pieces smaller than
    16 bytes, whose addresses take registers.

    Chosen so that, compiled for sm_90, nothing spills to memory and every product is a wgmma, which takes 64 rows of
    its left operand (rows of scores in "forward" and "d_q", keys in "d_kv") and 4 warps; 8 warps halve the registers
    that a thread needs, and of a 64-row operand each half takes half the columns. What does spill
    is listed in benchmarks/kernels/compile_cases, which holds the choice to that.
    """
    # Small, so that short sequences have several blocks; uneven, so that rows and keys aren't mixed up.
    if interpreting:
        return Tile(16, 32, 4, 1) if which in ("forward", "tables") else Tile(32, 16, 4, 1)
    if bytes_each == 4:  # exact float32 products run on the ordinary cores, from registers
        side = 32 if width <= 64 and which != "d_kv" else 16
        return Tile(side, side, 8 if width > 128 else 4, 1)
    if which == "tables":
        # The tile of scores is kept in registers several times over (its sum over heads, bias, buckets), whatever the
        # width; rows of keys and values pass by, one head's ahead of the last one's use where registers allow it.
        return Tile(64, 64, 8, 1 if width > 128 or ragged else 2)
    wide = width > 64
    if which == "d_kv":
        # Two accumulators as wide as a head: 64 keys by 8 warps. Rows stream by, fewer at a time where they are wide.
        narrow = (wide and (biased or softmax or dropout)) or (biased and (ragged or dropout))
        rows = 16 if width > 128 else 32 if narrow else 64
        return Tile(rows, 64, 8, 3 if width <= 64 else 2)
    if width <= 64 and longest <= SHORT:
        narrow = (dropout and (biased or ragged)) or (biased and ragged and which == "d_q")
        return Tile(64, 32 if narrow else 64, 8 if biased else 4, 3)
    if width <= 128:
        narrow = (biased and (wide or dropout or which == "d_q")) or (dropout and wide and which == "d_q")
        return Tile(128, 32 if narrow else 64, 8, 3 if which == "forward" or width <= 64 else 2)
    return Tile(128 if which == "forward" else 64, 32, 8, 2)


def atomic(width: int, biased: bool) -> bool:
    """Whether the fast backward adds d_q up atomically in d_kv, 5 products a tile of scores, or is the deterministic
    one, 7 products: beside a bias, or wider accumulators, there are no registers for it (344 B spill).

    Where d_kv takes 32 rows, their part of d_q is an mma.sync: slow, but less than two products more (unmeasured)."""
    return width <= 128 and not biased
