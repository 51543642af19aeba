"""A table held whole by every process.

Shapes: B, T queries, I rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gr.config import ComponentConfig
from gr.embeddings.row_updates import Gradient, Piece, SparseGradient
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table, TableSpec, filled_now, leaves, local_gradients, matrix
from gr.embeddings.view import Numbering, View
from gr.errors import UserError
from gr.processes import Axis, Processes
from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.log_partition import cross_entropy


class LocalTable(Table, nn.Module):
    """Every process has all rows; gradients are dense and added up by the engine."""

    class Config(ComponentConfig):
        name: Literal["local"] = "local"

    initialises_itself = True
    replicated = True

    def __init__(self, config: Config, spec: TableSpec, processes: Processes | None = None) -> None:
        super().__init__()
        self.spec, self.processes = spec, processes
        self.whole = self.dense = True
        rows = spec.first_rows(0, spec.rows) if filled_now() else torch.zeros(spec.rows, spec.dim)
        self.weight = nn.Parameter(rows)
        self.bias = nn.Parameter(torch.zeros(spec.rows)) if spec.bias else None

    def keep_rows(self) -> None:
        """From now on gradients are of the rows seen in a step, for an optimiser that moves those alone: every process
        sends its own to all, and each moves its copy."""
        self.whole = self.dense = False
        self.requires_grad_(False)

    def view(self, wanted: Sequence[Tensor] = ()) -> View:
        """The table itself, for its rows are all here; or copies of the wanted ones, where those alone move."""
        if self.dense:
            return View(self.weight, self.bias)
        numbering = Numbering.of(wanted, self.rows, self.weight.device)
        bias_U = None if self.bias is None else self.bias.index_select(0, numbering.rows_U)
        return leaves(self.weight.index_select(0, numbering.rows_U), bias_U, numbering)

    def pieces(self) -> list[Piece]:
        return [Piece(name, 0, 0, matrix(values.detach())) for name, values in self.named_parameters()]

    def gather_gradients(self, view: View) -> list[Gradient]:
        assert view.numbering is not None
        world = Axis() if self.processes is None else self.processes.world
        rows = world.gather(view.numbering.rows_U)
        total = SparseGradient.summed(rows, world.gather(local_gradients(view)))
        columns = total.values_UC.split([self.dim, 1], dim=1) if self.spec.bias else [total.values_UC]
        return [SparseGradient(total.rows_U, values_UC) for values_UC in columns]

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        if not self.dense:
            raise UserError(
                "objective full_softmax sees every row in every step, and the optimizer moves the rows seen: "
                "use optimizer=adamw",
                everywhere=True,
            )
        # the logits exist a chunk at a time (gr_kernels.log_partition)
        return cross_entropy(
            queries_TD,
            scoring.columns(self.weight),
            targets_T,
            scale=scoring.scale,
            normalize_eps=scoring.normalize_eps,
            bias_I=self.bias if scoring.bias else None,
        )

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.weight.detach()[start:stop]

    def biases(self, start: int, stop: int) -> Tensor:
        assert self.bias is not None
        return self.bias.detach()[start:stop]

    def chunk_scores(self, queries_BD: Tensor, start: int, stop: int, scoring: Scoring) -> Tensor:
        if scoring.dim is not None:
            return super().chunk_scores(queries_BD, start, stop, scoring)
        scores_BC = candidate_scores(  # all of the table: a range of it needs no look-up
            queries_BD * scoring.scale, self.weight, range(start, stop), normalize_eps=scoring.normalize_eps
        )
        return scores_BC + self.biases(start, stop) if scoring.bias else scores_BC

    def extra_repr(self) -> str:
        return f"{self.name!r}, rows={self.rows}, dim={self.dim}"
