"""A table held whole by every process.

Shapes: B, T queries, I rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gr.config import ComponentConfig
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table, TableSpec
from gr.embeddings.view import View
from gr.processes import Processes
from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.log_partition import cross_entropy


class LocalTable(Table, nn.Module):
    """Every process has all rows; gradients are dense and added up by the engine."""

    class Config(ComponentConfig):
        name: Literal["local"] = "local"

    initialises_itself = True

    def __init__(self, config: Config, spec: TableSpec, processes: Processes | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(spec.first_rows(0, spec.rows))
        self.bias = nn.Parameter(torch.zeros(spec.rows)) if spec.bias else None

    def columns(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def view(self, wanted: Sequence[Tensor] = ()) -> View:
        """The table itself: its rows are all here."""
        return View(self.weight, self.bias)

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        # the logits exist a chunk at a time (gr_kernels.log_partition)
        return cross_entropy(
            queries_TD,
            self.weight,
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
        scores_BC = candidate_scores(
            queries_BD * scoring.scale, self.weight, range(start, stop), normalize_eps=scoring.normalize_eps
        )
        return scores_BC + self.biases(start, stop) if scoring.bias else scores_BC

    def extra_repr(self) -> str:
        return f"{self.name!r}, rows={self.rows}, dim={self.dim}"
