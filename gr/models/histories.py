"""Candidates with the actions before them, for models that look at each pair of a candidate and an earlier action.

Shapes: A actions of the batch, S candidates, P pairs, K tasks, D model width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gr import registry
from gr.batch import TARGETS_FROM, SequenceBatch
from gr.config import FRACTION, POSITIVE, ComponentConfig, InputSection, component
from gr.embeddings.view import View
from gr.labels import TASKS, Labels, idle_weights
from gr.models.features import Features, sum_of
from gr.models.layout import sequence_of_rows
from gr.models.pointwise import Pointwise
from gr.models.tasks import Known, places_asked
from gr.processes import Axis


@dataclass(frozen=True)
class Histories:
    """A micro-batch.

    items_A: int64 item rows.  labels_AK: float32, NaN where unknown.  targets_S_in_A: int64, the candidates' places.
    pairs_P: int64, the places of the actions before each candidate, cut at offsets_S1.  labels_SK: of the candidates,
    empty in a request.  known: by feature, at each action.  dropout_key: 64 bits."""

    items_A: Tensor
    labels_AK: Tensor
    targets_S_in_A: Tensor
    pairs_P: Tensor
    offsets_S1: Tensor
    labels_SK: Tensor
    known: Mapping[str, Known]
    dropout_key: int = 0

    @property
    def count(self) -> int:
        """S."""
        return self.targets_S_in_A.shape[0]

    @property
    def targets_S(self) -> Tensor:
        """int64 item rows."""
        return self.items_A[self.targets_S_in_A]

    @property
    def owners_P(self) -> Tensor:
        """int64: the candidate of each pair."""
        return sequence_of_rows(self.offsets_S1, self.pairs_P.shape[0])

    def part_of(self, context: Axis) -> Histories:
        """Sequences are whole: these models aren't cuttable."""
        return self


def histories(
    batch: SequenceBatch, features: Features, labels: Labels, dropout_key: int = 0, last_alone: bool = False
) -> Histories:
    """Of a prepared batch: every action but the first of each sequence is a candidate, or those that the batch says are
    targets; ``last_alone``: the last of each, and no label of it is looked at.  Waits for a device, for the number of
    pairs."""
    sequences_A = sequence_of_rows(batch.offsets_B1, batch.actions)
    places_A = torch.arange(batch.actions, device=sequences_A.device) - batch.offsets_B1[sequences_A]
    if last_alone:
        targets_S = places_asked(batch)
    else:
        from_B = batch.user_columns.get(TARGETS_FROM)
        first_A = 1 if from_B is None else from_B[sequences_A]
        targets_S = (places_A >= first_A).nonzero().squeeze(1)
    counts_S = places_A[targets_S]
    offsets_S1 = F.pad(counts_S.cumsum(0), (1, 0))
    owners_P = sequence_of_rows(offsets_S1, int(offsets_S1[-1]))
    first_S = targets_S - counts_S
    pairs_P = torch.arange(owners_P.shape[0], device=owners_P.device) + (first_S - offsets_S1[:-1])[owners_P]
    labels_AK = labels.of(batch.columns)
    return Histories(
        items_A=batch.items_T,
        labels_AK=labels_AK,
        targets_S_in_A=targets_S,
        pairs_P=pairs_P,
        offsets_S1=offsets_S1,
        labels_SK=labels_AK[:0] if last_alone else labels_AK[targets_S],
        known={f.name: features.known_at(batch, f.name, sequences_A) for f in features.features},
        dropout_key=dropout_key,
    )


class OfHistories(Pointwise):
    """A model of candidates with the actions before each."""

    class Config(ComponentConfig):
        """table, table_std, input, tasks: as in ranking; of ``input`` the features alone."""

        dim: POSITIVE = 32
        table: component(registry.TABLES, "model.table", default="local")
        table_std: Annotated[float, Field(ge=0)] = 0.02
        input: InputSection = InputSection()
        tasks: TASKS
        hidden_dropout: FRACTION = 0.0

        def idle(self) -> dict[str, str]:
            why = "a candidate's past has no order for this model"
            return dict.fromkeys(("input.positions", "input.scale", "input.dropout"), why) | idle_weights(
                self.tasks
            )

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Histories:
        return histories(self.prepare(batch), self.features, self.labels, dropout_key)

    def asked(self, batch: SequenceBatch) -> Histories:
        return histories(self.prepare(batch), self.features, self.labels, last_alone=True)

    def rows_of(self, part: Histories) -> dict[str, list[Tensor]]:
        return {"items": [part.items_A], **{name: [known.rows_V] for name, known in part.known.items()}}

    @abstractmethod
    def logits_of(self, part: Histories, views: Mapping[str, View]) -> Tensor: ...

    def of_items(self, part: Histories, views: Mapping[str, View]) -> Tensor:
        """(A, D) each action's item, what is known of it included."""
        items_AD = views["items"].lookup(part.items_A)
        return _added(items_AD, sum_of(self._kinds(part)["items"], views, part.items_A.shape[0]))

    def of_requests(self, part: Histories) -> dict[str, Known]:
        """What is known of the user and the moment, at each candidate."""
        return {name: known.at(part.targets_S_in_A) for name, known in self._kinds(part)["shown"].items()}

    def of_past(self, part: Histories, items_AD: Tensor, views: Mapping[str, View]) -> Tensor:
        """(A, D) each action as something past: its item and what is known since."""
        return _added(items_AD, sum_of(self._kinds(part)["done"], views, part.items_A.shape[0]))

    def _kinds(self, part: Histories) -> dict[str, dict[str, Known]]:
        return self.features.by_kind(part.known)


def _added(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one + other
