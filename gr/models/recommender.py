"""The recommender: table, input, sequence encoder, similarity and objective, joined.

Shapes: B sequences, T actions in the batch, S targets, I catalogue size, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gr.batch import SequenceBatch
from gr.config import RunConfig
from gr.embeddings.table import Excluded, LocalTable
from gr.errors import UserError
from gr.models.encoder import check_causal
from gr.models.init import initialise
from gr.models.input import ItemInput
from gr.models.similarity import Similarity
from gr.models.step import StepContext
from gr.models.tasks import Supervision
from gr.modes import evaluating


class Recommender(nn.Module):
    """Sequences in, losses or scores of the catalogue out.

    items: I.  item_counts: (I,) how often each item is a training action (for popularity-aware objectives).
    Parameters depend on (config.train.seed, their names) alone.
    """

    def __init__(self, config: RunConfig, items: int, item_counts: Tensor) -> None:
        super().__init__()
        if items < 1:
            raise UserError("the dataset's catalogue is empty: prepare it again from a log with items")
        model, kernels, seed = config.model, config.train.kernels, config.train.seed
        self.items = items
        self.task = model.task.build()
        max_length = config.data.max_length + self.task.extra_inputs

        self.table = LocalTable("items", items, model.dim, model.table_std, seed, kernels)
        self.input = ItemInput(model.input, self.table, max_length, self.task.masks, model.table_std, kernels)
        self.encoder = model.encoder.build(model.dim, max_length, kernels)
        check_causal(model, self.task, self.encoder)
        self.similarity = Similarity(model.similarity, self.table)
        self.objective = config.objective.build(self.similarity, items, item_counts)
        initialise(self, seed)

    @property
    def needs_global_targets(self) -> bool:
        """Whether ``forward`` needs ``StepContext.candidates_G``."""
        return self.objective.needs_global_targets

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Supervision:
        """Inputs and targets of a training batch.  Keys, 64 bits: of the step, and of this rank's micro-batch."""
        return self.task.supervise(batch, key, dropout_key)

    def forward(self, supervision: Supervision, step: StepContext) -> Tensor:
        """The sum of the losses of the batch's targets: a float32 scalar."""
        queries_SD = supervision.select(self._encode(supervision))
        return self.objective(queries_SD, supervision, step)

    def encode(self, batch: SequenceBatch) -> Tensor:
        """(B, D) one query a sequence, before the similarity's normalisation: what its last action is judged by.

        A sequence with no input has a zero query.  This, ``scores`` and ``topk`` run in evaluation mode and
        without gradients.
        """
        with evaluating(self):
            supervision = self.task.request(batch)
            return supervision.select(self._encode(supervision))

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32 scores of the whole catalogue for the last action of each sequence."""
        with torch.no_grad():
            return self.similarity.scores(self.encode(batch), range(self.items))

    def topk(self, batch: SequenceBatch, k: int, exclude: Excluded | None = None) -> tuple[Tensor, Tensor]:
        """(scores, item rows), both (B, min(k, I)), best first.  exclude: jagged (offsets_B1, item rows) not to
        return; where too few rows are left, the rest have the score -inf."""
        return self.similarity.topk(self.encode(batch), k, exclude)

    def report(self) -> list[tuple[str, tuple[int, ...], int]]:
        """(name, shape, number of values) of every parameter, in order of construction."""
        return [(name, tuple(p.shape), p.numel()) for name, p in self.named_parameters()]

    def _encode(self, supervision: Supervision) -> Tensor:
        layout = supervision.layout
        if self.encoder.uses_times and layout.key_times_T is None:
            raise UserError(
                "the encoder uses the times of actions and this dataset has none: "
                "set model.encoder.relative_time=false"
            )
        return self.encoder(self.input(supervision.tokens_T, layout), layout)
