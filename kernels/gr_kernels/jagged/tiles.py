"""How the Triton kernels here cut rows of numbers into tiles, and the numbers of steps of their searches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gr_kernels.triton_common.sizes import power_of_two

TILE_BYTES = 16384
WARPS = 4


@dataclass(frozen=True)
class Tile:
    """``rows`` rows by ``columns`` columns a program; wider rows are walked in steps of ``columns``."""

    rows: int
    columns: int


def tile(width: int, item_bytes: int) -> Tile:
    """Whole rows where they fit 4 KiB, and as many as make 16 KiB: 32 numbers of 4 bytes for each of 128 threads."""
    columns = min(power_of_two(width), max(1, 4096 // item_bytes))
    return Tile(min(64, max(1, TILE_BYTES // (columns * item_bytes))), columns)


def add_tile(width: int, item_bytes: int) -> Tile:
    """Of position and time embeddings, for rows of ``item_bytes`` numbers: the choices that compile without spills for
    sm_80 and sm_90.

    16-bit numbers take half of what a copy takes, since three tensors' numbers meet as float32.
    """
    return tile(width, max(4, 16 // item_bytes))


def dropout_tile(width: int) -> Tile:
    """4096 decisions a program: 32 a thread, from 8 calls of Philox, whose words are what fills the registers."""
    columns = min(max(4, power_of_two(width)), 128)
    return Tile(min(64, 4096 // columns), columns)


def search_steps(count: int) -> int:
    """Halvings after which one of the answers 0 to ``count`` is left, up to a multiple of 8.

    It is a constexpr, and ``count`` changes with every batch: one kernel serves batches of up to 254 sequences, another
    those of up to 65,534. A halving that isn't needed loads nothing.
    """
    return 8 * -(-count.bit_length() // 8)


# A row is moved as integers of the size of its numbers, whatever they are.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
