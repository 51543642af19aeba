"""Tables that exist on paper: what a model would ask for, and how it would be cut for processes that aren't there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

import torch
from torch import Tensor

from gr.embeddings.row_updates import Piece
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table, TableSpec
from gr.embeddings.topology import Cluster, imagined
from gr.embeddings.torchrec_plan import TablePlan
from gr.embeddings.view import View
from gr_kernels.log_partition import cross_entropy
from gr_kernels.tracing import on_paper_now

_PLANNING: ContextVar[int | Cluster | None] = ContextVar("what tables are planned for", default=None)


@contextmanager
def planning_for(what: int | Cluster) -> Iterator[None]:
    """Tables that would be sharded are planned for so many processes, or for a cluster, instead, and hold nothing."""
    before = _PLANNING.set(what)
    try:
        yield
    finally:
        _PLANNING.reset(before)


def planned_cluster(topology: str, local: int) -> Cluster | None:
    """What tables are planned for now: the cluster that was given, or as many processes as were, on GPUs of the
    ``topology`` or ``local`` of them on a machine like this one.  None where tables are built."""
    what = _PLANNING.get()
    return imagined(topology, what, local) if isinstance(what, int) else what


class PlannedTable(Table):
    """It knows its plan, and nothing else; on paper (gr_kernels.tracing) its shard has a size."""

    def __init__(self, spec: TableSpec, plan: TablePlan) -> None:
        self.spec, self.plan = spec, plan

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        if not on_paper_now():
            self._refuse()
        rows = max(part.rows for part in self.plan.held)
        shard_RD = torch.empty(rows, self.dim, requires_grad=True)
        bias_R = torch.empty(rows, requires_grad=True) if scoring.bias else None
        settings = {"scale": scoring.scale, "normalize_eps": scoring.normalize_eps}
        return cross_entropy(queries_TD, shard_RD, targets_T, bias_I=bias_R, **settings)  # type: ignore[arg-type]

    def view(self, wanted: Sequence[Tensor]) -> View:
        self._refuse()

    def pieces(self) -> list[Piece]:
        self._refuse()

    def vectors(self, start: int, stop: int) -> Tensor:
        self._refuse()

    def biases(self, start: int, stop: int) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(f"table '{self.name}' is only planned: it has no rows")
