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
from collections.abc import Iterator, Mapping, Sequence
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
from gr.models.model import Catalogue, Model
from gr.models.step import StepContext
from gr.processes import Axis, Processes
from gr.scaling.tally import Operation, Tally
from gr_kernels.tracing import on_paper

KEY = 1
"""Of what a step draws: any does."""


@dataclass(frozen=True)
class Rehearsal:
    """What a step of one process takes.

    rows: U, by table, of the views that are fetched (not of tables that are their own view).  micro_batches: of the
    process's share.  working: bytes of the largest micro-batch's tensors at their peak, gradients included.  indices:
    bytes of batch, draws and numberings.  operations: of that micro-batch.  share_of_step: its part of the process's
    actions.  exchanged: bytes that layers of that micro-batch send to others, by kind.
    """

    rows: dict[str, int]
    micro_batches: int
    working: int
    indices: int
    operations: list[Operation]
    share_of_step: float
    exchanged: dict[str, float]


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

    def rehearse(self, share: SequenceBatch, keep_gradients: bool = True) -> Rehearsal:
        """A step on a process's ``share`` of a global batch.  keep_gradients: whether those of the network stay where
        they were formed until the step ends, or each is given away at once (whole tables' always stay)."""
        train, model = self.config.train, self.model
        for stack in model.stacks():
            stack.recompute = train.activation_checkpointing
        cuts = share.split(train.micro_batch_actions)
        batch, _ = model.learn(share, 0)
        parts = [model.supervise(part, KEY, KEY) for part in batch.split(train.micro_batch_actions)]
        largest = max(range(len(parts)), key=lambda number: cuts[number].actions)
        processes = self.on.processes // train.context
        context = StepContext(KEY, self._candidates(parts, processes))
        wanted = model.wanted(parts, context)
        numbered = {
            name: Numbering.of(
                [rows.reshape(-1) for rows in wanted.get(name, [])], table.rows, torch.device("cpu")
            )
            for name, table in model.tables.items()
            if not table.whole
        }
        squares = float((np.asarray(cuts[largest].lengths, np.float64) ** 2).sum())
        indices = _bytes([p.__dict__ for p in parts]) + _bytes(list(context.drawn.values()))
        indices += _bytes([[n.rows_U, n.position_I] for n in numbered.values()])
        self.everybody.sent.clear()
        left = {id(p): p for n, p in model.named_dense() if keep_gradients or n.startswith("tables.")}
        with _hangs_on_shapes_alone(self.config):
            tally = self._step(parts[largest], context, numbered, squares, left, again=len(parts) > 1)
        return Rehearsal(
            rows={name: len(numbering.rows_U) for name, numbering in numbered.items()},
            micro_batches=len(parts),
            working=tally.peak,
            indices=indices,
            operations=tally.operations,
            share_of_step=cuts[largest].actions / max(share.actions, 1),
            exchanged=dict(self.everybody.sent),
        )

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
    ) -> Tally:
        """Forward and backward.  kept: the dense parameters whose gradients stay.  again: on those that an earlier
        micro-batch has left."""
        model, bf16 = self.model, self.config.train.precision == "bf16"
        for _, dense in model.named_dense():
            dense.grad = None
        with ExitStack() as held:
            held.enter_context(on_paper(self.on.device))
            held.enter_context(self.fake)
            views = {name: _view(table, numbered.get(name)) for name, table in model.tables.items()}
            given: list[Tensor] = [*model.parameters(), *(p for _, p in model.named_dense()), *_leaves(views)]
            tally = held.enter_context(Tally(squares, given))
            leaves = {id(p): p for p in _leaves(views)}
            for parameter in {id(p): p for p in given if p.requires_grad}.values():
                if id(parameter) not in kept and id(parameter) not in leaves:
                    hook = parameter.register_post_accumulate_grad_hook(_give_away)
                    held.callback(hook.remove)
                elif again:
                    parameter.grad = torch.empty_like(parameter)
            tally.operations.clear()
            context = StepContext(context.key, context.candidates_G, views, context.drawn)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(part, context)
            loss.backward()
            del loss
        return tally


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
    if getattr(getattr(model, "item_tower", None), "name", "id") != "id":
        raise UserError(
            f"model.item_tower {model.item_tower.name} forms rows with an encoder's real weights, which no plan on "
            "paper has: plan the model with model.item_tower=id (gr.scaling.towers counts what an encoder adds)"
        )
    if getattr(getattr(model, "table", None), "name", "") == "mapped":
        raise UserError(
            "a mapped table lies in files of one machine, which no plan on paper counts: use model.table=torchrec"
        )
