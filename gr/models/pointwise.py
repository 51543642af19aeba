"""What models that judge given items have in common: labels, tables, features, and the loss.

Shapes: B sequences, S candidates, K tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.batch import Jagged, SequenceBatch
from gr.config import RunConfig
from gr.embeddings.table import TableSpec
from gr.embeddings.view import View
from gr.labels import Labels
from gr.models.features import UNDER, Features
from gr.models.model import Catalogue, Model, refuse_objective
from gr.models.step import StepContext
from gr.models.tasks import NextItem, taken
from gr.modes import evaluating
from gr.processes import Processes


class Pointwise(Model):
    """Sequences in, losses or logits of the tasks out.

    The loss of a target is the mean over the tasks, weighted as they say, of the binary cross-entropy; an unknown label
    adds nothing to it (and its target counts as any other, so that the count needs no look at the data).  Parameters
    depend on (config.train.seed, their names) alone.  A kind of model says of a batch which candidates there are
    (:meth:`supervise`, :meth:`asked`), which rows it looks at, and their logits.
    """

    judged_by = "pointwise"
    entrances = ("logits",)

    def __init__(
        self, config: Any, run: RunConfig, catalogue: Catalogue, processes: Processes | None = None
    ) -> None:
        refuse_objective(run, config.name)
        labels = Labels(config.tasks, catalogue.manifest)
        spec = TableSpec(
            "items",
            catalogue.rows,
            config.dim,
            config.table_std,
            run.train.seed,
            maths=run.optimizer.build().of_rows(),
            apart=True,
        )
        processes = processes or Processes(torch.device("cpu"))
        task = NextItem.Config().build()
        features = Features(config.input.features, catalogue, task, spec, processes)
        super().__init__([config.table.build(spec, processes), *features.tables])
        labels.refuse_given(
            {f.column: f"{UNDER}.{f.name}" for f in features.features if f.of == "requests" and f.column}
        )
        self.labels, self.task = labels, task
        self.features, self.vocabularies = features, features.vocabularies
        self.needs = frozenset({"item"} | self.labels.columns | features.needs)

    @property
    def items(self):
        """The table of items."""
        return self.tables["items"]

    @property
    def columns_of_requests(self) -> list[str]:
        """Columns of actions that must be known of a request; the time where requests are told apart by it."""
        return self.features.columns_of_requests

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        return self.features.prepare(batch)

    def unseen(self) -> dict[str, tuple[int, int]]:
        return self.features.unseen

    def learn(self, batch: SequenceBatch, step: int) -> tuple[SequenceBatch, dict[str, Tensor]]:
        self.labels.check(batch.columns)
        return self.features.learn(batch, step)

    # -- what a kind of model says -----------------------------------------------------------------------------------

    @abstractmethod
    def asked(self, batch: SequenceBatch) -> Any:
        """As :meth:`supervise`, of an evaluation's batch: the last action of each sequence is the candidate, whose
        labels are not looked at."""

    @abstractmethod
    def rows_of(self, part: Any) -> dict[str, list[Tensor]]:
        """Row numbers of each table that a micro-batch looks at."""

    @abstractmethod
    def logits_of(self, part: Any, views: Mapping[str, View]) -> Tensor:
        """(S, K) log-odds of the candidates' labels."""

    # -- training ----------------------------------------------------------------------------------------------------

    def wanted(self, parts: Sequence[Any], context: StepContext) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {name: [] for name in self.tables}
        for part in parts:
            for name, rows in self.rows_of(part).items():
                found[name] += rows
        return found

    def forward(self, part: Any, context: StepContext) -> Tensor:
        logits_SK = self._logits(part, context)
        known_SK = ~part.labels_SK.isnan()
        labels_SK = part.labels_SK.masked_fill(~known_SK, 0).to(logits_SK.dtype)
        losses_SK = F.binary_cross_entropy_with_logits(logits_SK, labels_SK, reduction="none") * known_SK
        weights = self.labels.weights
        if len(set(weights)) == 1:
            return losses_SK.sum() / logits_SK.shape[1]
        each_K = losses_SK.sum(0)  # one by one: no tensor of weights that would have to go to the device
        return torch.stack([loss * weight for loss, weight in zip(each_K, weights)]).sum() / sum(weights)

    # -- evaluation: in evaluation mode, without gradients -----------------------------------------------------------

    def logits(self, batch: SequenceBatch) -> Tensor:
        """(B, K) float32: for the last action of each sequence, whose item and time are looked at and whose labels are
        not, the log-odds of each task's label."""
        with evaluating(self):
            part, context = self.asked(batch), StepContext(0)
            return self._logits(part, replace(context, views=self.fetch(self.wanted([part], context))))

    def scores(self, batch: SequenceBatch, candidates: Jagged, at_once: int = 256) -> Tensor:
        """(C, K) float32 log-odds of many candidates of each sequence, ``at_once`` of them at a time.

        candidates: B lists of int64 item rows on the model's device.  A sequence's last action stands in their place:
        it says when, and what else is known of the request; its item is not looked at.  What comes out is what
        :meth:`logits` gives for each by itself."""
        counts = candidates.offsets.diff().tolist()
        found = [batch.offsets_B1.new_empty(0, len(self.labels.names), dtype=torch.float32)]
        for sequence, (first, count) in enumerate(zip(candidates.offsets.tolist(), counts)):
            alone = batch.slice(sequence, sequence + 1)
            for start in range(first, first + count, at_once):
                items = candidates.values[start : min(start + at_once, first + count)]
                found.append(self.logits(repeated(alone, items)))
        return torch.cat(found)

    def _logits(self, part: Any, context: StepContext) -> Tensor:
        return self.logits_of(part, context.views)


def repeated(alone: SequenceBatch, items_C: Tensor) -> SequenceBatch:
    """A batch of one sequence, once for each item, which stands in its last action's place."""
    count, n, device = len(items_C), alone.actions, items_C.device
    again = torch.arange(n, device=device).repeat(count)
    offsets_B1 = torch.arange(count + 1, device=device) * n
    user = torch.zeros(count, dtype=torch.int64, device=device)
    columns = {name: taken(column, again) for name, column in alone.columns.items()}
    columns["item"] = columns["item"].index_copy(0, offsets_B1[1:] - 1, items_C)
    return SequenceBatch(
        offsets_B1,
        alone.ordinals_B[user],
        (n,) * count,
        columns,
        {name: taken(column, user) for name, column in alone.user_columns.items()},
    )
