"""Similarity of queries and items: score = <q, e> / temperature (+ item bias), in float32.

Shapes: S, B queries, K candidates of a query, U rows of a view, I catalogue size, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.config import SimilaritySection
from gr.embeddings.ranks import Excluded, Standing
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table
from gr.embeddings.view import View
from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.sampled_softmax import sampled_softmax

T = TypeVar("T")


class Similarity:
    """The only way from queries to items' scores, for objectives and for evaluation alike.

    With ``normalize`` both sides are divided by max(their L2 norm, eps): a cosine.  dim: of both only the first so
    many numbers count; ``nested``: the similarities of the prefixes that train beside the whole (Matryoshka
    representation learning, Kusupati et al., arXiv 2205.13147).
    """

    def __init__(self, config: SimilaritySection, dim: int | None = None) -> None:
        self.config = config
        self.scoring = Scoring(
            1 / config.temperature, config.eps if config.normalize else None, config.item_bias, dim
        )
        self.nested = [] if dim is not None else [Similarity(config, prefix) for prefix in config.matryoshka]

    # -- a step, on the rows of a view ------------------------------------------------------------------------------

    def candidates(self, items: View, queries_SD: Tensor, rows_SK: Tensor) -> Tensor:
        """(S, K) float32 scores of each query's own candidate rows."""
        scoring = self.scoring
        with _full_precision(queries_SD):
            # the temperature divides the queries, S x D numbers, rather than the S x K scores
            scores_SK = candidate_scores(
                self.queries(queries_SD) * scoring.scale,
                scoring.columns(items.weight_UD),
                items.place(rows_SK),
                normalize_eps=scoring.normalize_eps,
            )
            return scores_SK if items.bias_U is None else scores_SK + items.bias_U[items.place(rows_SK)]

    def shared(self, items: View, queries_SD: Tensor, rows_C: Tensor) -> Tensor:
        """(S, C) float32 scores of candidate rows that all queries share."""
        scoring = self.scoring
        with _full_precision(queries_SD):
            rows_CD = scoring.columns(items.lookup(rows_C))
            if scoring.normalize_eps is not None:
                rows_CD = F.normalize(rows_CD, dim=1, eps=scoring.normalize_eps)
            scores_SC = (self.queries(queries_SD) * scoring.scale) @ rows_CD.T
            return scores_SC if items.bias_U is None else scores_SC + items.bias_U[items.place(rows_C)]

    def sampled_softmax(
        self,
        items: View,
        queries_SD: Tensor,
        targets_S: Tensor,
        negatives: Tensor,
        correction_I: Tensor | None = None,
        counts_K: Tensor | None = None,
    ) -> Tensor:
        """The sum over queries of the cross-entropy of their targets among themselves and negatives: a scalar.

        negatives: (S, K) rows of each query, or (K,) shared by all; one that is the target counts nothing.
        correction_I: added to the items' scores, the targets' too.  counts_K: how often each shared negative counts.
        """
        bias_U = items.bias_U
        if correction_I is not None:
            correction_U = items.part_of(correction_I)
            bias_U = correction_U if bias_U is None else bias_U + correction_U
        with _full_precision(queries_SD):
            return sampled_softmax(
                self.queries(queries_SD),
                self.scoring.columns(items.weight_UD),
                items.place(targets_S),
                items.place(negatives),
                counts_K=counts_K,
                scale=self.scoring.scale,
                normalize_eps=self.scoring.normalize_eps,
                bias_I=bias_U,
            )

    # -- the whole catalogue, where its table is --------------------------------------------------------------------

    def cross_entropy(self, table: Table, queries_SD: Tensor, targets_S: Tensor) -> Tensor:
        """The sum over queries of the cross-entropy of their targets against the whole catalogue: a scalar."""
        with _full_precision(queries_SD):
            return table.cross_entropy(self.queries(queries_SD), targets_S, self.scoring)

    def scores(self, table: Table, queries_BD: Tensor) -> Tensor:
        """(B, I) float32 scores of the whole catalogue."""
        return self._search(table.scores, queries_BD)

    def topk(
        self, table: Table, queries_BD: Tensor, k: int, exclude: Excluded | None = None
    ) -> tuple[Tensor, Tensor]:
        """(scores, rows), both (B, min(k, I)), best first, over the whole catalogue."""
        return self._search(lambda q_BD, scoring: table.topk(q_BD, k, scoring, exclude), queries_BD)

    def standing(
        self, table: Table, queries_BD: Tensor, targets_B: Tensor, exclude: Excluded | None = None
    ) -> Standing:
        """Ranks and losses of the targets in the whole catalogue; NaN where a score is."""
        return self._search(
            lambda q_BD, scoring: table.standing(q_BD, targets_B, scoring, exclude), queries_BD
        )

    def queries(self, queries_TD: Tensor) -> Tensor:
        """Queries as scores take them: float32 (float64 stays), what counts of them, normalised where the similarity
        is."""
        queries_TD = queries_TD[..., : self.scoring.dim]
        queries_TD = queries_TD if queries_TD.dtype == torch.float64 else queries_TD.float()
        return F.normalize(queries_TD, dim=-1, eps=self.config.eps) if self.config.normalize else queries_TD

    def _search(self, search: Callable[[Tensor, Scoring], T], queries_BD: Tensor) -> T:
        with _full_precision(queries_BD):
            return search(self.queries(queries_BD), self.scoring)


def _full_precision(like: Tensor) -> torch.autocast:
    """Scores and losses are float32 whatever the encoder computes in."""
    return torch.autocast(like.device.type, enabled=False)
