"""The tiles of the Triton kernels, for launching them and for compiling them ahead."""

from __future__ import annotations

from dataclasses import dataclass

from gr_kernels.triton_common.sizes import power_of_two

WIDEST = 1024


@dataclass(frozen=True)
class Tiles:
    """rows: gathered ones of a step of a program's loop. width: a row's, up to a power of two."""

    width: int
    rows: int
    num_warps: int


def tiles(width: int) -> Tiles:
    """Of about 2,048 numbers, 16 a thread: several gathered rows in flight, many programs a processor."""
    padded = max(16, power_of_two(width))
    return Tiles(padded, max(4, min(64, 2048 // padded)), 4)
