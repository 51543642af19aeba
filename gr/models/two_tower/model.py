"""TwoTower: the probability of a label from fields of a user and of an item.

Each action of a row is an impression, judged by itself: no history is read.  Fields -> their tables' vectors ->
network (gr/models/two_tower/joint.py, towers.py) -> log-odds.

Shapes: B rows of the dataset, T actions of the batch, S impressions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from gr import registry
from gr.batch import Jagged, SequenceBatch
from gr.config import POSITIVE, ComponentConfig, RunConfig, component
from gr.embeddings.table import TableSpec
from gr.embeddings.view import View
from gr.errors import UserError
from gr.labels import TASKS, Labels, idle_weights
from gr.models.init import initialise
from gr.models.model import Catalogue, Model, refuse_objective
from gr.models.step import StepContext
from gr.models.tasks import places_asked
from gr.models.two_tower.fields import Known, Looked, Side, SideSection, fields_of
from gr.models.two_tower.network import Network, Pairs, Shape
from gr.modes import evaluating
from gr.processes import Axis, Processes


@dataclass(frozen=True)
class Impressions:
    """A micro-batch.  user, item: what is known of each.  items_S: int64 item rows.  labels_S: float32, NaN where
    unknown; None in a request.  key: of dropout."""

    user: Known
    item: Known
    items_S: Tensor
    labels_S: Tensor | None
    key: int = 0

    @property
    def count(self) -> int:
        """S."""
        return len(self.items_S)

    @property
    def targets_S(self) -> Tensor:
        return self.items_S

    @property
    def rows(self) -> dict[str, Tensor | Jagged]:
        """By field, of both sides."""
        return {**self.user.rows, **self.item.rows}

    def part_of(self, context: Axis) -> Impressions:
        """All of it: an impression is one row, which nobody shares."""
        return self


class TwoTower(Model):
    """Impressions in, losses or log-odds out.

    The loss of an impression is the binary cross-entropy of its label, and ``l2`` times the squares of all that it
    looks up (so that neither micro-batches nor processes change it), and what the network adds.
    """

    class Config(ComponentConfig):
        """dim: of the fields' vectors.  table_std: of their first values.  tasks: the one label (gr.labels); where it
        is ``any_of: [1]`` of a column, values other than 0 and 1 are refused."""

        name: Literal["two_tower"] = "two_tower"
        dim: POSITIVE = 32
        table_std: Annotated[float, Field(ge=0)] = 1e-4
        user: SideSection
        item: SideSection
        network: component(registry.NETWORKS, "model.network")
        tasks: Annotated[TASKS, Field(max_length=1)]
        l2: Annotated[float, Field(ge=0)] = 1e-5
        table: component(registry.TABLES, "model.table", default="local")

        @model_validator(mode="after")
        def _sides(self) -> TwoTower.Config:
            for name, field in self.user.fields.items():
                if field.catalogue is not None or field.column == "item":
                    raise UserError(
                        f"config key 'model.user.fields.{name}' is known of an item: give it to model.item.fields"
                    )
            return self

        def idle(self) -> dict[str, str]:
            return idle_weights(self.tasks)

    judged_by = "pointwise"
    entrances = ("logits",)

    def __init__(
        self, config: Config, run: RunConfig, catalogue: Catalogue, processes: Processes | None = None
    ) -> None:
        refuse_objective(run, config.name)
        processes = processes or Processes(torch.device("cpu"))
        labels = Labels(config.tasks, catalogue.manifest)
        kind: type[Network] = config.network.component()
        spec = TableSpec(
            "",
            0,
            kind.table_width(config.network, config.dim),
            config.table_std,
            run.train.seed,
            bias=kind.firsts,
            maths=run.optimizer.build().of_rows(),
            apart=True,
        )
        fields_of([config.user, config.item])
        user = Side("user", config.user, catalogue, spec, processes)
        item = Side("item", config.item, catalogue, spec, processes)
        labels.refuse_given(user.reads | item.reads)
        shapes = [_shape(side) for side in (user, item)]
        network: Network = config.network.build(*shapes, spec.dim, processes.data)
        beside = [config.table.build(extra, processes) for extra in network.tables_beside(spec)]
        super().__init__([*user.tables, *item.tables, *beside])
        self.labels, self.user, self.item, self.network, self.l2 = labels, user, item, network, config.l2
        self.needs = frozenset({"item"} | labels.columns | user.needs | item.needs)
        self.lockstep = network.exchanges and processes.data.size > 1
        initialise(self, run.train.seed)

    # -- training -------------------------------------------------------------------------------------------------

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        prepared = self.item.prepare(self.user.prepare(batch))
        if prepared is not batch:  # looked at once, on the CPU
            self.labels.check(batch.columns)
        return prepared

    def unseen(self) -> dict[str, tuple[int, int]]:
        return self.user.unseen | self.item.unseen

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Impressions:
        places_S = torch.arange(batch.actions, device=batch.items_T.device)
        labels_SK = self.labels.of(batch.columns)
        return replace(self._impressions(batch, places_S), labels_S=labels_SK[:, 0], key=dropout_key)

    def wanted(self, parts: Sequence[Impressions], context: StepContext) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {name: [] for name in self.tables}
        for part in parts:
            beside = self.network.wanted_beside(part.rows)
            for name, rows in (part.user.wanted() | part.item.wanted() | beside).items():
                found[name] += rows
        return found

    def views(self, parts: Sequence[Impressions], context: StepContext) -> dict[str, View]:
        if len(parts) > 1 and self.network.whole_batches:
            most = max(part.count for part in parts)
            raise UserError(
                f"a process's share of a batch is cut after {most} impressions, and the network normalises over all of "
                "them: raise train.micro_batch_actions, or lower train.global_batch",
                everywhere=True,
            )
        return super().views(parts, context)

    def forward(self, part: Impressions, context: StepContext) -> Tensor:
        assert part.labels_S is not None
        logits_S, beside = self._judged(part, context.views)
        known_S = ~part.labels_S.isnan()
        labels_S = part.labels_S.masked_fill(~known_S, 0).to(logits_S.dtype)
        losses_S = F.binary_cross_entropy_with_logits(logits_S, labels_S, reduction="none")
        total = (losses_S * known_S).sum()
        if self.l2:
            squares = self.user.squares(part.user, context.views) + self.item.squares(
                part.item, context.views
            )
            total = total + self.l2 * squares
        return total if beside is None else total + beside

    # -- evaluation: in evaluation mode, without gradients ----------------------------------------------------------

    def logits(self, batch: SequenceBatch) -> Tensor:
        """(B, 1) float32: the log-odds of the label of each row's last action, at which the label isn't looked at."""
        with evaluating(self):
            part = self._impressions(batch, places_asked(batch))
            context = StepContext(0)
            return self._judged(part, self.fetch(self.wanted([part], context)))[0][:, None].float()

    def looked(self, side: str, known: Known, views: Mapping[str, View]) -> Looked:
        """One side ("user" or "item") of impressions, looked up."""
        return (self.user if side == "user" else self.item).look_up(known, views)

    def _judged(self, part: Impressions, views: Mapping[str, View]) -> tuple[Tensor, Tensor | None]:
        user, item = self.user.look_up(part.user, views), self.item.look_up(part.item, views)
        pairs = Pairs(user, item, part.rows, part.items_S, part.labels_S, part.key, views)
        return self.network(pairs)

    def _impressions(self, batch: SequenceBatch, places_S: Tensor) -> Impressions:
        batch = self.prepare(batch)
        lengths_B = batch.offsets_B1.diff()
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        owner_T = torch.repeat_interleave(rows_B, lengths_B, output_size=batch.actions)
        sequences_S = owner_T[places_S]
        user, item = (side.known(batch, places_S, sequences_S) for side in (self.user, self.item))
        return Impressions(user, item, batch.items_T[places_S], None)


def _shape(side: Side) -> Shape:
    single = {field.name: field.rows for field in side.fields if not field.multi}
    return Shape(len(side.fields), len(side.numbers), single)
