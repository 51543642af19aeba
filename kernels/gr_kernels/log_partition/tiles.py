"""The tiles of the Triton kernels, and how the table is split among programs: one choice, commented.

Shapes: T queries, I table rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from gr_kernels.triton_common.sizes import power_of_two

WIDEST = 256
MOST_SPLITS = 8


@dataclass(frozen=True)
class Tiles:
    """held: rows a program keeps (queries forward, table rows backward); streamed: rows of a step of its loop;
    resident: programs that share a processor, by their registers."""

    width: int
    held: int
    streamed: int
    num_warps: int
    num_stages: int
    resident: int = 1


def tiles(width: int, bits: int, capability: int, gradient: bool) -> Tiles:
    """For rows of ``width`` numbers of ``bits`` bits on a GPU of compute capability 8.x or 9.x.

    gradient: for table_gradient, whose streamed rows each bring four numbers that every thread keeps.

    Both kernels keep a block of rows and its accumulator (held x width float32) while they stream the other side
    through shared memory, each tile of which serves two products. wgmma wants at least 64 held rows for every four
    warps; 128 held rows halve what L2 must deliver for a product.
    """
    padded = max(16, power_of_two(width))
    if bits == 32:
        # each product is three of tf32, whose pieces, of the held rows too, take registers beside the accumulators:
        # small tiles
        if padded > 128:
            return Tiles(padded, 16, 32, 8, 2)
        return Tiles(padded, 64, 32 if padded <= 64 else 16, 8, 2)
    if padded <= 64:
        # an exponential takes as long as its logit's products: few enough registers (128) for two programs to share
        # a processor, one's exponentials under the other's products
        return Tiles(padded, 128, 32, 8, 4, 2) if gradient else Tiles(padded, 128, 64, 8, 3, 2)
    if padded <= 128:
        # twice as many streamed rows halve what shared memory delivers for a wgmma; sm_80 has no registers for them
        return Tiles(padded, 128, 128, 8, 2) if capability >= 9 else Tiles(padded, 128, 64, 8, 3)
    # the accumulator alone would take half the registers of each thread with 128 held rows
    return Tiles(padded, 64, 64, 8, 2)


def splits(row_blocks: int, item_tiles: int, places: int) -> int:
    """Parts of the table that programs of the same queries take: as few as fill a GPU of so many places.

    Each part costs T x D partial sums, so up to MOST_SPLITS, whatever I is. The time is that of the rounds of
    programs, each of 1 / parts of the table.
    """
    most = max(1, min(MOST_SPLITS, item_tiles))
    return min(range(1, most + 1), key=lambda parts: (-(-row_blocks * parts // places) / parts, parts))
