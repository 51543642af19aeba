"""Embedding tables.  Models and losses reach a table through ``lookup``, ``scores``, ``topk``, ``cross_entropy`` and
``sampled_softmax`` alone, never through its weight, so that a sharded table can take a local one's place.

Shapes: B sequences, T queries, K candidates of a query, I catalogue size, D width, C rows of a chunk.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.candidate_scores.op import IMPLEMENTATIONS as CANDIDATE_SCORES
from gr_kernels.counter_random import derive_key, truncated_normal_rows
from gr_kernels.dispatch import known_or_auto
from gr_kernels.log_partition import cross_entropy
from gr_kernels.log_partition.op import CROSS_ENTROPIES
from gr_kernels.sampled_softmax import sampled_softmax
from gr_kernels.sampled_softmax.op import IMPLEMENTATIONS as SAMPLED_SOFTMAX

Rows = Tensor | range
Excluded = tuple[Tensor, Tensor]
"""Jagged rows to leave out, one list a query: (offsets_B1, rows)."""

MAX_SCORES = 1 << 24  # scores that exist at once while a catalogue is searched


class Table(Protocol):
    """I rows of width D; see ``LocalTable`` for the methods' contracts."""

    rows: int
    dim: int

    def lookup(self, rows: Tensor) -> Tensor: ...

    def scores(self, queries_TD: Tensor, rows: Rows, normalize_eps: float | None = None) -> Tensor: ...

    def topk(
        self,
        queries_BD: Tensor,
        k: int,
        normalize_eps: float | None = None,
        exclude: Excluded | None = None,
        bias_I: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def cross_entropy(
        self,
        queries_TD: Tensor,
        targets_T: Tensor,
        scale: float = 1.0,
        normalize_eps: float | None = None,
        bias_I: Tensor | None = None,
        weights_T: Tensor | None = None,
    ) -> Tensor: ...

    def sampled_softmax(
        self,
        queries_TD: Tensor,
        targets_T: Tensor,
        negatives: Tensor,
        scale: float = 1.0,
        normalize_eps: float | None = None,
        bias_I: Tensor | None = None,
        counts_K: Tensor | None = None,
    ) -> Tensor: ...


class LocalTable(nn.Module):
    """A table held whole by one process, float32.

    Starts from N(0, std^2) cut at +-2 std; the value at (row, column) depends on (seed, name, row, column) alone.
    ``kernels``: the implementation of the operators that have one of that name ("auto": each chooses).
    """

    initialises_itself = True

    def __init__(self, name: str, rows: int, dim: int, std: float, seed: int, kernels: str = "auto") -> None:
        super().__init__()
        self.name, self.rows, self.dim = name, rows, dim
        self.kernels = kernels
        self.weight = nn.Parameter(
            truncated_normal_rows(derive_key(seed, "table", name), range(rows), dim, std)
        )

    def lookup(self, rows: Tensor) -> Tensor:
        """Rows of the table, shape ``(*rows.shape, D)``; differentiable (a dense gradient)."""
        return F.embedding(rows, self.weight)

    def scores(self, queries_TD: Tensor, rows: Rows, normalize_eps: float | None = None) -> Tensor:
        """Inner products (T, K) of queries with ``rows``: (T, K) each query's own, (K,) shared by all, or a range.

        With ``normalize_eps`` each row is divided by max(its L2 norm, normalize_eps) first.
        """
        return candidate_scores(
            queries_TD,
            self.weight,
            rows,
            normalize_eps=normalize_eps,
            implementation=known_or_auto(self.kernels, CANDIDATE_SCORES),
        )

    @torch.no_grad()
    def topk(
        self,
        queries_BD: Tensor,
        k: int,
        normalize_eps: float | None = None,
        exclude: Excluded | None = None,
        bias_I: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best rows of each query, exactly: (scores, rows), both (B, min(k, I)), best first.

        exclude: jagged rows never to return; where fewer than k are left, the score of the rest is -inf.
        bias_I is added to the scores.  Holds at most MAX_SCORES scores (one query's k at least) at once.
        """
        queries, k = queries_BD.shape[0], min(k, self.rows)
        best_scores = queries_BD.new_empty(queries, 0)
        best_rows = torch.empty(queries, 0, dtype=torch.int64, device=queries_BD.device)
        if exclude is not None:
            excluded_rows = exclude[1].long()
            excluded_queries = torch.repeat_interleave(
                torch.arange(queries, device=excluded_rows.device),
                exclude[0].diff(),
                output_size=len(excluded_rows),
            )
        step = max(k, MAX_SCORES // max(1, queries), 1)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            scores_BC = self.scores(queries_BD, range(start, stop), normalize_eps)
            if bias_I is not None:
                scores_BC = scores_BC + bias_I[start:stop]
            if exclude is not None:
                here = (excluded_rows >= start) & (excluded_rows < stop)
                scores_BC[excluded_queries[here], excluded_rows[here] - start] = -torch.inf
            chunk_scores, columns = scores_BC.topk(min(k, stop - start), dim=1)
            both_scores = torch.cat([best_scores, chunk_scores], dim=1)
            both_rows = torch.cat([best_rows, columns + start], dim=1)
            best_scores, order = both_scores.topk(min(k, both_scores.shape[1]), dim=1)
            best_rows = both_rows.gather(1, order)
        return best_scores, best_rows

    def cross_entropy(
        self,
        queries_TD: Tensor,
        targets_T: Tensor,
        scale: float = 1.0,
        normalize_eps: float | None = None,
        bias_I: Tensor | None = None,
        weights_T: Tensor | None = None,
    ) -> Tensor:
        """Sum over t of w_t times the cross-entropy of target t against the whole catalogue: a float32 scalar.

        The logits are ``scale * q . e + bias``; they exist a chunk at a time (gr_kernels.log_partition).
        """
        return cross_entropy(
            queries_TD,
            self.weight,
            targets_T,
            weights_T=weights_T,
            scale=scale,
            normalize_eps=normalize_eps,
            bias_I=bias_I,
            implementation=known_or_auto(self.kernels, CROSS_ENTROPIES),
        )

    def sampled_softmax(
        self,
        queries_TD: Tensor,
        targets_T: Tensor,
        negatives: Tensor,
        scale: float = 1.0,
        normalize_eps: float | None = None,
        bias_I: Tensor | None = None,
        counts_K: Tensor | None = None,
    ) -> Tensor:
        """Sum over t of the cross-entropy of target t among itself and its negatives: a float32 scalar.

        negatives: (T, K) rows of each query, or (K,) shared by all; one equal to the target counts nothing.
        counts_K: how often each shared negative counts (None: once).
        bias_I is added to an item's logits, the target's too (gr_kernels.sampled_softmax).
        """
        return sampled_softmax(
            queries_TD,
            self.weight,
            targets_T,
            negatives,
            counts_K=counts_K,
            scale=scale,
            normalize_eps=normalize_eps,
            bias_I=bias_I,
            implementation=known_or_auto(self.kernels, SAMPLED_SOFTMAX),
        )

    def extra_repr(self) -> str:
        return f"{self.name!r}, rows={self.rows}, dim={self.dim}"
