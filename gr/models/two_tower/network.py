"""What a pre-ranking model asks of its network.  ``gr.registry.NETWORKS`` has the kinds.

Shapes: S impressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gr.batch import Jagged
from gr.embeddings.table import TableSpec
from gr.embeddings.view import View
from gr.models import init
from gr.models.two_tower.fields import Looked
from gr.processes import Axis


@dataclass(frozen=True)
class Shape:
    """Of one side.  fields: F.  numbers: C.  rows: of the table of each field that has one value an impression."""

    fields: int
    numbers: int
    rows: Mapping[str, int]

    def flat(self, dim: int) -> int:
        """Numbers of a row of ``Looked.flat``."""
        return self.fields * dim + self.numbers


@dataclass(frozen=True)
class Pairs:
    """S impressions, looked up.  rows: by field, of the categories.  labels_S: float32, NaN where unknown, None where
    nothing is trained.  items_S: the items' rows.  key: of dropout."""

    user: Looked
    item: Looked
    rows: Mapping[str, Tensor | Jagged]
    items_S: Tensor
    labels_S: Tensor | None
    key: int
    views: Mapping[str, View]


class Network(nn.Module):
    """``firsts``: whether the fields' tables have a bias column.  ``exchanges``: whether a step's processes exchange
    something in it, so that all call it together.  ``whole_batches``: whether a micro-batch must be all of a process's
    share."""

    firsts = False
    exchanges = False
    whole_batches = False

    def __init__(self, config: Any, user: Shape, item: Shape, dim: int, axis: Axis) -> None:
        """dim: D, of the fields' tables."""
        super().__init__()

    @staticmethod
    def table_width(config: Any, dim: int) -> int:
        """Of the fields' tables, where the model's ``dim`` is D."""
        return dim

    def tables_beside(self, like: TableSpec) -> list[TableSpec]:
        """Tables that it has beside the fields'."""
        return []

    def wanted_beside(self, rows: Mapping[str, Tensor | Jagged]) -> dict[str, list[Tensor]]:
        """The rows of those that impressions with ``rows`` of the fields look at."""
        return {}

    def forward(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """(S,) log-odds, float32; and the sum of other losses than those of the labels, if there are any and
        ``labels_S`` are given."""
        raise NotImplementedError


class Bias(nn.Module):
    """One number, added to everybody's log-odds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def initialisers(self) -> dict[str, Any]:
        return {"weight": init.zeros}

    def forward(self, x_S: Tensor) -> Tensor:
        return x_S + self.weight
