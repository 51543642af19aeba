"""The order: global batch k of an epoch as a pure function of (dataset, seed, epoch, global batch size).

Full blocks (row groups) are permuted by a keyed Feistel network, which needs no table; the short last block
goes last.  ``window_blocks`` consecutive permuted blocks are a window, whose rows are sorted by a keyed random
number.  The positions so numbered do not know of ranks, workers or prefetching; batch k is positions
[k*G, (k+1)*G).  A dataset no larger than a window is fully shuffled.  A stream keeps the stored order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gr.data.hashing import derive, keyed, mix64

ROUNDS = 6  # of the Feistel network


@dataclass(frozen=True)
class Order:
    """The order of ``rows`` training rows stored in blocks of ``block_rows``."""

    fingerprint: str
    seed: int
    rows: int
    block_rows: int
    window_blocks: int
    shuffle: bool = True

    @property
    def window_rows(self) -> int:
        """Rows of every window but the last."""
        return self.window_blocks * self.block_rows

    @property
    def windows(self) -> int:
        return -(-self.rows // self.window_rows)

    def window_of(self, position: int) -> int:
        return position // self.window_rows

    def blocks(self, epoch: int, window: int) -> np.ndarray:
        """The blocks of a window, sorted."""
        return _blocks(self, epoch, window).copy()

    def window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of a window, sorted, and the ordinals of its rows in the order of their positions."""
        key = derive(self.fingerprint, self.seed, epoch)
        blocks = self.blocks(epoch, window)
        ordinals = (blocks[:, None] * self.block_rows + np.arange(self.block_rows)).reshape(-1)
        ordinals = ordinals[ordinals < self.rows]  # the last block may be short
        if self.shuffle:
            ordinals = ordinals[np.lexsort((ordinals, keyed(ordinals, key)))]
        return blocks, ordinals


@lru_cache(maxsize=64)
def _blocks(order: Order, epoch: int, window: int) -> np.ndarray:
    """Of few blocks, the permutation is most of the work: who reads and who cuts both ask for them."""
    full, short = divmod(order.rows, order.block_rows)
    start, stop = window * order.window_blocks, (window + 1) * order.window_blocks
    blocks = np.arange(start, min(stop, full))
    if order.shuffle:
        blocks = np.sort(permute(blocks, full, derive(order.fingerprint, order.seed, epoch)))
    return np.append(blocks, full) if short and start <= full < stop else blocks


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of range(size), evaluated at ``index``: a balanced Feistel network on the next even
    power of two, walked along its cycle until it falls inside (Black and Rogaway, 2002)."""
    half = np.uint64(max((max(size - 1, 1).bit_length() + 1) // 2, 1))
    mask = np.uint64((1 << int(half)) - 1)
    keys = mix64(np.arange(ROUNDS, dtype=np.uint64) ^ np.uint64(key))

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        return (left << half) | right

    result = network(index.astype(np.uint64))
    while (outside := result >= size).any():
        result[outside] = network(result[outside])
    return result.astype(np.int64)
