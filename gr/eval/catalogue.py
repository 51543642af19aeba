"""The metrics of retrieval: the target's exact rank in the whole catalogue, as HR@k, NDCG@k and MRR, and its loss.

A model's loss is of the softmax over its own scores of the whole catalogue.  Full softmax trains just that; sampled
softmax something near it, the nearer the more negatives (uniform ones, or any with logq); the objectives of pairs
(bce, bpr) leave the scores' level free, so that there it compares a model with itself.  The loss that is trained on,
of a sample or not, is in the training's rows.

Shapes: B sequences, I catalogue size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.config import EvalSection, RunConfig
from gr.embeddings.ranks import Excluded, Standing, ranks_in
from gr.errors import UserError
from gr.eval.family import Catalogue, MetricFamily
from gr.eval.metrics import HISTORY_EDGES, LOSS, POPULARITY_EDGES, RankMetrics, rank_metric_names
from gr.eval.protocols import Request
from gr.processes import Axis

SLICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "warm": lambda counts_B, cold: counts_B >= cold,
    "cold": lambda counts_B, cold: counts_B < cold,
    "new": lambda counts_B, cold: counts_B == 0,
}
"""Which targets belong to a slice, by their training actions and ``eval.cold``.  What is new is cold as well."""


class CatalogueMetrics(MetricFamily):
    """``items``: I.  item_counts: (I,) training actions of each item; without them there is no breakdown by
    popularity, nor are there slices."""

    heading = "whole catalogue ranked"
    eval_keys = frozenset({"ks", "exclude", "max_scores", "cold"})

    def __init__(self, config: EvalSection, items: int, item_counts: Tensor | None = None) -> None:
        self.items, self.max_scores = items, config.max_scores
        self.item_counts = None if item_counts is None else item_counts.cpu()
        self.breakdowns: dict[str, Sequence[int]] = {"history": HISTORY_EDGES} if config.buckets else {}
        if config.buckets and item_counts is not None:
            self.breakdowns["popularity"] = POPULARITY_EDGES
        self.ranks = RankMetrics(config.ks, self.breakdowns)
        self.cold = config.cold or 0
        sliced = SLICES if config.cold is not None and item_counts is not None else {}
        self.slices = {name: RankMetrics(config.ks) for name in sliced}
        self.names = _names(config.ks, self.slices)
        self.shown = _shown(self.names)

    @classmethod
    def of(cls, config: RunConfig, catalogue: Catalogue) -> Self:
        counted = config.eval.buckets or config.eval.cold is not None
        counts = catalogue.training_counts if counted else None
        return cls(config.eval, catalogue.rows, counts)

    @staticmethod
    def names_of(config: RunConfig) -> list[str]:
        return _names(config.eval.ks, SLICES if config.eval.cold is not None else {})

    @staticmethod
    def shown_of(config: RunConfig) -> list[str]:
        return _shown(rank_metric_names(config.eval.ks))

    @staticmethod
    def protocol_of(config: RunConfig) -> dict[str, Any]:
        return {"exclude": config.eval.exclude}

    def add(self, scorer: Any, request: Request) -> None:
        values = {}
        if "history" in self.breakdowns:
            values["history"] = request.history_lengths_B.cpu()
        counts_B = None if self.item_counts is None else self.item_counts[request.targets_B.cpu()]
        if "popularity" in self.breakdowns and counts_B is not None:
            values["popularity"] = counts_B
        ranks_B, losses_B = judged(scorer, request, self.items, self.max_scores)
        self.ranks.add(ranks_B, losses_B, **values)
        if counts_B is not None:
            for name, ranks in self.slices.items():
                ranks.add(ranks_B[SLICES[name](counts_B, self.cold)])

    def all_reduce(self, axis: Axis) -> None:
        for ranks in (self.ranks, *self.slices.values()):
            ranks.all_reduce(axis)

    @property
    def users(self) -> int:
        return self.ranks.users

    def result(self) -> dict[str, float]:
        """A slice that nobody is in has no figures but the number of its users."""
        found = self.ranks.result()
        for name, ranks in self.slices.items():
            figures = {"users": ranks.users, **ranks.result()}
            found |= {f"{kind}/{name}": value for kind, value in figures.items() if kind != "mrr"}
        return found

    def by_bucket(self) -> dict[str, list[dict[str, Any]]]:
        return self.ranks.by_bucket()


def _names(ks: Sequence[int], slices: Iterable[str]) -> list[str]:
    kinds = ["users", *(name for name in rank_metric_names(ks) if "@" in name)]
    return [*rank_metric_names(ks), LOSS, *(f"{kind}/{name}" for name in slices for kind in kinds)]


def _shown(names: Sequence[str]) -> list[str]:
    """Those that are read most, as far as eval.ks has them."""
    return [name for name in ("hr@10", "ndcg@10", "hr@50", "hr@200") if name in names] + ["mrr", LOSS]


def judged(
    scorer: Any, request: Request, items: int, max_scores: int = 2**24
) -> tuple[Tensor, Tensor | None]:
    """(B,) float64 CPU ranks of the request's targets, and their losses where the scores of ``scorer`` are a model's or
    probabilities; at most ``max_scores`` scores (one row at least) at once.

    scorer: a model, which judges where its table is, or a :class:`gr.eval.protocols.Scorer`.  Raises UserError when a
    score is NaN or a loss not finite, ValueError when a scorer's catalogue is not of ``items`` items.
    """
    ranks, losses = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.float64)]
    together = getattr(scorer, "collective", False)  # then its table minds the number of scores
    slices = [(0, request.batch)] if together else _slices(request.batch, max(max_scores // items, 1))
    told = True
    for start, batch in slices:
        stop = start + batch.sequences
        offsets = request.exclude_offsets[start : stop + 1]
        exclude = (offsets - offsets[0], request.exclude_items[offsets[0] : offsets[-1]])
        ranks_B, losses_B = _judged(scorer, batch, request.targets_B[start:stop], items, exclude)
        ranks_B = ranks_B.cpu()
        broken_B = ranks_B.isnan()
        if losses_B is not None:
            losses_B = losses_B.cpu()
            broken_B |= ~losses_B.isfinite()
            losses.append(losses_B)
        if broken_B.any():
            user = request.users.tolist()[start + int(broken_B.nonzero()[0])]
            raise UserError(
                f"{type(scorer).__name__} scored items as NaN for {int(broken_B.sum())} users, the first is "
                f"{user!r}: the model has diverged; evaluate an earlier checkpoint, or train with a lower learning rate"
            )
        ranks.append(ranks_B)
        told = told and losses_B is not None
    return torch.cat(ranks), torch.cat(losses) if told else None


def _judged(
    scorer: Any, batch: SequenceBatch, targets_B: Tensor, items: int, exclude: Excluded
) -> tuple[Tensor, Tensor | None]:
    if hasattr(scorer, "standing"):
        standing: Standing = scorer.standing(batch, targets_B, exclude)
        return standing.ranks_B, standing.losses_B
    scores_BI = scorer.scores(batch)
    if scores_BI.shape != (batch.sequences, items):
        raise ValueError(
            f"{type(scorer).__name__}.scores gave {tuple(scores_BI.shape)}, not {(batch.sequences, items)}"
        )
    losses_B = None
    if getattr(scorer, "gives_probabilities", False):
        own_B = scores_BI.gather(1, targets_B[:, None])[:, 0].double()
        losses_B = scores_BI.sum(1, dtype=torch.float64).log() - own_B.log()
    return ranks_in(scores_BI, targets_B, exclude), losses_B


def _slices(batch: SequenceBatch, rows: int) -> Iterator[tuple[int, SequenceBatch]]:
    for start in range(0, batch.sequences, rows):
        yield start, batch.slice(start, min(start + rows, batch.sequences))
