"""Full softmax over the shards of a table: the cross-entropy of each target against all rows, wherever they are.

    loss_t = log sum_i exp(s_ti) - s_ty,    s_ti = scale q_t . e_i / max(|e_i|, eps) + b_i

Queries are gathered; each process forms the scores of its own rows, a chunk at a time, and only log-sums are exchanged.
The gradient of a shard is not stored: it is formed again, a chunk at a time, when the shard's rows move
(:class:`SoftmaxGradient`), so that nothing of a shard's size is made.

Shapes: T queries of this process, G queries of all, C rows of a chunk, D width, W width as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gr.embeddings.row_updates import Gradient, SparseGradient
from gr.embeddings.scoring import Scoring

if TYPE_CHECKING:
    from gr.embeddings.exchange import Shard
    from gr.embeddings.sharded import TorchRecTable

MAX_LOGITS = 1 << 22  # scores that exist at once


@dataclass(frozen=True)
class Contribution:
    """What one call of :func:`cross_entropy` gives to the table's gradient: everybody's queries, their targets and
    log-sums, and the weight of each in the loss."""

    queries_GD: Tensor
    targets_G: Tensor
    log_sum_G: Tensor
    weight_G: Tensor
    scoring: Scoring


def cross_entropy(table: TorchRecTable, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
    """The sum over this process's queries: a float32 scalar.  All processes call this together, and its backward."""
    return _CrossEntropy.apply(queries_TD, table, targets_T, scoring)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_TD: Tensor, table: TorchRecTable, targets_T: Tensor, scoring: Scoring
    ) -> Tensor:
        world = table.processes.world
        queries_GD, targets_G = world.gather(queries_TD), world.gather(targets_T)
        counts = world.gather(torch.tensor([len(targets_T)])).tolist()
        most_G = queries_GD.new_full((len(targets_G),), -torch.inf)
        sum_G, own_G = torch.zeros_like(most_G), torch.zeros_like(most_G)
        for start, stop in table.rows_in_step(_chunk(len(targets_G), table)):
            rows_CW = table.full_rows(start, stop)
            if start == stop or not len(targets_G):
                continue
            scores_GC = scores_of(queries_GD, rows_CW, table.dim, scoring)
            higher_G = torch.maximum(most_G, scores_GC.amax(1))
            sum_G = sum_G * (most_G - higher_G).exp() + (scores_GC - higher_G[:, None]).exp().sum(1)
            most_G = higher_G
            here_G = (targets_G >= start) & (targets_G < stop)
            column_G = (targets_G - start).clamp(0, stop - start - 1)
            own_G += torch.where(here_G, scores_GC.gather(1, column_G[:, None])[:, 0], 0.0)
        overall_G = world.maximum_of(most_G.clone())
        sum_G = torch.where(most_G == -torch.inf, 0.0, sum_G * (most_G - overall_G).exp())
        both = world.add_up(torch.stack([sum_G, own_G]))
        log_sum_G = overall_G + both[0].log()
        ctx.table, ctx.scoring, ctx.first = table, scoring, sum(counts[: world.rank])
        ctx.save_for_backward(queries_GD, targets_G, log_sum_G)
        mine = slice(ctx.first, ctx.first + len(targets_T))
        ctx.mine = mine
        return (log_sum_G[mine] - both[1][mine]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        queries_GD, targets_G, log_sum_G = ctx.saved_tensors
        table, world = ctx.table, ctx.table.processes.world
        weight_G = torch.zeros_like(log_sum_G)
        weight_G[ctx.mine] = gradient
        given = Contribution(queries_GD, targets_G, log_sum_G, world.add_up(weight_G), ctx.scoring)
        of_queries_GD = torch.zeros_like(queries_GD)
        for start, stop in table.rows_in_step(_chunk(len(targets_G), table)):
            rows_CW = table.full_rows(start, stop)
            if start < stop and len(targets_G):
                unit_CD, _ = normalised(rows_CW[:, : table.dim], ctx.scoring)
                of_queries_GD += _of_scores(given, rows_CW, table.dim, start) @ unit_CD * ctx.scoring.scale
            if table.by_columns:
                table.take_columns(start, stop, _of_rows(given, rows_CW, table.dim, start))
        if not table.by_columns:
            table.softmaxes.append(given)
        return world.add_up(of_queries_GD)[ctx.mine], None, None, None


class SoftmaxGradient(Gradient):
    """Of one column (weight or bias) of a shard: what the views brought, and the softmaxes' part, formed when asked
    for."""

    def __init__(
        self,
        table: TorchRecTable,
        held: Shard,
        column: str,
        sparse: SparseGradient,
        given: list[Contribution],
    ) -> None:
        self.table, self.held, self.column, self.sparse, self.given = table, held, column, sparse, given

    @property
    def device(self) -> torch.device:
        return self.held.values_RC.device

    def rows(self) -> None:
        return None

    def dense(self, start: int, stop: int) -> Tensor:
        gradient = self.sparse.dense(start, stop) + self._formed(start, stop)
        return gradient if self.factor is None else gradient * self.factor

    def square_norm(self) -> Tensor:
        rows = len(self.held.values_RC)
        total, step = torch.zeros((), device=self.device), max(MAX_LOGITS // max(self._queries, 1), 1)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            total = total + (self.sparse.dense(start, stop) + self._formed(start, stop)).square().sum()
        return total

    @property
    def _queries(self) -> int:
        return max((len(given.targets_G) for given in self.given), default=0)

    def _formed(self, start: int, stop: int) -> Tensor:
        """(stop - start, columns): the softmaxes' part of a range of the shard's rows."""
        rows_CW = self.held.values_RC[start:stop]
        row0, dim = self.held.row0 + start, self.table.dim
        parts = (_of_rows(given, rows_CW, dim, row0) for given in self.given)
        total_CW = sum(parts, torch.zeros_like(rows_CW))
        return total_CW[:, :dim] if self.column == "weight" else total_CW[:, dim : dim + 1]


class StoredGradient(Gradient):
    """What the views brought, and a tensor of the piece's size beside it."""

    def __init__(self, sparse: Gradient, stored_RC: Tensor) -> None:
        self.sparse, self.stored_RC = sparse, stored_RC

    @property
    def device(self) -> torch.device:
        return self.stored_RC.device

    def rows(self) -> None:
        return None

    def dense(self, start: int, stop: int) -> Tensor:
        gradient = self.sparse.dense(start, stop) + self.stored_RC[start:stop]
        return gradient if self.factor is None else gradient * self.factor

    def square_norm(self) -> Tensor:
        rows, columns = self.stored_RC.shape
        total, step = torch.zeros((), device=self.device), max(MAX_LOGITS // max(columns, 1), 1)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            total = total + (self.sparse.dense(start, stop) + self.stored_RC[start:stop]).square().sum()
        return total


def scores_of(queries_GD: Tensor, rows_CW: Tensor, dim: int, scoring: Scoring) -> Tensor:
    """(G, C) float32 scores of some rows, stored whole."""
    unit_CD, _ = normalised(scoring.columns(rows_CW[:, :dim]), scoring)
    scores_GC = (queries_GD * scoring.scale) @ unit_CD.T
    return scores_GC + rows_CW[:, dim] if scoring.bias else scores_GC


def normalised(rows_CD: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """The rows as scores take them, and their lengths (C, 1) where they were normalised."""
    if scoring.normalize_eps is None:
        return rows_CD, None
    length_C1 = rows_CD.norm(dim=1, keepdim=True)
    return rows_CD / length_C1.clamp_min(scoring.normalize_eps), length_C1


def _of_scores(given: Contribution, rows_CW: Tensor, dim: int, row0: int) -> Tensor:
    """(G, C) the loss's gradient in the scores of some rows: softmax - [target], weighted."""
    scores_GC = scores_of(given.queries_GD, rows_CW, dim, given.scoring)
    of_scores_GC = (scores_GC - given.log_sum_G[:, None]).exp()
    column_G = given.targets_G - row0
    here = ((column_G >= 0) & (column_G < len(rows_CW))).nonzero()[:, 0]
    of_scores_GC[here, column_G[here]] -= 1.0
    return of_scores_GC * given.weight_G[:, None]


def _of_rows(given: Contribution, rows_CW: Tensor, dim: int, row0: int) -> Tensor:
    """(C, W) the loss's gradient in some rows, stored whole: row0 is the table's number of the first."""
    scoring = given.scoring
    of_scores_GC = _of_scores(given, rows_CW, dim, row0)
    gradient_CW = torch.zeros_like(rows_CW)
    unit_CD, length_C1 = normalised(rows_CW[:, :dim], scoring)
    of_unit_CD = of_scores_GC.T @ given.queries_GD * scoring.scale
    if length_C1 is not None:  # through e / max(|e|, eps): below eps the divisor is a constant
        assert scoring.normalize_eps is not None
        along_C1 = (of_unit_CD * unit_CD).sum(1, keepdim=True)
        inside_C1 = torch.where(length_C1 > scoring.normalize_eps, along_C1, 0.0)
        of_unit_CD = (of_unit_CD - inside_C1 * unit_CD) / length_C1.clamp_min(scoring.normalize_eps)
    gradient_CW[:, :dim] = of_unit_CD
    if scoring.bias:
        gradient_CW[:, dim] = of_scores_GC.sum(0)
    return gradient_CW


def _chunk(queries: int, table: TorchRecTable) -> int:
    return max(min(MAX_LOGITS // max(queries, 1), MAX_LOGITS // table.width), 1)
