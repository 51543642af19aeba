"""Evaluation of a run: the dataset's held-out requests, a scorer and a metric family, joined as the config says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gr import registry
from gr.config import RunConfig
from gr.data.dataset import SequenceDataset
from gr.data.popularity import training_sequences
from gr.data.requests import HeldOutRequests, requests
from gr.data.split import Split
from gr.data.targets import TargetKinds
from gr.errors import UserError, nearest
from gr.eval.evaluator import Advance, EvalResult, evaluate
from gr.eval.family import MetricFamily
from gr.labels import Labels
from gr.models.model import Catalogue
from gr.processes import Processes
from gr.train.selection import metric_family


class Evaluation:
    """Evaluates scorers on the held-out splits of a dataset, as often as wanted.

    Keeps what does not change between evaluations: which blocks hold targets, what kinds of targets they are.
    judged_by: the metric family.  Modules score on the processes' device, other scorers on the CPU; the users are
    dealt to the data axis.
    columns: of actions that the scorers need beside ``item``; all of numbers without it.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        split: Split,
        config: RunConfig,
        catalogue: Catalogue,
        *,
        judged_by: str = "catalogue",
        processes: Processes | None = None,
        columns: Iterable[str] | None = None,
    ):
        self.dataset, self.split, self.config, self.catalogue = dataset, split, config, catalogue
        self.processes = processes or Processes(torch.device("cpu"))
        self.judged_by, self.columns = judged_by, columns
        self._requests: dict[str, HeldOutRequests] = {}
        self._targets: dict[str, dict[str, float]] = {}

    def at(self, epoch: int) -> Evaluation:
        """Itself, or where each epoch holds out targets of its own the evaluation of these."""
        split = self.split.at(epoch)
        if split is self.split:
            return self
        other = copy(self)
        other.split, other._requests, other._targets = split, {}, {}
        return other

    def run(self, name: str, scorer: Any, *, advance: Advance | None = None) -> EvalResult:
        """Metrics of ``scorer`` on the held-out split ``name``, the same on every rank."""
        held_out = self.requests(name)
        result = evaluate(
            scorer,
            held_out,
            self.family(),
            split=name,
            protocol=metric_family(self.judged_by).protocol_of(self.config),
            processes=self.processes,
            device=self.processes.device if isinstance(scorer, nn.Module) else "cpu",
            population=lambda: held_out.population,
            advance=advance,
        )
        if not result.users:
            raise UserError(
                f"no user of '{self.dataset.path}' has a held-out action in split '{name}': {self.split.without}",
                everywhere=True,
            )
        if name not in self._targets:
            assert held_out.kinds is not None
            counts = self.processes.data.sum(held_out.kinds.counts.tolist(), dtype=torch.int64)
            self._targets[name] = held_out.kinds.shares(counts)
        return replace(result, targets=self._targets[name], judged=self.judged)

    @property
    def judged(self) -> str:
        """What the held-out targets are called: by the dataset's rows or, where a row may have several, "actions"."""
        return "actions" if self.split.several else self.dataset.manifest.rows_are

    def family(self) -> MetricFamily:
        """The metrics, empty."""
        return metric_family(self.judged_by).of(self.config, self.catalogue)

    def baselines(self, name: str, names: Sequence[str] | None = None) -> dict[str, EvalResult]:
        """Metrics of the baselines ``names`` (eval.baselines without it), each fitted to the training actions."""
        chosen = self.config.eval.baselines if names is None else names
        return {baseline: self.run(name, self.baseline(baseline)) for baseline in chosen}

    def baseline(self, name: str) -> Any:
        """The baseline ``name`` ready to score; it has seen training actions only.  It works on the CPU."""
        kind = baseline_kind(name, self.judged_by)
        if not hasattr(kind, "fit"):  # knows the dataset's generator
            return kind(self.dataset)
        of_labels = self.judged_by == "pointwise"
        scorer = kind(Labels(self.config.model.tasks, self.catalogue.manifest)) if of_labels else kind()  # type: ignore[attr-defined]
        return scorer.fit(
            training_sequences(self.dataset, self.split.before(), scorer.needs), self.dataset.items
        )

    def requests(self, name: str) -> HeldOutRequests:
        """This rank's requests of split ``name``."""
        if name not in self._requests:
            config, data = self.config.eval, self.processes.data
            self._requests[name] = requests(
                self.dataset,
                self.split,
                name,
                max_length=self.config.data.max_length,
                exclude=config.exclude,
                batch=config.batch,
                rank=data.rank,
                world=data.size,
                max_users=config.max_users,
                columns=self.columns,
                kinds=TargetKinds(lambda: self.split.seen(self.catalogue), timed=self.dataset.has_timestamps),
            )
        return self._requests[name]


def baseline_kind(name: str, judged_by: str) -> Any:
    """The class of baseline ``name``, if the metric family ``judged_by`` can judge it."""
    kind = registry.resolve(registry.BASELINES, name, "baseline (eval.baselines)")
    if kind.judged_by != judged_by:
        does = {
            "catalogue": ("ranks the catalogue", "this model gives probabilities of labels"),
            "pointwise": ("gives probabilities of labels", "this model ranks the catalogue"),
        }[kind.judged_by]
        others = [other for other in registry.BASELINES if _judged_by(other) == judged_by]
        raise UserError(f"baseline '{name}' {does[0]}, and {does[1]}: {nearest('', others)}")
    return kind


def _judged_by(name: str) -> str:
    return registry.resolve(registry.BASELINES, name, "baseline").judged_by
