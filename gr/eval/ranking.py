"""Exact ranks of targets in the whole catalogue.

Shapes: B sequences, I catalogue size, E excluded items of all sequences.

rank = 1 + items scored strictly higher + half of the other items with exactly the target's score.  The half makes
a constant scorer's rank the middle of the catalogue instead of the first, so that ties do not look good.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.errors import UserError
from gr.eval.protocols import Request, Scorer


def ranks_of(scorer: Scorer, request: Request, items: int, max_scores: int = 2**24) -> Tensor:
    """(B,) float64 CPU ranks of the request's targets; at most ``max_scores`` scores (one row at least) at once.

    Raises UserError when a score is NaN, ValueError when the scorer's catalogue is not of ``items`` items.
    """
    parts = []
    for start, batch in _slices(request.batch, max(max_scores // items, 1)):
        stop = start + batch.sequences
        scores_BI = scorer.scores(batch)
        if scores_BI.shape != (stop - start, items):
            raise ValueError(
                f"{type(scorer).__name__}.scores gave {tuple(scores_BI.shape)}, not {(stop - start, items)}"
            )
        nan_B = torch.isnan(scores_BI.amax(1))  # max hands NaN on, without a mask of the scores' size
        if nan_B.any():
            user = request.users.tolist()[start + int(nan_B.nonzero()[0])]
            raise UserError(
                f"{type(scorer).__name__} scored items as NaN for {int(nan_B.sum())} users, the first is {user!r}: "
                "the model has diverged; evaluate an earlier checkpoint, or train with a lower learning rate"
            )
        offsets = request.exclude_offsets[start : stop + 1]
        excluded = request.exclude_items[offsets[0] : offsets[-1]]
        ranks = target_ranks(scores_BI, request.targets_B[start:stop], offsets - offsets[0], excluded)
        parts.append(ranks.cpu())
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def target_ranks(
    scores_BI: Tensor,
    targets_B: Tensor,
    exclude_offsets: Tensor | None = None,
    exclude_items: Tensor | None = None,
) -> Tensor:
    """(B,) float64 ranks.  Excluded items (jagged rows of each sequence; repeats count once, the target stays in)
    count neither as higher nor as ties."""
    items = scores_BI.shape[1]
    target_B = scores_BI.gather(1, targets_B[:, None])
    higher_B = (scores_BI > target_B).sum(1)
    equal_B = (scores_BI == target_B).sum(1) - 1
    if exclude_offsets is not None and exclude_items is not None and exclude_items.numel():
        rows_B = torch.arange(len(targets_B), device=scores_BI.device)
        owner_E = torch.repeat_interleave(rows_B, exclude_offsets.diff(), output_size=exclude_items.numel())
        pairs = torch.unique(owner_E * items + exclude_items)
        owner_E, item_E = pairs // items, pairs % items
        apart = item_E != targets_B[owner_E]
        owner_E, item_E = owner_E[apart], item_E[apart]
        score_E, bar_E = scores_BI[owner_E, item_E], target_B[owner_E, 0]
        higher_B = higher_B.index_add(0, owner_E, -(score_E > bar_E).long())
        equal_B = equal_B.index_add(0, owner_E, -(score_E == bar_E).long())
    return 1.0 + higher_B.double() + 0.5 * equal_B.double()


def _slices(batch: SequenceBatch, rows: int) -> Iterator[tuple[int, SequenceBatch]]:
    for start in range(0, batch.sequences, rows):
        yield start, batch.slice(start, min(start + rows, batch.sequences))
