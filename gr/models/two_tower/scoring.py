"""Scoring many items for a user by MaxSim: exactly, all of them; or some, that single vectors in front have chosen.

Items' heads lie head after head, (J, I, K): a chunk of items then needs one GEMM a head, and the maximum over heads is
taken element by element between two of them, while the chunk is in the cache.

The vectors in front are MUVERA's fixed-dimensional encodings (Dhulipala et al., arXiv 2405.19504): random hyperplanes
cut the space into 2^bits cells; of each cell a user has the sum of the heads in it, an item their mean (or, in an empty
cell, the head whose signs are nearest to the cell's); repeated with other planes, and each cell projected by random
signs.  The inner product of two encodings estimates the sum of maxima, by the idea that a head's nearest one is in its
cell.

Shapes: H heads of a user (of all layers), J heads of an item, I items, K width of a head, C items of a chunk, R
repetitions, P = 2^bits cells, E width of an encoding, S chosen items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gr_kernels.counter_random import derive_key

CHUNK = 2048
"""Items whose scores with one user's heads exist at once."""


def score_all(user_HK: Tensor, heads_JIK: Tensor) -> Tensor:
    """(I,) the sum over a user's heads of the largest product with an item's heads."""
    items = heads_JIK.shape[1]
    scores_I = user_HK.new_empty(items)
    user_KH = user_HK.T
    for start in range(0, items, CHUNK):
        stop = min(start + CHUNK, items)
        best_CH = torch.mm(heads_JIK[0, start:stop], user_KH)
        other_CH = torch.empty_like(best_CH)
        for heads_IK in heads_JIK[1:]:
            torch.mm(heads_IK[start:stop], user_KH, out=other_CH)
            torch.maximum(best_CH, other_CH, out=best_CH)
        torch.sum(best_CH, 1, out=scores_I[start:stop])
    return scores_I


def score_some(user_HK: Tensor, heads_JIK: Tensor, items_S: Tensor) -> Tensor:
    """(S,) the same of some items."""
    return score_all(user_HK, heads_JIK.index_select(1, items_S))


def last_layer(user_HK: Tensor, layers: int) -> Tensor:
    """The heads of the tower's last layer among those of ``layers`` layers: a ``layers``-th of the work."""
    return user_HK[-(user_HK.shape[0] // layers) :]


@dataclass(frozen=True)
class Encoding:
    """A MUVERA encoding of heads of width ``width``.  planes_RBK: normals of the hyperplanes, B bits.  signs_RKQ: the
    projections to Q numbers a cell, +-1/sqrt(Q)."""

    planes_RBK: Tensor
    signs_RKQ: Tensor

    @staticmethod
    def of(width: int, repetitions: int = 20, bits: int = 4, projected: int = 16, seed: int = 1) -> Encoding:
        """Q = ``projected``."""
        generator = torch.Generator().manual_seed(derive_key(seed, "muvera", width) >> 1)
        planes = torch.randn(repetitions, bits, width, generator=generator)
        signs = torch.randint(0, 2, (repetitions, width, projected), generator=generator) * 2.0 - 1.0
        return Encoding(planes, signs / projected**0.5)

    @property
    def cells(self) -> int:
        """P."""
        return 1 << self.planes_RBK.shape[1]

    @property
    def dim(self) -> int:
        """E = R P Q."""
        return self.planes_RBK.shape[0] * self.cells * self.signs_RKQ.shape[2]

    def of_user(self, user_HK: Tensor) -> Tensor:
        """(E,) of one user's heads: sums."""
        return self._encoded(user_HK[None], mean=False)[0]

    def of_items(self, heads_JIK: Tensor) -> Tensor:
        """(I, E) of items' heads: means, and no cell empty."""
        parts = [
            self._encoded(part.transpose(0, 1), mean=True) for part in _chunks(heads_JIK, max(CHUNK // 8, 1))
        ]
        return torch.cat(parts) if parts else heads_JIK.new_empty(0, self.dim)

    def _encoded(self, heads_NJK: Tensor, mean: bool) -> Tensor:
        """(N, E) of N lists of heads."""
        found = []
        for planes_BK, signs_KQ in zip(self.planes_RBK, self.signs_RKQ):
            bits = planes_BK.shape[0]
            above_NJB = heads_NJK @ planes_BK.T > 0
            cell_NJ = (above_NJB * (1 << torch.arange(bits))).sum(2)
            inside_NJP = torch.nn.functional.one_hot(cell_NJ, self.cells).to(heads_NJK.dtype)
            small_NJQ = heads_NJK @ signs_KQ
            sums_NPQ = inside_NJP.transpose(1, 2) @ small_NJQ
            if mean:
                counts_NP = inside_NJP.sum(1)
                sums_NPQ = sums_NPQ / counts_NP.clamp_min(1)[:, :, None]
                # of an empty cell, the head that is the fewest planes away
                numbers_PB = (torch.arange(self.cells)[:, None] >> torch.arange(bits)) & 1
                away_NPJ = (above_NJB[:, None] != numbers_PB.bool()[None, :, None]).sum(3)
                nearest_NP = away_NPJ.argmin(2)
                filled_NPQ = small_NJQ.gather(1, nearest_NP[:, :, None].expand_as(sums_NPQ))
                sums_NPQ = torch.where((counts_NP == 0)[:, :, None], filled_NPQ, sums_NPQ)
            found.append(sums_NPQ.flatten(1))
        return torch.cat(found, dim=1) / len(found)


def search(
    user_HK: Tensor, heads_JIK: Tensor, encoding: Encoding, encoded_IE: Tensor, k: int, candidates: int
) -> tuple[Tensor, Tensor]:
    """The k best of the ``candidates`` items whose encodings are nearest: (exact scores, item rows), best first."""
    near_I = encoded_IE @ encoding.of_user(user_HK)
    chosen_S = near_I.topk(min(candidates, len(near_I))).indices.sort().values
    scores_S = score_some(user_HK, heads_JIK, chosen_S)
    best = scores_S.topk(min(k, len(chosen_S)))
    return best.values, chosen_S[best.indices]


def _chunks(heads_JIK: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, heads_JIK.shape[1], size):
        yield heads_JIK[:, start : start + size]
