"""Evaluation of a run: the dataset's held-out requests, a scorer and a metric family, joined as the config says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gr import registry
from gr.config import RunConfig
from gr.data.dataset import SequenceDataset
from gr.data.popularity import training_sequences
from gr.data.requests import HeldOutRequests, requests
from gr.data.split import Split
from gr.errors import UserError
from gr.eval.evaluator import Advance, EvalResult, evaluate
from gr.eval.family import MetricFamily
from gr.models.model import Catalogue
from gr.processes import Processes


class Evaluation:
    """Evaluates scorers on the held-out splits of a dataset, as often as wanted.

    Keeps what does not change between evaluations: which blocks hold targets.  judged_by: the metric family.  Modules
    score on the processes' device, other scorers on the CPU; the users are dealt to the data axis.
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

    def run(self, name: str, scorer: Any, *, advance: Advance | None = None) -> EvalResult:
        """Metrics of ``scorer`` on the held-out split ``name``, the same on every rank."""
        held_out = self.requests(name)
        result = evaluate(
            scorer,
            held_out,
            self.family(),
            split=name,
            protocol={"exclude": self.config.eval.exclude},
            processes=self.processes,
            device=self.processes.device if isinstance(scorer, nn.Module) else "cpu",
            population=lambda: held_out.population,
            advance=advance,
        )
        if not result.users:
            raise UserError(
                f"no user of '{self.dataset.path}' has a held-out action in split '{name}': "
                "take it out of eval.splits, or change data.split",
                everywhere=True,
            )
        return result

    def family(self) -> MetricFamily:
        """The metrics, empty."""
        kind = registry.resolve(registry.METRICS, self.judged_by, "metric family")
        counts = self.catalogue.training_counts if self.config.eval.buckets else None
        return kind(self.config.eval, self.catalogue.rows, counts)

    def baselines(self, name: str, names: Sequence[str] | None = None) -> dict[str, EvalResult]:
        """Metrics of the baselines ``names`` (eval.baselines without it), each fitted to the training actions."""
        chosen = self.config.eval.baselines if names is None else names
        return {baseline: self.run(name, self.baseline(baseline)) for baseline in chosen}

    def baseline(self, name: str) -> Any:
        """The baseline ``name`` ready to score; it has seen training actions only.  It works on the CPU."""
        kind = registry.resolve(registry.BASELINES, name, "baseline (eval.baselines)")
        if not hasattr(kind, "fit"):  # knows the dataset's generator
            return kind(self.dataset)
        return kind().fit(training_sequences(self.dataset, self.split), self.dataset.items)

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
            )
        return self._requests[name]
