"""Retrieval: from a user's sequence to the item that comes next, out of the whole catalogue.

table of items (features beside it) -> input -> sequence encoder -> queries -> similarity -> objective (training) or
ranks (evaluation).

Shapes: B sequences, T actions in the batch, S targets, I catalogue size, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gr import registry
from gr.adapters.insert import insert
from gr.adapters.section import ADAPTERS, AdapterSection
from gr.batch import SequenceBatch
from gr.config import POSITIVE, ComponentConfig, InputSection, RunConfig, SimilaritySection, component
from gr.embeddings.ranks import Excluded, Standing
from gr.embeddings.table import TableSpec
from gr.embeddings.view import View
from gr.errors import UserError
from gr.modality.collapse import advice
from gr.modality.surroundings import Surroundings
from gr.modality.tower import Tower
from gr.models.encoder import check_causal
from gr.models.features import Features, vectors
from gr.models.init import initialise
from gr.models.input import ItemInput
from gr.models.model import Catalogue, Model
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision
from gr.modes import evaluating
from gr.processes import Processes


class Retrieval(Model):
    """Sequences in, losses or ranks in the catalogue out.

    Parameters depend on (config.train.seed, their names) alone.
    """

    class Config(ComponentConfig):
        """table_std: the spread of a table's first rows.  table: where the rows are (gr.registry.TABLES).  item_tower:
        what stands for the items: rows by their ids, or formed from what they are.  adapters: what of the sequence
        encoder, and of what feeds it, trains."""

        name: Literal["retrieval"] = "retrieval"
        dim: POSITIVE = 50
        table: component(registry.TABLES, "model.table", default="local")
        item_tower: component(registry.TOWERS, "model.item_tower", default="id")
        table_std: Annotated[float, Field(ge=0)] = 0.02
        task: component(registry.TASKS, "model.task", default="next_item")
        input: InputSection = InputSection()
        encoder: component(registry.ENCODERS, "model.encoder")
        adapters: ADAPTERS = AdapterSection(name="full")
        similarity: SimilaritySection = SimilaritySection()

    judged_by = "catalogue"
    entrances = ("encode",)

    def __init__(
        self, config: Config, run: RunConfig, catalogue: Catalogue, processes: Processes | None = None
    ) -> None:
        if run.objective is None:
            raise UserError("config key 'objective' is missing: set it in the file or as objective=NAME")
        spec = TableSpec(
            "items",
            catalogue.rows,
            config.dim,
            config.table_std,
            run.train.seed,
            bias=config.similarity.item_bias,
            maths=run.optimizer.build().of_rows(),
            apart=not run.objective.component().needs_every_row,
        )
        processes = processes or Processes(torch.device("cpu"))
        task = config.task.build()
        features = Features(config.input.features, catalogue, task, spec, processes)
        around = Surroundings(
            spec,
            config.table,
            catalogue,
            processes,
            run.train.precision == "bf16",
            run.optimizer.build().by_rows,
        )
        super().__init__([config.item_tower.build(around), *features.tables])
        self.task, self.features, self.vocabularies = task, features, features.vocabularies
        max_length = run.data.max_length + self.task.extra_inputs
        self.input = ItemInput(config.input, config.dim, max_length, self.task.masks, config.table_std)
        self.encoder = config.encoder.build(config.dim, max_length)
        check_causal(self.task, self.encoder, config.encoder.name)
        self.reads_items = getattr(self.encoder, "reads_items", True)
        if not self.reads_items and (self.task.masks or not config.input.features):
            raise UserError(
                f"model.encoder {config.encoder.name} sees model.input.features and no items: name some, as "
                "{user: {derived: user}}, with model.task=next_item",
                everywhere=True,
            )
        self.similarity = Similarity(config.similarity)
        self.objective = run.objective.build(self.similarity, catalogue)
        self._check_prefixes(config)
        if self.objective.needs_global_targets and getattr(config.item_tower, "refresh", None) is not None:
            raise UserError(
                f"model.item_tower.refresh is for candidates outside of the batch, and objective {run.objective.name} "
                "has none: leave it out, or use sampled_softmax or full_softmax",
                everywhere=True,
            )
        if self.objective.needs_every_row and not self.items.has_cross_entropy:
            raise UserError(
                f"objective {run.objective.name} needs the gradient of every row in every step, and model.table "
                f"{config.table.name} fetches rows: use model.table=local, or another objective",
                everywhere=True,
            )
        times = {"time"} if self.encoder.uses_times else set()
        self.needs = frozenset({"item"} | times | features.needs)
        initialise(self, run.train.seed)
        if config.adapters.name != "full":
            self.requires_grad_(False)
            insert(self.encoder, config.adapters, run.train.seed)

    def _check_prefixes(self, config: Config) -> None:
        prefixes = config.similarity.matryoshka
        if prefixes and max(prefixes) >= config.dim:
            raise UserError(
                f"model.similarity.matryoshka has {max(prefixes)}, and vectors have {config.dim} numbers (model.dim): "
                "name fewer than those, which train anyway",
                everywhere=True,
            )
        if prefixes and self.objective.needs_every_row and not self.items.dense:
            raise UserError(
                "model.similarity.matryoshka and a softmax over the whole catalogue go together with model.table=local "
                "alone: use that, or objective=sampled_softmax",
                everywhere=True,
            )

    def cut_to(self, dim: int) -> None:
        """Score by the first ``dim`` numbers of vectors, for which the model must have trained."""
        prefixes, whole = self.similarity.config.matryoshka, self.items.dim
        if dim not in (*prefixes, whole):
            trained = (
                f"of {', '.join(map(str, sorted([*prefixes, whole])))}"
                if prefixes
                else "of that length alone"
            )
            raise UserError(
                f"vectors of {dim} numbers were asked for, and the run's have {whole} and were trained {trained}: "
                "choose one of these, or train with model.similarity.matryoshka",
                everywhere=True,
            )
        self.similarity = Similarity(self.similarity.config, None if dim == whole else dim)

    @property
    def items(self):
        """The table of items."""
        return self.tables["items"]

    @property
    def cuttable(self) -> bool:  # type: ignore[override]
        return self.encoder.cuttable

    @property
    def needs_global_targets(self) -> bool:  # type: ignore[override]
        return self.objective.needs_global_targets

    # -- training -------------------------------------------------------------------------------------------------

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        return self.features.prepare(batch)

    def unseen(self) -> dict[str, tuple[int, int]]:
        return self.features.unseen

    def learn(self, batch: SequenceBatch, step: int) -> tuple[SequenceBatch, dict[str, Tensor]]:
        return self.features.learn(batch, step)

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Supervision:
        return self.features.of_inputs(self.prepare(batch), self.task.supervise(batch, key, dropout_key))

    def views(self, parts: Sequence[Supervision], context: StepContext) -> dict[str, View]:
        if isinstance(self.items, Tower):
            self.items.begin(context.number, self.of_batch(parts))
        return super().views(parts, context)

    def of_batch(self, parts: Sequence[Supervision]) -> list[Tensor]:
        """Rows of the items that stand in sequences or are targets; others are candidates alone."""
        return self._inputs(parts) + [part.targets_S for part in parts]

    def _inputs(self, parts: Sequence[Supervision]) -> list[Tensor]:
        """Rows of the items that the encoder sees."""
        return [part.rows_T(self.task.masks) for part in parts] if self.reads_items else []

    def wanted(self, parts: Sequence[Supervision], context: StepContext) -> dict[str, list[Tensor]]:
        rows = self._inputs(parts)
        rows += [r for part in parts for r in self.objective.wanted(part, context)]
        return {"items": rows, **self.features.wanted(parts)}

    def forward(self, part: Supervision, context: StepContext) -> Tensor:
        queries_SD = part.select(self._encode(part, context))
        return self.objective(queries_SD, part, context, self.items)

    def watched(self) -> tuple[dict[str, float], str | None]:
        """Of rows that are formed, whether they have collapsed."""
        if not isinstance(self.items, Tower):
            return {}, None
        figures = self.items.watched()
        return figures, advice(figures["item_cosine"], figures["item_rank"], self.items.content.learns)

    # -- evaluation: in evaluation mode, without gradients ----------------------------------------------------------

    def encode(self, batch: SequenceBatch) -> Tensor:
        """(B, D) one query a sequence, before the similarity's normalisation: what its last action is judged by.

        A sequence with no input has a zero query.
        """
        with evaluating(self):
            part = self.features.of_inputs(self.prepare(batch), self.task.request(batch))
            views = self.fetch(self._seen(part))
            return part.select(self._encode(part, StepContext(0, views=views)))

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32 scores of the whole catalogue for the last action of each sequence."""
        return self.similarity.scores(self.items, self.encode(batch))

    def topk(self, batch: SequenceBatch, k: int, exclude: Excluded | None = None) -> tuple[Tensor, Tensor]:
        """(scores, item rows), both (B, min(k, I)), best first.  exclude: jagged (offsets_B1, item rows) not to
        return; where too few rows are left, the rest have the score -inf."""
        return self.similarity.topk(self.items, self.encode(batch), k, exclude)

    def standing(self, batch: SequenceBatch, targets_B: Tensor, exclude: Excluded | None = None) -> Standing:
        """Exact ranks of the targets in the whole catalogue and their losses, -log of their shares in the softmax over
        it; NaN where the model has diverged."""
        return self.similarity.standing(self.items, self.encode(batch), targets_B, exclude)

    def _seen(self, part: Supervision) -> dict[str, list[Tensor]]:
        """Rows that the encoder's input is made of."""
        return {"items": self._inputs([part]), **self.features.wanted([part])}

    def _encode(self, part: Supervision, context: StepContext) -> Tensor:
        layout = part.layout
        if self.encoder.uses_times and layout.key_times_T is None:
            raise UserError(
                "the encoder uses the times of actions and this dataset has none: "
                "set model.encoder.relative_time=false"
            )
        features_TD = vectors(part, context.views)
        if self.reads_items:
            items_TD = context.views["items"].lookup(part.rows_T(self.task.masks))
        else:
            items_TD = torch.zeros(layout.rows, self.items.dim, device=part.tokens_T.device)
        return self.encoder(self.input(part.tokens_T, layout, items_TD, features_TD), layout)
