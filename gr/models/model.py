"""What a trainer knows of a model.

A model is the dense part alone: its tables stand beside it (``tables``, and ``vocabularies``, which say whose rows are
whose), so that an engine can wrap the module without meeting a table, wherever the table's rows are.
``gr.registry.MODELS`` has the kinds.

Shapes: B sequences, S targets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gr.batch import Jagged, SequenceBatch
from gr.config import RunConfig
from gr.embeddings.table import Table
from gr.embeddings.view import View
from gr.embeddings.vocabulary import OpenVocabulary
from gr.errors import UserError
from gr.labels import ColumnLike, Described
from gr.models.layers import Stack
from gr.models.step import StepContext
from gr.processes import Axis


class Supervised(Protocol):
    """A micro-batch as a model's ``supervise`` leaves it.  ``count``: S; ``targets_S``: int64 item rows."""

    @property
    def count(self) -> int: ...

    @property
    def targets_S(self) -> Tensor: ...

    def part_of(self, context: Axis) -> Supervised:
        """The rows of the sequences, with their targets, that are this process's; all where nobody shares them."""
        ...


class Catalogue(Protocol):
    """What a model may know of the data: the number of items, (counted when first asked for) how often each is a
    training action, int64 of that length, what the dataset says of the columns of its actions, and columns of its
    items."""

    @property
    def rows(self) -> int: ...

    @property
    def training_counts(self) -> Tensor: ...

    @property
    def manifest(self) -> Described: ...

    @property
    def column_names(self) -> Iterable[str]:
        """Of its items."""
        ...

    def info(self, name: str) -> ColumnLike:
        """What a column of the items holds."""
        ...

    def codes(self, name: str) -> Tensor | Jagged:
        """Its values, on the CPU: int64, one or a list an item."""
        ...

    def numbers(self, name: str) -> Tensor:
        """Its values, on the CPU: float32, NaN where an item has none."""
        ...

    def column(self, name: str) -> Any:
        """It as it was prepared (a pyarrow.ChunkedArray)."""
        ...

    def kept(self, kind: str, about: dict[str, Any]) -> Any:
        """What was kept of the items (a pyarrow.Table) under this description, None if nothing was."""
        ...

    def keep(self, kind: str, about: dict[str, Any], table: Any) -> None:
        """Keep something that was computed of the items for the next time."""
        ...


def refuse_objective(run: RunConfig, model: str) -> None:
    """Of a kind of ``model`` that has a loss of its own: UserError where the config has an objective."""
    if run.objective is not None:
        raise UserError(
            f"config key 'objective' is '{run.objective.name}', and model '{model}' has a loss of its own: leave it "
            "out (objective=null), or use model=retrieval"
        )


class Model(nn.Module):
    """``needs``: the action columns that a batch must carry.  ``judged_by``: the metric family that evaluates it (a
    name in ``gr.registry.METRICS``).  ``needs_global_targets``: whether ``StepContext.candidates_G`` must be filled.
    ``cuttable``: whether processes may share the rows of a sequence (``Supervised.part_of``).
    ``entrances``: methods beside ``forward`` that compute with the module's parameters.  ``lockstep``: set by an engine
    whose parameters are gathered from all processes when the model computes."""

    needs: frozenset[str]
    judged_by: str
    needs_global_targets = False
    cuttable = False
    entrances: tuple[str, ...] = ()
    lockstep = False
    _placed = torch.device("cpu")

    def __init__(self, tables: Sequence[Table]) -> None:
        super().__init__()
        # in a dict: not a part of the module
        self.tables = {table.name: table for top in tables for table in (top, *top.beneath)}
        self._beneath = {table.name for top in tables for table in top.beneath}
        self.vocabularies: Mapping[str, OpenVocabulary] = {}

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch as :meth:`supervise` reads it: made where its columns can be looked at without waiting for a
        device, and the same if it is so already.  Raises UserError for values that the model has no place for."""
        return batch

    def learn(self, batch: SequenceBatch, step: int) -> tuple[SequenceBatch, dict[str, Tensor]]:
        """This process's share of a training step, prepared, after ``vocabularies`` have taken in what is new in it;
        and by table the rows (int64, on the CPU, the same on every process) that stand for something else from now on.
        Every process of the run calls this together, once a step."""
        return self.prepare(batch), {}

    def unseen(self) -> dict[str, tuple[int, int]]:
        """Of the batch that was prepared last, by table: how many of its values nobody knows, and how many there were,
        where such values are no error."""
        return {}

    @abstractmethod
    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Any:
        """Inputs and targets of a training micro-batch (a :class:`Supervised`).  Keys, 64 bits: of the step, and of
        this rank's micro-batch."""

    @abstractmethod
    def wanted(self, parts: Sequence[Any], context: StepContext) -> dict[str, list[Tensor]]:
        """Row numbers of each table that the micro-batches ``parts`` of a step will look at, in any form."""

    @abstractmethod
    def forward(self, part: Any, context: StepContext) -> Tensor:
        """The sum of the losses of the micro-batch's targets: a float32 scalar."""

    def views(self, parts: Sequence[Any], context: StepContext) -> dict[str, View]:
        """Views of all tables for the micro-batches of a step; every process of the run calls this together."""
        wanted: dict[str, list[Tensor]] = {}
        if any(
            not table.whole for table in self.tables.values()
        ):  # else drawing candidates twice would be waste
            wanted = self.wanted(parts, context)
        return self.fetch(wanted)

    def fetch(self, wanted: Mapping[str, Sequence[Tensor]]) -> dict[str, View]:
        """Views of all tables with the rows that are ``wanted`` of each; every process calls this together."""
        views: dict[str, View] = {}
        for name, table in self.tables.items():
            if name not in self._beneath:
                views |= table.views(wanted.get(name, []))
        return views

    def named_dense(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with dense gradients, by name: tables that have such, then the module's own.  What doesn't
        train has none."""
        for name, table in self.tables.items():
            if table.dense and isinstance(table, nn.Module):
                yield from table.named_parameters(prefix=f"tables.{name}")
        yield from ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def named_whole(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters, by name, that don't stand for rows of the data: those that train and those that don't."""
        for name, table in self.tables.items():
            yield from table.named_shared(f"tables.{name}.")
        yield from self.named_parameters()

    def place(self, device: torch.device) -> Model:
        """Move to ``device``, with the tables that are modules; others know where they are."""
        for table in self.tables.values():
            if isinstance(table, nn.Module):
                table.to(device)
        self._placed = device
        return self.to(device)

    @property
    def collective(self) -> bool:
        """Whether every process must call the model together, evaluation included, the same number of times."""
        asked_together = [table.collective for table in self.tables.values()]
        asked_together += [vocabulary.collective for vocabulary in self.vocabularies.values()]
        return self.lockstep or any(asked_together)

    def watched(self) -> tuple[dict[str, float], str | None]:
        """Figures that an evaluation logs beside its metrics, and a sentence where they are bad; every process calls
        this together."""
        return {}, None

    def stacks(self) -> list[Stack]:
        """Its parts in which layers follow one another, each with parameters of its own."""
        return [module for module in self.modules() if isinstance(module, Stack)]

    @property
    def device(self) -> torch.device:
        first = next(self.parameters(), None)
        return self._placed if first is None else first.device
