"""Exact ranks of targets, and the best rows, out of scores that come a chunk of rows at a time.

Shapes: B queries, C rows of a chunk, K best rows, E excluded rows of all queries.

rank = 1 + rows scored strictly higher + half of the other rows with exactly the target's score.  The half makes
a constant scorer's rank the middle of the table instead of the first, so that ties do not look good.

loss = log sum_i exp s_i - s_y, over all rows whatever is excluded from ranking: the negative log-likelihood of the
target under the softmax of the scores.

A chunk is a pair (first row, scores of shape (B, C)); chunks may be of any size and, over shards, on different
processes: both passes below only take maxima and sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Excluded = tuple[Tensor, Tensor]
"""Jagged rows to leave out, one list a query: (offsets_B1, rows), both int64."""

Chunks = Iterable[tuple[int, Tensor]]


class Excluding:
    """The (query, row) pairs to leave out, each once; ``keep``: rows (B,) that stay in whatever the lists say."""

    def __init__(self, exclude: Excluded, rows: int, keep: Tensor | None = None) -> None:
        offsets_B1, rows_E = exclude
        numbers_B = torch.arange(len(offsets_B1) - 1, device=rows_E.device)
        owner_E = torch.repeat_interleave(numbers_B, offsets_B1.diff(), output_size=rows_E.numel())
        pairs = torch.unique(owner_E * rows + rows_E.long())
        self.queries, self.rows = pairs // rows, pairs % rows
        if keep is not None:
            apart = self.rows != keep[self.queries]
            self.queries, self.rows = self.queries[apart], self.rows[apart]

    def within(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(queries, columns) of the pairs in rows ``start`` to ``stop``, columns counted from ``start``."""
        here = (self.rows >= start) & (self.rows < stop)
        return self.queries[here], self.rows[here] - start


@dataclass(frozen=True)
class Standing:
    """Of targets among all rows: their ranks_B and losses_B, float64, NaN for a query with a NaN score."""

    ranks_B: Tensor
    losses_B: Tensor


class LogSums:
    """log sum_i exp s_i of each query over chunks of scores.

    most_B: the highest score so far.  sum_B: of exp(s_i - most), float64; chunks are summed in their own precision.
    """

    def __init__(self, queries: int, device: torch.device) -> None:
        self.most_B = torch.full((queries,), -torch.inf, dtype=torch.float64, device=device)
        self.sum_B = torch.zeros_like(self.most_B)

    def add(self, scores_BC: Tensor, most_B: Tensor) -> None:
        """most_B: the highest score of the chunk."""
        self.raise_to(torch.maximum(self.most_B, most_B.double()))
        from_B = self.most_B.masked_fill(self.most_B == -torch.inf, 0.0)  # nothing but -inf so far
        lowered_BC = scores_BC - from_B[:, None].to(scores_BC.dtype)
        self.sum_B += lowered_BC.exp_().sum(1)

    def raise_to(self, most_B: Tensor) -> None:
        """Count from a score that is no lower, so that sums of several processes can be added up."""
        # nothing has been added where the highest is -inf
        self.sum_B = torch.where(self.sum_B == 0, 0.0, self.sum_B * (self.most_B - most_B).exp())
        self.most_B = most_B

    def losses(self, own_B: Tensor) -> Tensor:
        """(B,) float64 losses of targets by their own scores."""
        return self.most_B + self.sum_B.log() - own_B


def target_scores(chunks: Chunks, targets_B: Tensor, sums: LogSums | None = None) -> Tensor:
    """(B,) the target's own score: -inf where no chunk holds it, NaN where any score of the query is NaN.

    It is read out of the chunk's scores: a product of its own could differ in the last bit, and break ties.
    sums: take the chunks in as they pass.
    """
    found_B = torch.full(targets_B.shape, -torch.inf, device=targets_B.device)
    broken_B = torch.zeros_like(targets_B, dtype=torch.bool)
    for start, scores_BC in chunks:
        column_B = targets_B - start
        here_B = (column_B >= 0) & (column_B < scores_BC.shape[1])
        own_B = scores_BC.gather(1, column_B.clamp(0, scores_BC.shape[1] - 1)[:, None])[:, 0]
        found_B = torch.where(here_B, own_B.to(found_B.dtype), found_B)
        most_B = scores_BC.amax(1)
        broken_B |= most_B.isnan()  # max hands NaN on, without a mask of the scores' size
        if sums is not None:
            sums.add(scores_BC, most_B)
    return found_B.masked_fill(broken_B, torch.nan)


def count_above(
    chunks: Chunks, bars_B: Tensor, targets_B: Tensor, excluding: Excluding | None
) -> tuple[Tensor, Tensor]:
    """(higher, equal), both (B,) int64: rows scored above the bar, and rows but the target that equal it."""
    higher_B, equal_B = torch.zeros_like(targets_B), torch.zeros_like(targets_B)
    for start, scores_BC in chunks:
        higher_B += (scores_BC > bars_B[:, None]).sum(1)
        equal_B += (scores_BC == bars_B[:, None]).sum(1)
        equal_B -= ((targets_B >= start) & (targets_B < start + scores_BC.shape[1])).long()
        if excluding is not None:
            queries_P, columns_P = excluding.within(start, start + scores_BC.shape[1])
            scores_P, bars_P = scores_BC[queries_P, columns_P], bars_B[queries_P]
            higher_B.index_add_(0, queries_P, -(scores_P > bars_P).long())
            equal_B.index_add_(0, queries_P, -(scores_P == bars_P).long())
    return higher_B, equal_B


def ranks_from(higher_B: Tensor, equal_B: Tensor, bars_B: Tensor) -> Tensor:
    """(B,) float64 ranks from the counts; NaN where the target's score is."""
    ranks_B = 1.0 + higher_B.double() + 0.5 * equal_B.double()
    return torch.where(bars_B.isnan(), torch.nan, ranks_B)


def target_standing(
    chunks: Callable[[], Iterator[tuple[int, Tensor]]],
    targets_B: Tensor,
    rows: int,
    exclude: Excluded | None = None,
) -> Standing:
    """Where the targets stand among ``rows`` rows.

    chunks: makes the chunks of all rows, once or twice (a single chunk is kept).  exclude: rows that count neither
    as higher nor as ties; the target itself stays in, repeats count once.
    """
    sums = LogSums(len(targets_B), targets_B.device)
    ranks_B, bars_B = _ranks_and_bars(chunks, targets_B, rows, exclude, sums)
    return Standing(ranks_B, sums.losses(bars_B))


def ranks_in(scores_BI: Tensor, targets_B: Tensor, exclude: Excluded | None = None) -> Tensor:
    """(B,) float64 ranks of the targets in scores that are all there: :func:`target_standing`'s of one chunk."""
    return _ranks_and_bars(lambda: iter([(0, scores_BI)]), targets_B, scores_BI.shape[1], exclude, None)[0]


def _ranks_and_bars(
    chunks: Callable[[], Iterator[tuple[int, Tensor]]],
    targets_B: Tensor,
    rows: int,
    exclude: Excluded | None,
    sums: LogSums | None,
) -> tuple[Tensor, Tensor]:
    """(ranks, the targets' own scores), both (B,)."""
    excluding = None
    if exclude is not None and exclude[1].numel():
        excluding = Excluding(exclude, rows, keep=targets_B)
    first = chunks()
    one = next(first)
    again: Callable[[], Chunks] = chunks
    if one[1].shape[1] == rows:
        bars_B = target_scores([one], targets_B, sums)
        again = lambda: [one]  # noqa: E731
    else:
        bars_B = target_scores(_chain(one, first), targets_B, sums)
    return ranks_from(*count_above(again(), bars_B, targets_B, excluding), bars_B), bars_B


def best_rows(
    chunks: Chunks, queries: int, k: int, rows: int, exclude: Excluded | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(scores, rows), both (B, min(k, rows)), best first; -inf where exclusion leaves fewer.  Chunks may be written
    to."""
    k = min(k, rows)
    best_scores = like.new_empty(queries, 0)
    best = torch.empty(queries, 0, dtype=torch.int64, device=like.device)
    excluding = None if exclude is None else Excluding(exclude, rows)
    for start, scores_BC in chunks:
        columns = scores_BC.shape[1]
        if excluding is not None:
            scores_BC[excluding.within(start, start + columns)] = -torch.inf
        chunk_scores, chunk_columns = scores_BC.topk(min(k, columns), dim=1)
        both_scores = torch.cat([best_scores, chunk_scores], dim=1)
        both = torch.cat([best, chunk_columns + start], dim=1)
        best_scores, order = both_scores.topk(min(k, both_scores.shape[1]), dim=1)
        best = both.gather(1, order)
    return best_scores, best


def _chain(first: tuple[int, Tensor], rest: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    yield first
    yield from rest
