"""What is asked of the operator, checked.

Shapes: T queries, I table rows, D width, X excluded names of a query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gr_kernels.logits import Logits, check_logits, check_targets, normalized
from gr_kernels.tracing import values_are_at_hand


@dataclass(frozen=True, kw_only=True)
class Problem(Logits):
    """The logits of all table rows that query t sees, with what is summed over them."""

    excluded: Tensor | None
    names: Tensor | None
    targets: Tensor | None = None
    weights: Tensor | None = None

    def with_normalized_table(self) -> Problem:
        """The same problem over a table of normalised rows; autograd goes through the normalisation."""
        if self.normalize_eps is None:
            return self
        table_ID = normalized(self.table, self.normalize_eps)
        return replace(self, table=table_ID, normalize_eps=None)

    def keeping_targets(self) -> Problem:
        """A target is always seen: where it is among the excluded, -1 (nobody's name) takes its place."""
        if self.excluded is None or self.targets is None:
            return self
        target_T = self.targets if self.names is None else self.names[self.targets]
        return replace(self, excluded=self.excluded.masked_fill(self.excluded == target_T[:, None], -1))

    def exclude(self, logits_CI: Tensor, queries: slice = slice(None)) -> Tensor:
        """Turns the logits of what the queries of a chunk don't see into -inf, in place."""
        if self.excluded is None:
            return logits_CI
        excluded_CX = self.excluded[queries].long()
        if self.names is not None:
            for x in range(excluded_CX.shape[1]):
                logits_CI.masked_fill_(self.names[None, :] == excluded_CX[:, x, None], -torch.inf)
            return logits_CI
        nobody = excluded_CX < 0
        change_CX = logits_CI.new_full(excluded_CX.shape, -torch.inf).masked_fill_(nobody, 0.0)
        return logits_CI.scatter_add_(1, excluded_CX.masked_fill(nobody, 0), change_CX)


def check(problem: Problem) -> None:
    """Raises ValueError, TypeError or IndexError, in one sentence, for arguments that don't fit."""
    queries, table = problem.queries, problem.table
    check_logits(problem)
    if table.shape[0] == 0:
        raise ValueError("the table has no rows: there is nothing to sum over")
    _check_excluded(problem)
    if problem.targets is not None:
        check_targets(problem.targets, problem.weights, queries.shape[0], table.shape[0])


def _check_excluded(problem: Problem) -> None:
    excluded, names, table = problem.excluded, problem.names, problem.table
    if names is not None and (names.shape != table.shape[:1] or names.is_floating_point()):
        raise ValueError(
            f"names must be ({table.shape[0]},) integers, one a table row, not {tuple(names.shape)} of {names.dtype}"
        )
    if excluded is None:
        return
    if excluded.dim() != 2 or excluded.shape[0] != problem.queries.shape[0] or excluded.is_floating_point():
        raise ValueError(
            f"excluded must be ({problem.queries.shape[0]}, X) integers, not {tuple(excluded.shape)} "
            f"of {excluded.dtype}"
        )
    if names is not None or not values_are_at_hand(excluded) or excluded.numel() == 0:
        return
    if int(excluded.max()) >= table.shape[0]:
        query, x = (excluded >= table.shape[0]).nonzero()[0].tolist()
        raise IndexError(
            f"excluded row {int(excluded[query, x])} (query {query}) is outside the table of {table.shape[0]} rows: "
            f"rows must lie in [0, {table.shape[0]}), or be -1 for none"
        )
