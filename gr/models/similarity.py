"""Similarity of queries and items: score = <q, e> / temperature (+ item bias), in float32.

Shapes: B sequences, T queries, K candidates of a query, I catalogue size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import SimilaritySection
from gr.embeddings.table import Excluded, Rows, Table
from gr.models import init
from gr.models.borrow import borrow


class Similarity(nn.Module):
    """The only way from queries to items' scores, for objectives and for evaluation alike.

    With ``normalize`` both sides are divided by max(their L2 norm, eps): a cosine.
    """

    table: Table

    def __init__(self, config: SimilaritySection, table: Table) -> None:
        super().__init__()
        self.config = config
        borrow(self, "table", table)
        self.normalize_eps = config.eps if config.normalize else None
        self.bias = nn.Parameter(torch.empty(table.rows)) if config.item_bias else None

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"bias": init.zeros}

    def scores(self, queries_TD: Tensor, rows: Rows) -> Tensor:
        """(T, K) float32 scores of ``rows``: (T, K) each query's own, (K,) shared by all, or a range."""
        with _full_precision(queries_TD):
            # the temperature divides the queries, T x D numbers, rather than the T x K scores
            scaled_TD = self._queries(queries_TD) * (1 / self.config.temperature)
            scores_TK = self.table.scores(scaled_TD, rows, self.normalize_eps)
            if self.bias is None:
                return scores_TK
            own = (
                self.bias[rows.start : rows.stop : rows.step] if isinstance(rows, range) else self.bias[rows]
            )
            return scores_TK + own

    def topk(self, queries_BD: Tensor, k: int, exclude: Excluded | None = None) -> tuple[Tensor, Tensor]:
        """(scores, rows), both (B, min(k, I)), best first, over the whole catalogue."""
        with _full_precision(queries_BD):
            scaled_BD = self._queries(queries_BD) / self.config.temperature
            return self.table.topk(scaled_BD, k, self.normalize_eps, exclude, self.bias)

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor) -> Tensor:
        """The sum over queries of the cross-entropy of their targets against the whole catalogue: a scalar."""
        with _full_precision(queries_TD):
            return self.table.cross_entropy(
                self._queries(queries_TD),
                targets_T,
                1 / self.config.temperature,
                self.normalize_eps,
                self.bias,
            )

    def sampled_softmax(
        self,
        queries_TD: Tensor,
        targets_T: Tensor,
        negatives: Tensor,
        bias_I: Tensor | None = None,
        counts_K: Tensor | None = None,
    ) -> Tensor:
        """The sum over queries of the cross-entropy of their targets among themselves and negatives: a scalar.

        negatives: (T, K) rows of each query, or (K,) shared by all; one that is the target counts nothing.
        bias_I: (I,) added to the items' scores, the targets' too.  counts_K: how often each shared negative counts.
        """
        with _full_precision(queries_TD):
            if self.bias is not None:
                bias_I = self.bias if bias_I is None else self.bias + bias_I
            return self.table.sampled_softmax(
                self._queries(queries_TD),
                targets_T,
                negatives,
                1 / self.config.temperature,
                self.normalize_eps,
                bias_I,
                counts_K,
            )

    def _queries(self, queries_TD: Tensor) -> Tensor:
        queries_TD = queries_TD if queries_TD.dtype == torch.float64 else queries_TD.float()
        return F.normalize(queries_TD, dim=-1, eps=self.config.eps) if self.config.normalize else queries_TD


def _full_precision(like: Tensor) -> torch.autocast:
    """Scores and losses are float32 whatever the encoder computes in."""
    return torch.autocast(like.device.type, enabled=False)
