"""The metrics of models that give probabilities of labels: AUC, normalised entropy and log loss, task by task.

AUC: the share of (positive, negative) pairs in which the positive has the higher logit, pairs of equal ones counted
half.  NE: the log loss over the entropy of the base rate among the evaluated labels themselves (He et al. 2014), so
that below 1 is better than knowing the base rate and nothing else.  Log loss: in nats, of the logit as float32.

All sums are integers, so that batches, processes and their number change no bit of a result:

- Logits are counted in 2**16 bins of width 2**-11 between -16 and 16, what lies beyond in the outermost.  Pairs of
  different bins are in their true order; those that share one count half, whatever their order.  So AUC is off by half
  the share of pairs that have a bin in common, at most: that bound is part of the heading.
- Losses are added up in units of 2**-24 nats (a mean is off by 2**-25 at most), each as 2**10 nats at most.

Shapes: B users, K tasks, G groups (all users, then the buckets), N bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.config import EvalSection, RunConfig
from gr.errors import UserError
from gr.eval.family import Catalogue, MetricFamily
from gr.eval.metrics import HISTORY_EDGES, Groups
from gr.eval.protocols import Request
from gr.labels import Labels
from gr.processes import Axis

BINS, WIDTH = 2**16, 2.0**-11
LOSS_UNIT, LARGEST_LOSS = 2.0**24, 2.0**10
KINDS = ("auc", "ne", "log_loss")


class PointwiseMetrics(MetricFamily):
    """``labels``: of the tasks.  Scorers are asked ``logits(batch)``, (B, K), for the last action of each sequence."""

    def __init__(self, config: EvalSection, labels: Labels) -> None:
        self.labels = labels
        tasks = len(labels.names)
        self.names = _names(labels.names)
        self.shown = _shown(labels.names)
        self.groups = Groups({"history": HISTORY_EDGES} if config.buckets else {})
        self._counts_KG2N = torch.zeros(tasks, self.groups.count, 2, BINS, dtype=torch.int64)
        self._losses_KG = torch.zeros(tasks, self.groups.count, dtype=torch.int64)
        self._users_G = torch.zeros(self.groups.count, dtype=torch.int64)

    @classmethod
    def of(cls, config: RunConfig, catalogue: Catalogue) -> Self:
        return cls(config.eval, Labels(config.model.tasks, catalogue.manifest))  # type: ignore[attr-defined]

    @staticmethod
    def names_of(config: RunConfig) -> list[str]:
        return _names(config.model.tasks)  # type: ignore[attr-defined]

    @staticmethod
    def shown_of(config: RunConfig) -> list[str]:
        return _shown(config.model.tasks)  # type: ignore[attr-defined]

    def add(self, scorer: Any, request: Request) -> None:
        logits_BK = _logits(scorer, request, len(self.labels.names))
        last_B = request.batch.offsets_B1[1:] - 1
        columns = {name: request.batch.columns[name][last_B] for name in self.labels.columns}
        labels_BK = self.labels.of(columns).cpu()
        groups = list(self.groups.of(len(request), history=request.history_lengths_B.cpu()))
        for users_U, group_U in groups:
            self._users_G.index_add_(0, group_U, torch.ones_like(users_U))
        for task, (logits_B, labels_B) in enumerate(zip(logits_BK.T, labels_BK.T, strict=True)):
            bins_B = (logits_B / WIDTH).floor().clamp(-BINS // 2, BINS // 2 - 1).long() + BINS // 2
            losses_B = F.binary_cross_entropy_with_logits(
                logits_B.double(), labels_B.double().nan_to_num(0), reduction="none"
            )
            losses_B = (losses_B.clamp_max(LARGEST_LOSS) * LOSS_UNIT).round().long()
            for users_U, group_U in groups:
                known = ~labels_B[users_U].isnan()
                users, group = users_U[known], group_U[known]
                cells = (group * 2 + labels_B[users].long()) * BINS + bins_B[users]
                self._counts_KG2N[task].view(-1).index_add_(0, cells, torch.ones_like(cells))
                self._losses_KG[task].index_add_(0, group, losses_B[users])

    def all_reduce(self, axis: Axis) -> None:
        for sums in (self._counts_KG2N, self._losses_KG, self._users_G):
            axis.add_up(sums)

    @property
    def users(self) -> int:
        return int(self._users_G[0])

    @property
    def heading(self) -> str:  # type: ignore[override]
        bounds = [found[1] for task in range(len(self.labels.names)) if (found := self._auc(task, 0))]
        return "labels of the last action" + (f", AUC exact to {max(bounds):.0e}" if bounds else "")

    def result(self) -> dict[str, float]:
        """By task: the metrics that exist, then the base rate and the number of known labels."""
        return self._of_group(0) if self.users else {}

    def by_bucket(self) -> dict[str, list[dict[str, Any]]]:
        return self.groups.buckets(self._users_G, self._of_group)

    def notes(self) -> list[str]:
        notes = []
        for task, name in enumerate(self.labels.names):
            negatives, positives = self._counts_KG2N[task, 0].sum(1).tolist()
            if not negatives + positives:
                notes.append(f"no metrics of {name}: no user's label is known")
            elif not (negatives and positives):
                notes.append(
                    f"no auc/{name} and no ne/{name}: all {positives + negatives:,} labels are {int(positives > 0)}"
                )
        return notes

    def _of_group(self, group: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for task, name in enumerate(self.labels.names):
            negatives, positives = self._counts_KG2N[task, group].sum(1).tolist()
            known = negatives + positives
            if known:
                rate = positives / known
                loss = self._losses_KG[task, group].item() / LOSS_UNIT / known
                auc = self._auc(task, group)
                if auc is not None:
                    entropy = -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
                    found |= {f"auc/{name}": auc[0], f"ne/{name}": loss / entropy}
                found |= {f"log_loss/{name}": loss, f"base_rate/{name}": rate}
            found[f"labels/{name}"] = known
        return found

    def _auc(self, task: int, group: int) -> tuple[float, float] | None:
        """AUC and by how much it may be off; None without both labels."""
        negatives_N, positives_N = self._counts_KG2N[task, group]
        pairs = int(negatives_N.sum()) * int(positives_N.sum())
        if not pairs:
            return None
        below_N = negatives_N.cumsum(0) - negatives_N
        shared = int((positives_N * negatives_N).sum())
        return (2 * int((positives_N * below_N).sum()) + shared) / (2 * pairs), shared / (2 * pairs)


def _names(tasks: Sequence[str]) -> list[str]:
    return [f"{kind}/{task}" for task in tasks for kind in KINDS]


def _shown(tasks: Sequence[str]) -> list[str]:
    return [f"{kind}/{task}" for task in tasks for kind in KINDS[:2]]


def _logits(scorer: Any, request: Request, tasks: int) -> Tensor:
    """(B, K) float32 on the CPU, finite."""
    logits_BK = scorer.logits(request.batch).float().cpu()
    if logits_BK.shape != (len(request), tasks):
        raise ValueError(
            f"{type(scorer).__name__}.logits gave {tuple(logits_BK.shape)}, not {(len(request), tasks)}"
        )
    broken_B = ~logits_BK.isfinite().all(1)
    if broken_B.any():
        user = request.users.tolist()[int(broken_B.nonzero()[0])]
        raise UserError(
            f"{type(scorer).__name__} gave logits that are no finite numbers for {int(broken_B.sum())} users, the "
            f"first is {user!r}: the model has diverged; evaluate an earlier checkpoint, or train with a lower "
            "learning rate"
        )
    return logits_BK
