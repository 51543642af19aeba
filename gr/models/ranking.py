"""Ranking: the probability that a user's action on a given item has this or that label (Zhai et al., arXiv
2402.17152, speak of it as the ranking task; a label is what gr.labels says).

items and what their actions were -> input -> sequence encoder -> with the candidate's vector -> MLP -> a logit a task.

Pointwise: a row knows the user's actions up to one, with their labels, and the item and time of the next action,
which is the candidate; it predicts that action's labels.

Shapes: B sequences, A actions of the batch, T input rows (the actions but each sequence's last), S candidates,
K tasks, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gr import registry
from gr.batch import UNKNOWN, SequenceBatch
from gr.config import FRACTION, POSITIVE, ComponentConfig, InputSection, RunConfig, component
from gr.embeddings.table import TableSpec
from gr.errors import UserError
from gr.labels import TASKS, Labels
from gr.models import init
from gr.models.cut import Cut
from gr.models.dropout import Dropout
from gr.models.encoder import check_causal
from gr.models.features import Features, vectors
from gr.models.init import initialise
from gr.models.input import ItemInput
from gr.models.layers import Linear
from gr.models.model import Catalogue, Model
from gr.models.step import StepContext
from gr.models.tasks import NextItem, Supervision, sources
from gr.modes import evaluating
from gr.processes import Axis, Processes
from gr_kernels.counter_random import derive_key


@dataclass(frozen=True)
class Labelled:
    """A micro-batch: the inputs, the candidates and what there is to predict of them.

    sequence: input rows, and as targets the candidates' item rows.  history_TK, labels_SK: float32, the labels of the
    input actions and of the candidates' actions, NaN where unknown.
    """

    sequence: Supervision
    history_TK: Tensor
    labels_SK: Tensor

    @property
    def count(self) -> int:
        """S: every next action is a target, whatever is known of its labels."""
        return self.sequence.count

    @property
    def targets_S(self) -> Tensor:
        return self.sequence.targets_S

    def part_of(self, context: Axis) -> Labelled:
        """This process's rows of the sequences, where processes share them."""
        sequence = self.sequence.part_of(context)
        if (cut := sequence.layout.cut) is None:
            return self
        return Labelled(sequence, self.history_TK[cut.numbers_T], self.labels_SK[cut.numbers_T])


class Ranking(Model):
    """Sequences in, losses or logits of the tasks out.

    The loss of a target is the mean over the tasks of the binary cross-entropy; an unknown label adds nothing to it
    (and its target counts as any other, so that the count needs no look at the data).  Parameters depend on
    (config.train.seed, their names) alone.
    """

    class Config(ComponentConfig):
        """tasks: what is predicted (gr.labels).  hidden: widths of the head's layers.  table, table_std: as in
        retrieval."""

        name: Literal["ranking"] = "ranking"
        dim: POSITIVE = 50
        table: component(registry.TABLES, "model.table", default="local")  # type: ignore[valid-type]
        table_std: Annotated[float, Field(ge=0)] = 0.02
        input: InputSection = InputSection()
        encoder: component(registry.ENCODERS, "model.encoder")  # type: ignore[valid-type]
        tasks: TASKS
        hidden: list[POSITIVE] = [64]
        hidden_dropout: FRACTION = 0.0

        def idle(self) -> dict[str, str]:
            return {} if self.hidden else {"hidden_dropout": "hidden is empty"}

    judged_by = "pointwise"
    entrances = ("logits",)

    def __init__(
        self, config: Config, run: RunConfig, catalogue: Catalogue, processes: Processes | None = None
    ) -> None:
        if run.objective is not None:
            raise UserError(
                f"config key 'objective' is '{run.objective.name}', and model 'ranking' has a loss of its own: "
                "leave it out (objective=null), or use model=retrieval"
            )
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
        self.labels, self.task = labels, task
        self.features, self.vocabularies = features, features.vocabularies
        max_length = run.data.max_length
        self.input = ItemInput(config.input, config.dim, max_length, False, config.table_std)
        self.history = HistoryLabels(len(self.labels.names), config.dim, config.table_std)
        self.encoder = config.encoder.build(config.dim, max_length)
        check_causal(self.task, self.encoder, config.encoder.name, instead="")
        self.head = Head(config.dim, config.hidden, len(self.labels.names), config.hidden_dropout)
        times = {"time"} if self.encoder.uses_times else set()
        self.needs = frozenset({"item"} | times | self.labels.columns | features.needs)
        initialise(self, run.train.seed)

    @property
    def cuttable(self) -> bool:  # type: ignore[override]
        return self.encoder.cuttable

    @property
    def items(self):
        """The table of items."""
        return self.tables["items"]

    # -- training -------------------------------------------------------------------------------------------------

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        return self.features.prepare(batch)

    def learn(self, batch: SequenceBatch, step: int) -> tuple[SequenceBatch, dict[str, Tensor]]:
        return self.features.learn(batch, step)

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Labelled:
        sequence = self.features.of_inputs(self.prepare(batch), self.task.supervise(batch, key, dropout_key))
        source_T = sources(batch, sequence.layout)
        labels_AK = self.labels.of(batch.columns)
        targets_S = source_T if sequence.queries_S is None else source_T[sequence.queries_S]
        return Labelled(sequence, labels_AK[source_T], labels_AK[targets_S + 1])

    def wanted(self, parts: Sequence[Labelled], context: StepContext) -> dict[str, list[Tensor]]:
        rows = [(part.sequence.tokens_T, part.targets_S) for part in parts]
        of_features = self.features.wanted([part.sequence for part in parts])
        return {"items": [tensor for pair in rows for tensor in pair], **of_features}

    def forward(self, part: Labelled, context: StepContext) -> Tensor:
        logits_SK = self._logits(part, context)
        known_SK = ~part.labels_SK.isnan()
        labels_SK = part.labels_SK.masked_fill(~known_SK, 0).to(logits_SK.dtype)
        losses_SK = F.binary_cross_entropy_with_logits(logits_SK, labels_SK, reduction="none")
        return (losses_SK * known_SK).sum() / logits_SK.shape[1]

    # -- evaluation: in evaluation mode, without gradients ----------------------------------------------------------

    def logits(self, batch: SequenceBatch) -> Tensor:
        """(B, K) float32: for the last action of each sequence, whose item and time are looked at and whose labels are
        not, the log-odds of each task's label."""
        with evaluating(self):
            sequence = self.task.request(batch)
            if (sequence.targets_S == UNKNOWN).any():
                raise UserError("a ranking model judges given items, and a request has none: give its item")
            sequence = self.features.of_inputs(self.prepare(batch), sequence)
            history_TK = self.labels.of(batch.columns)[sources(batch, sequence.layout)]
            part = Labelled(sequence, history_TK, history_TK.new_empty(0))
            context = StepContext(0)
            return self._logits(part, replace(context, views=self.fetch(self.wanted([part], context))))

    def _logits(self, part: Labelled, context: StepContext) -> Tensor:
        sequence, items = part.sequence, context.views["items"]
        layout = sequence.layout
        if self.encoder.uses_times and layout.key_times_T is None:
            raise UserError(
                "the encoder uses the times of actions and this dataset has none: "
                "set model.encoder.relative_time=false"
            )
        x_TD = self.input(
            sequence.tokens_T,
            layout,
            items.lookup(sequence.tokens_T),
            vectors(sequence, context.views),
            self.history(part.history_TK),
        )
        queries_SD = sequence.select(self.encoder(x_TD, layout))
        candidates_SD = items.lookup(part.targets_S) * self.input.scale  # as large as where they are inputs
        return self.head(queries_SD, candidates_SD, layout.dropout_key, layout.cut)


class HistoryLabels(nn.Module):
    """What an input action was, as a vector beside its item's: for each task one vector where it has the label and
    another where it hasn't, nothing where that is unknown."""

    def __init__(self, tasks: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * tasks, dim))
        self.std = std

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"weight": init.normal(self.std)}

    def forward(self, labels_TK: Tensor) -> Tensor:
        """(T, K) 1, 0 or NaN -> (T, D)."""
        which_TC = torch.cat([labels_TK == 1, labels_TK == 0], dim=1).to(self.weight.dtype)
        return which_TC @ self.weight


class Head(nn.Module):
    """Logits of (query, candidate) pairs: an MLP of [h, e, h * e]; float32 whatever the encoder computes in."""

    def __init__(self, dim: int, hidden: Sequence[int], tasks: int, dropout: float) -> None:
        super().__init__()
        widths = [3 * dim, *hidden]
        self.layers = nn.ModuleList(Linear(i, o, init.xavier_uniform) for i, o in zip(widths, widths[1:]))
        self.out = Linear(widths[-1], tasks, init.xavier_uniform)
        self.dropout = Dropout(dropout)

    def forward(
        self, queries_SD: Tensor, candidates_SD: Tensor, dropout_key: int, cut: Cut | None = None
    ) -> Tensor:
        """(S, D), (S, D) -> (S, K)."""
        with torch.autocast(queries_SD.device.type, enabled=False):
            h_SD = queries_SD if queries_SD.dtype == torch.float64 else queries_SD.float()
            x = torch.cat([h_SD, candidates_SD, h_SD * candidates_SD], dim=1)
            for number, layer in enumerate(self.layers):
                x = self.dropout(F.relu(layer(x)), derive_key(dropout_key, "head", number), cut)
            return self.out(x)
