"""Tables that exist on paper: what a model would ask for, and how it would be cut for processes that aren't there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

from torch import Tensor

from gr.embeddings.row_updates import Piece
from gr.embeddings.table import Table, TableSpec
from gr.embeddings.torchrec_plan import TablePlan
from gr.embeddings.view import View

_PROCESSES: ContextVar[int | None] = ContextVar("processes that tables are planned for", default=None)


@contextmanager
def planning_for(processes: int) -> Iterator[None]:
    """Tables that would be sharded are planned for so many processes instead, and hold nothing."""
    before = _PROCESSES.set(processes)
    try:
        yield
    finally:
        _PROCESSES.reset(before)


def planned_processes() -> int | None:
    """How many processes tables are planned for now; None where they are built."""
    return _PROCESSES.get()


class PlannedTable(Table):
    """It knows its plan, and nothing else."""

    def __init__(self, spec: TableSpec, plan: TablePlan) -> None:
        self.spec, self.plan = spec, plan

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
