"""A step on paper: the model of a config, built and run forward and backward on tensors that have shapes and no
numbers, on a device that need not be there.

So what a step keeps, and at its peak holds, is told by the code that will run, whatever the model; nothing has to be
said twice.  Row numbers are real: which rows a step asks for, and how many distinct ones, is found as in training.

What paper doesn't know: what an operator uses inside, an allocator's rounding and holes, and torch's lists of what
autocast rounds on a GPU (those for CPUs are taken).

Shapes: U rows of a view, D width, G targets of the global batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

from gr.batch import SequenceBatch
from gr.config import RunConfig
from gr.embeddings.local import LocalTable
from gr.embeddings.planned import planning_for
from gr.embeddings.table import Table
from gr.embeddings.topology import Cluster
from gr.embeddings.view import Numbering, View
from gr.errors import UserError
from gr.modality.tower import Tower
from gr.models.model import Catalogue, Model
from gr.models.step import StepContext
from gr.processes import Axis, Processes
from gr.scaling.tally import Operation, Tally
from gr.scaling.towers import Encoding, rehearsed
from gr_kernels.tracing import on_paper

KEY = 1
"""Of what a step draws: any does."""


@dataclass(frozen=True)
class Rehearsal:
    """What a step of one process takes.

    rows: U, by table, of the views that are fetched (not of tables that are their own view).  micro_batches: of the
    process's share.  working: bytes of the largest micro-batch's tensors at their peak, gradients included.  indices:
    bytes of batch, draws and numberings.  operations: of that micro-batch.  share_of_step: its part of the process's
    actions.  exchanged: bytes that layers of that micro-batch send to others, by kind.  encoding: of a tower's items;
    once: operations of the rest of the tower, which are done once a step.
    """

    rows: dict[str, int]
    micro_batches: int
    working: int
    indices: int
    operations: list[Operation]
    share_of_step: float
    exchanged: dict[str, float]
    encoding: Encoding | None = None
    once: list[Operation] = field(default_factory=list)


@dataclass(frozen=True)
class Everybody(Axis):
    """The axis of the first of ``size`` processes that are imagined to have what it has.  sent: bytes that each sends
    in what a model's layers exchange, by kind."""

    sent: dict[str, float] = field(default_factory=dict, compare=False)

    def sum(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list:
        return [value * self.size for value in values]

    def add_up(self, tensor: Tensor) -> Tensor:
        self._note("sums of layers", 2 * (self.size - 1) / self.size, tensor)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        if self.size == 1:
            return rows
        self._note("rows of layers", self.size - 1, rows)
        return rows.repeat(self.size, *(1,) * (rows.dim() - 1))

    def swap(self, sent: Tensor, to: int, received: Tensor, source: int) -> Callable[[], None]:
        self._note("pieces of shared sequences", 1, sent)
        return lambda: None

    def _note(self, kind: str, times: float, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.sent[kind] = self.sent.get(kind, 0.0) + times * size


class Paper:
    """A config's model on paper.  on: the cluster that its tables are cut for.  Raises UserError as the model does."""

    def __init__(self, config: RunConfig, catalogue: Catalogue, on: Cluster) -> None:
        self.config, self.on = config, on
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        _refuse_what_paper_lacks(config)
        with on_paper(on.device), planning_for(on), self.fake:
            self.everybody = Everybody(size=on.processes)
            cpu = Processes(torch.device("cpu"), data=self.everybody)
            with _hangs_on_shapes_alone(config):
                self.model: Model = config.model.build(config, catalogue, cpu)
            if config.optimizer.build().by_rows:
                for table in self.model.tables.values():
                    if isinstance(table, LocalTable):
                        table.keep_rows()
        self.model.train()

    def under(self, config: RunConfig) -> Paper:
        """The same model where steps are taken as ``config`` says (its ``train``)."""
        other = copy.copy(self)
        other.config = config
        return other

    @property
    def dense(self) -> dict[str, int]:
        """Numbers of each parameter that a dense optimiser moves."""
        return {name: parameter.numel() for name, parameter in self.model.named_dense()}

    @property
    def tower(self) -> Tower | None:
        """What forms the rows of items, where something does."""
        return next((table for table in self.model.tables.values() if isinstance(table, Tower)), None)

    def rehearse(
        self, share: SequenceBatch, keep_gradients: bool = True, whole: SequenceBatch | None = None
    ) -> Rehearsal:
        """A step on a process's ``share`` of a global batch, which with others of the context axis it has a part of.
        keep_gradients: whether those of the network stay where they were formed until the step ends, or each is given
        away at once (whole tables' always stay).  whole: the global batch, where it isn't the share; a tower's items
        are encoded for all processes together."""
        train, model, tower = self.config.train, self.model, self.tower
        for stack in model.stacks():
            stack.recompute = train.activation_checkpointing
        most = train.micro_batch_actions * train.context
        cuts = share.split(most)
        batch, _ = model.learn(share, 0)
        parts = [model.supervise(part, KEY, KEY) for part in batch.split(most)]
        largest = max(range(len(parts)), key=lambda number: cuts[number].actions)
        context = StepContext(KEY, self._candidates(parts, self.on.processes // train.context))
        axis = self._sharing(parts[largest])
        parts = [part.part_of(axis) for part in parts]
        wanted = model.wanted(parts, context)
        numbered = {
            name: Numbering.of(
                [rows.reshape(-1) for rows in wanted.get(name, [])], table.rows, torch.device("cpu")
            )
            for name, table in model.tables.items()
            if not table.whole
        }
        if tower is not None:
            rows_U = _rows(tower, numbered)
            for table in tower.beneath:
                if not table.whole:
                    numbered[table.name] = Numbering.of([rows_U], table.rows, torch.device("cpu"))
        squares = float((np.asarray(cuts[largest].lengths, np.float64) ** 2).sum())
        indices = _bytes([p.__dict__ for p in parts]) + _bytes(list(context.drawn.values()))
        indices += _bytes([[n.rows_U, n.position_I] for n in numbered.values()])
        self.everybody.sent.clear()
        left = {id(p): p for n, p in model.named_dense() if keep_gradients or n.startswith("tables.")}
        with _hangs_on_shapes_alone(self.config):
            tally, once, after = self._step(
                parts[largest], context, numbered, squares, left, again=len(parts) > 1
            )
            encoding = None
            if tower is not None:
                rows_G, batch_F = self._everybodys(tower, share if whole is None else whole)
                encoding = rehearsed(tower, len(rows_U), rows_G, batch_F, self.on.processes, self.fake)
        working = float(tally.peak)
        if encoding is not None:
            working = max(
                encoding.forming,
                encoding.kept + encoding.spread,
                encoding.kept + tally.peak,
                after + max(encoding.kept + encoding.spread, encoding.taking_back),
            )
        return Rehearsal(
            rows={
                name: len(numbering.rows_U) for name, numbering in numbered.items() if name in self.by_rows
            },
            micro_batches=len(parts),
            working=round(working),
            indices=indices,
            operations=tally.operations,
            share_of_step=cuts[largest].actions / max(share.actions, 1),
            exchanged=dict(self.everybody.sent),
            encoding=encoding,
            once=once,
        )

    @property
    def by_rows(self) -> set[str]:
        """The tables that rows are fetched of: not a tower, which forms them."""
        return {name for name, table in self.model.tables.items() if not isinstance(table, Tower)}

    def _sharing(self, part: Any) -> Axis:
        """The place of the process with the most rows among those that share sequences."""
        size = self.config.train.context
        if size == 1:
            return Axis()
        places = [Everybody(rank, size, sent=self.everybody.sent) for rank in range(size)]
        return max(places, key=lambda place: part.part_of(place).layout.rows)

    def _everybodys(self, tower: Tower, whole: SequenceBatch) -> tuple[Tensor, Tensor]:
        """(rows_G, batch_F) of a global batch: distinct rows of a tower, and those that aren't candidates alone."""
        model: Any = self.model
        batch = model.prepare(whole)
        parts = [
            model.supervise(part, KEY, KEY) for part in batch.split(self.config.train.micro_batch_actions)
        ]
        rows_F = _distinct(model.of_batch(parts), tower.rows)
        if tower.whole:
            return torch.arange(tower.rows), rows_F
        wanted = model.wanted(parts, StepContext(KEY, self._candidates(parts, 1)))
        return _distinct(wanted[tower.name], tower.rows), rows_F

    def _candidates(self, parts: list[Any], processes: int) -> Tensor | None:
        """Targets of the global batch, as if every process had this one's."""
        if not self.model.needs_global_targets:
            return None
        return torch.cat([part.targets_S for part in parts]).repeat(processes)

    def _step(
        self,
        part: Any,
        context: StepContext,
        numbered: Mapping[str, Numbering],
        squares: float,
        kept: Mapping[int, Tensor],
        *,
        again: bool,
    ) -> tuple[Tally, list[Operation], int]:
        """Forward and backward: what was done in a micro-batch, what of a tower is done once, and the bytes that are
        there at the end.  kept: the dense parameters whose gradients stay.  again: on those that an earlier micro-batch
        has left."""
        model, bf16 = self.model, self.config.train.precision == "bf16"
        for _, dense in model.named_dense():
            dense.grad = None
        with ExitStack() as held:
            held.enter_context(on_paper(self.on.device))
            held.enter_context(self.fake)
            tower = self.tower
            views = {
                name: _view(table, numbered.get(name))
                for name, table in model.tables.items()
                if table is not tower
            }
            given: list[Tensor] = [*model.parameters(), *(p for _, p in model.named_dense()), *_leaves(views)]
            tally = held.enter_context(Tally(squares, given))
            leaves = {id(p): p for p in _leaves(views)}
            formed = set() if tower is None else {id(p) for p in tower.parameters()}
            for parameter in {id(p): p for p in given if p.requires_grad}.values():
                if id(parameter) not in kept and id(parameter) not in leaves:
                    hook = parameter.register_post_accumulate_grad_hook(_give_away)
                    held.callback(hook.remove)
                elif again and id(parameter) not in formed:  # whose gradients come last, and once
                    parameter.grad = torch.empty_like(parameter)
            tally.operations.clear()
            if tower is not None:
                rows_U = _rows(tower, numbered)
                content_UE = torch.empty(len(rows_U), tower.content.width, requires_grad=tower.content.learns)
                beneath = {table.name: views[table.name] for table in tower.beneath}
                views |= tower.form(content_UE, rows_U, numbered.get(tower.name), beneath)
                del content_UE
            once = list(tally.operations)
            tally.operations.clear()
            context = StepContext(context.key, context.candidates_G, views, context.drawn)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(part, context)
            loss.backward()
            del loss
            if tower is not None:
                done = len(tally.operations)
                tower.unform(views[tower.name])
                once += tally.operations[done:]
                del tally.operations[done:]
            return tally, once, tally.live


def _rows(tower: Tower, numbered: Mapping[str, Numbering]) -> Tensor:
    """(U,) of a process's view of a tower."""
    numbering = numbered.get(tower.name)
    return torch.arange(tower.rows) if numbering is None else numbering.rows_U


def _distinct(rows: Sequence[Tensor], of: int) -> Tensor:
    return Numbering.of([some.reshape(-1) for some in rows], of, torch.device("cpu")).rows_U


@contextmanager
def _hangs_on_shapes_alone(config: RunConfig) -> Iterator[None]:
    """What is done here, or a sentence where it asks numbers."""
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException):
        raise UserError(
            f"what a step of model {config.model.name} does hangs on numbers that paper hasn't: only runs can tell "
            "what it takes"
        ) from None


def _give_away(parameter: Tensor) -> None:
    parameter.grad = None


def _view(table: Table, numbering: Numbering | None) -> View:
    """What a step would be given of a table."""
    if numbering is None:
        return table.view([])
    count = len(numbering.rows_U)
    weight = torch.empty(count, table.dim, requires_grad=True)
    return View(weight, torch.empty(count, requires_grad=True) if table.spec.bias else None, numbering)


def _leaves(views: Mapping[str, View]) -> list[Tensor]:
    found = [view.weight_UD for view in views.values()]
    return found + [view.bias_U for view in views.values() if view.bias_U is not None]


def _bytes(tree: Any) -> int:
    """Of the tensors in dataclasses, lists and dictionaries, each once."""
    found: dict[int, int] = {}

    def visit(node: Any) -> None:
        for leaf in tree_leaves(node):
            if isinstance(leaf, Tensor):
                found[leaf.untyped_storage()._cdata] = leaf.numel() * leaf.element_size()
            elif hasattr(leaf, "__dataclass_fields__"):
                visit(list(vars(leaf).values()))

    visit(tree)
    return sum(found.values())


def _refuse_what_paper_lacks(config: RunConfig) -> None:
    model: Any = config.model
    if getattr(getattr(model, "table", None), "name", "") == "mapped":
        raise UserError(
            "a mapped table lies in files of one machine, which no plan on paper counts: use model.table=torchrec"
        )
