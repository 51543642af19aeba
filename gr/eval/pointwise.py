"""The metrics of models that give probabilities of labels: AUC, GAUC, normalised entropy, log loss and calibration,
task by task.

AUC: the share of (positive, negative) pairs in which the positive has the higher logit, pairs of equal ones counted
half.  GAUC: the mean of the users' own AUC, by the number of their labels (``gauc``) or each as one (``gauc_mean``),
over users that have both labels; the others are counted beside it.  NE: the log loss over the entropy of the base rate
among the evaluated labels themselves (He et al. 2014), so that below 1 is better than knowing the base rate and nothing
else. Log loss: in nats, of the logit as float32.  Calibration: the sum of the probabilities over that of the labels.

All sums are integers, so that batches, processes and their number change no bit of a result: pairs are counted
(gr/eval/pairs.py), losses are added up in units of 2**-24 nats (a mean is off by 2**-25 at most), each as 2**10 nats at
most, probabilities in units of 2**-32.

Memory: 8 bytes a held-out action and task of this process, and 10 more; and once as much of another process.

Shapes: B held-out actions, K tasks, G groups (all of them, then the buckets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.config import EvalSection, RunConfig
from gr.errors import UserError
from gr.eval.family import Catalogue, MetricFamily
from gr.eval.metrics import HISTORY_EDGES, POPULARITY_EDGES, Groups
from gr.eval.pairs import BITS, ByUser, by_user, joined, ordered, wins
from gr.eval.protocols import Request
from gr.labels import Labels
from gr.processes import Axis

LOSS_UNIT, LARGEST_LOSS = 2.0**24, 2.0**10
PROBABILITY_UNIT = 2.0**32
KINDS = ("auc", "ne", "log_loss", "gauc", "gauc_mean")


@dataclass(frozen=True)
class Pairs:
    """What is found by comparing actions with each other: twice the pairs that are in order, by task and group, and the
    users' areas."""

    wins_KG: list[list[int]]
    by_user_KG: list[list[ByUser]]


class PointwiseMetrics(MetricFamily):
    """``labels``: of the tasks.  Scorers are asked ``logits(batch)``, (B, K), for the last action of each sequence.
    item_counts: (I,) training actions of each item; without them there is no breakdown by popularity."""

    heading = "labels of the last action"

    def __init__(self, config: EvalSection, labels: Labels, item_counts: Tensor | None = None) -> None:
        self.labels = labels
        tasks = len(labels.names)
        self.names = _names(labels.names)
        self.shown = _shown(labels.names)
        breakdowns: dict[str, Sequence[int]] = {"history": (0, *HISTORY_EDGES)} if config.buckets else {}
        self.item_counts = None if item_counts is None else item_counts.cpu()
        if config.buckets and item_counts is not None:
            breakdowns["popularity"] = POPULARITY_EDGES
        self.groups = Groups(breakdowns)
        self._labels_KG2 = torch.zeros(tasks, self.groups.count, 2, dtype=torch.int64)
        self._losses_KG = torch.zeros(tasks, self.groups.count, dtype=torch.int64)
        self._probabilities_KG = torch.zeros(tasks, self.groups.count, dtype=torch.int64)
        self._users_G = torch.zeros(self.groups.count, dtype=torch.int64)
        # kept of every action: its ordered logit and label by task, its user, its group of each breakdown (-1: none)
        self._keys: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._known: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._owners: list[Tensor] = []
        self._places: list[Tensor] = []
        self._pairs: Pairs | None = None

    @classmethod
    def of(cls, config: RunConfig, catalogue: Catalogue) -> Self:
        labels = Labels(config.model.tasks, catalogue.manifest)  # type: ignore[attr-defined]
        return cls(config.eval, labels, catalogue.training_counts if config.eval.buckets else None)

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
        self.labels.check(columns)
        labels_BK = self.labels.of(columns).cpu()
        values_B = {"history": request.history_lengths_B.cpu()} if "history" in self.groups.edges else {}
        if "popularity" in self.groups.edges and self.item_counts is not None:
            values_B["popularity"] = self.item_counts[request.targets_B.cpu()]
        groups = list(self.groups.of(len(request), **values_B))
        places_BG = torch.full((len(request), len(groups)), -1, dtype=torch.int8)
        for breakdown, (users_U, group_U) in enumerate(groups):
            self._users_G.index_add_(0, group_U, torch.ones_like(users_U))
            places_BG[users_U, breakdown] = group_U.to(torch.int8)
        self._places.append(places_BG)
        self._owners.append(request.batch.ordinals_B.cpu())
        self._pairs = None
        for task, (logits_B, labels_B) in enumerate(zip(logits_BK.T, labels_BK.T, strict=True)):
            self._keys[task].append(ordered(logits_B))
            self._known[task].append(torch.where(labels_B.isnan(), -1, labels_B).to(torch.int8))
            losses_B = F.binary_cross_entropy_with_logits(
                logits_B.double(), labels_B.double().nan_to_num(0), reduction="none"
            )
            losses_B = (losses_B.clamp_max(LARGEST_LOSS) * LOSS_UNIT).round().long()
            probabilities_B = (logits_B.double().sigmoid() * PROBABILITY_UNIT).round().long()
            for users_U, group_U in groups:
                known = ~labels_B[users_U].isnan()
                users, group = users_U[known], group_U[known]
                cells = group * 2 + labels_B[users].long()
                self._labels_KG2[task].view(-1).index_add_(0, cells, torch.ones_like(cells))
                self._losses_KG[task].index_add_(0, group, losses_B[users])
                self._probabilities_KG[task].index_add_(0, group, probabilities_B[users])

    def all_reduce(self, axis: Axis) -> None:
        for sums in (self._labels_KG2, self._losses_KG, self._probabilities_KG, self._users_G):
            axis.add_up(sums)
        self._pairs = self._compared(axis)

    @property
    def users(self) -> int:
        return int(self._users_G[0])

    def result(self) -> dict[str, float]:
        """By task: the metrics that exist, then the base rate, the calibration and the number of known labels; and how
        many users have both labels, and one class alone."""
        if not self.users:
            return {}
        return self._of_group(0)

    def by_bucket(self) -> dict[str, list[dict[str, Any]]]:
        return self.groups.buckets(self._users_G, self._of_group)

    def notes(self) -> list[str]:
        notes = []
        for task, name in enumerate(self.labels.names):
            areas = self._compare().by_user_KG[task][0]
            negatives, positives = self._labels_KG2[task, 0].tolist()
            if not negatives + positives:
                notes.append(f"no metrics of {name}: no user's label is known")
            elif not (negatives and positives):
                notes.append(
                    f"no auc/{name} and no ne/{name}: all {positives + negatives:,} labels are {int(positives > 0)}"
                )
            elif areas.users:
                notes.append(
                    f"gauc/{name} is of {areas.users:,} users; of {areas.one_class:,} others all labels are the same"
                )
        return notes

    def _compare(self) -> Pairs:
        """Of this process's actions, where nobody has added up."""
        if self._pairs is None:
            self._pairs = self._compared(Axis())
        return self._pairs

    def _compared(self, axis: Axis) -> Pairs:
        breakdowns = 1 + len(self.groups.edges)
        places_EG = torch.cat(self._places) if self._places else torch.empty(0, breakdowns, dtype=torch.int8)
        owners_E = joined(self._owners)
        wins_KG, by_user_KG = [], []
        breakdown_G = [0, *(n for n, bounds in enumerate(self.groups.edges.values(), 1) for _ in bounds)]
        for keys, known in zip(self._keys, self._known, strict=True):
            keys_E, labels_E = joined(keys), joined(known)
            total_G = torch.zeros(self.groups.count, dtype=torch.int64)
            for breakdown in range(breakdowns):
                group_E = places_EG[:, breakdown].long()
                whole_E = (group_E << BITS) + keys_E
                inside_E = group_E >= 0
                total_G += wins(
                    whole_E[inside_E & (labels_E == 1)],
                    whole_E[inside_E & (labels_E == 0)],
                    self.groups.count,
                    axis,
                )
            wins_KG.append(total_G.tolist())
            there_E = labels_E >= 0
            areas = []
            for group, breakdown in enumerate(breakdown_G):
                own_E = there_E & (places_EG[:, breakdown] == group)
                areas.append(by_user(owners_E[own_E], keys_E[own_E], labels_E[own_E] == 1, axis))
            by_user_KG.append(areas)
        return Pairs(wins_KG, by_user_KG)

    def _of_group(self, group: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for task, name in enumerate(self.labels.names):
            negatives, positives = self._labels_KG2[task, group].tolist()
            known = negatives + positives
            if known:
                rate = positives / known
                loss = self._losses_KG[task, group].item() / LOSS_UNIT / known
                if negatives and positives:
                    entropy = -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
                    auc = self._compare().wins_KG[task][group] / (2 * negatives * positives)
                    found |= {f"auc/{name}": auc, f"ne/{name}": loss / entropy}
                found |= {f"log_loss/{name}": loss, f"base_rate/{name}": rate}
                if positives:
                    expected = self._probabilities_KG[task, group].item() / PROBABILITY_UNIT
                    found[f"calibration/{name}"] = expected / positives
            found[f"labels/{name}"] = known
            areas = self._compare().by_user_KG[task][group]
            if areas.weighted is not None and areas.area is not None:
                found |= {f"gauc/{name}": areas.weighted, f"gauc_mean/{name}": areas.area}
                found |= {f"gauc_users/{name}": areas.users, f"one_class_users/{name}": areas.one_class}
        return found


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
