"""What every engine does: gradients of the global mean loss, one clipped step of everything, named state.

Gradients are *sums* over processes of the gradients of (sum of losses / global count of targets): no factor of the
number of processes stands anywhere, and dense parameters and tables have the same scale whatever the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gr.embeddings.local import LocalTable
from gr.embeddings.row_updates import Gradient, Piece, RowOptimizer
from gr.embeddings.table import Array, Table
from gr.errors import UserError
from gr.models.model import Model
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train.engines.dense import Dense
from gr.train.host_copy import HostCopy
from gr.train.optimizers import check_rules, first_rate, parameter_groups, set_rate
from gr.train.slices import Slices


class Engine(ABC):
    """Owns the exchange of gradients, clipping and the optimisers, dense and sparse.

    optimizer: the component of the config (``dense``, ``of_rows``).  clip_norm: of one norm over everything.
    """

    def __init__(
        self,
        config: Any,
        model: Model,
        optimizer: Any,
        processes: Processes,
        clip_norm: float | None,
        bf16: bool,
    ) -> None:
        self.config, self.model, self.processes = config, model, processes
        self.clip_norm, self.bf16 = clip_norm, bf16
        if optimizer.by_rows:
            for table in model.tables.values():
                if isinstance(table, LocalTable):
                    table.keep_rows()
        names = [name for name, _ in model.named_dense()]
        self.trained = numbers_trained(model)
        self.moments: tuple[str, ...] = optimizer.moments
        self.module = self.wrap(model)
        self.parts = self.divide(optimizer)
        self.dense: dict[str, Dense] = {name: part for part in self.parts for name in part.parameters}
        self.row_tables: dict[str, Table] = {n: t for n, t in model.tables.items() if not t.dense}
        self.row_optimizers = {name: _of_rows(optimizer, table) for name, table in self.row_tables.items()}
        self._gradients: dict[str, list[Gradient]] = {}
        self._base_rate = first_rate(optimizer.config, names)
        check_rules(optimizer.config.groups, [*names, *self._row_columns()])

    # -- a step ---------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[Any], context: StepContext, targets: int) -> HostCopy:
        """Gradients of (sum of the losses of all processes' micro-batches / ``targets``); returns this process's sum
        of losses, which is on its way to the host before the last backward pass starts."""
        views = self.model.views(micro_batches, context)
        context = replace(context, views=views)
        scale, total = 1 / max(targets, 1), torch.zeros((), device=self.processes.device)
        for number, micro_batch in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            with self.accumulating(last):
                loss = self.loss(micro_batch, context)
                total += loss.detach()
                if last:
                    copy = HostCopy(total)
                self.backward(loss * scale)
        for name, table in self.model.tables.items():
            if table.formed:
                table.take_back(views[name])
        self.exchange()
        self._gradients = {n: table.gather_gradients(views[n]) for n, table in self.row_tables.items()}
        return copy

    def step(self, rate_factor: float) -> Tensor | None:
        """Move everything by its gradient, clipped; returns the norm before clipping, or None if nothing is."""
        for optimizer in self.row_optimizers.values():
            set_rate(optimizer.param_groups, rate_factor)
        self.rate = self._base_rate * rate_factor
        norm = None if self.clip_norm is None else self._clip(self.clip_norm)
        moved = [part.step(rate_factor) for part in self.parts]
        self.skipped = not all(moved)
        for name, gradients in self._gradients.items():
            self.row_optimizers[name].step(gradients)
        if self._gradients:
            self._gradients = {}
            self.processes.barrier()  # nobody reads a row that somebody is still moving
        return norm

    def restart(self, rows: Mapping[str, Tensor]) -> None:
        """By table, rows that stand for something else from now on: they have their first values again and no moments.
        Every process calls this with the same ones, before a step."""
        others_read = False
        for name, rows_N in rows.items():
            if not len(rows_N):
                continue
            if name in self.row_optimizers:  # before the values: it says whose rows are about to change
                self.row_optimizers[name].restart(rows_N)
                others_read = others_read or not self.row_tables[name].replicated
            self.model.tables[name].restart(rows_N)
            for column in ("weight", "bias"):
                if (full_name := f"tables.{name}.{column}") in self.dense:
                    self.dense[full_name].restart(full_name, rows_N)
        if others_read:
            self.processes.barrier()  # they would read rows that this process is still setting

    rate = float("nan")
    """The learning rate of the last step (the first group's)."""

    skipped = False
    """Whether the last step left dense parameters where they were, because their gradients are not finite; the same on
    all processes."""

    def finite(self) -> bool:
        """Whether every parameter, and every row of this process, is a number."""
        found = torch.ones((), dtype=torch.bool, device=self.processes.device)
        for part in self.parts:
            found &= part.finite().to(found.device)
        for table in self.row_tables.values():
            for piece in table.pieces():
                # no small tensor of a chunk is kept: it would lie in a hole that the next chunk's large ones need
                for start, stop in piece.chunks():
                    found &= piece.values_RC[start:stop].isfinite().all().to(found.device)
        return bool(found)

    # -- what differs between engines -----------------------------------------------------------------------------

    collective = False
    """Whether a micro-batch's forward or backward pass is an exchange, so that everybody needs as many."""

    freezes = False
    """Whether the module may have parameters that don't train."""

    shares_sequences = False
    """Whether processes may share each sequence (``train.context``), and exchange rows of it in both passes."""

    module: nn.Module
    """What is called for a micro-batch's loss: the model, or what wraps it."""

    parts: list[Dense]
    """All dense parameters, by what moves them."""

    @abstractmethod
    def wrap(self, model: Model) -> nn.Module:
        """``module``.  It never meets a table: those stand beside the model."""

    def divide(self, optimizer: Any) -> list[Dense]:
        """``parts``: all in one, if there is nothing to tell apart."""
        return [Dense(dict(self.model.named_dense()), optimizer.dense)]

    def tables_apart(self, optimizer: Any) -> list[Dense]:
        """Of ``parts``, what is left to move where another part has the module's parameters: dense tables, if any."""
        named = {name: p for name, p in self.model.named_dense() if name.startswith("tables.")}
        return [Dense(named, optimizer.dense)] if named else []

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around each micro-batch's forward and backward pass."""

    def loss(self, micro_batch: Any, context: StepContext) -> Tensor:
        """The sum of a micro-batch's losses: a float32 scalar."""
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.bf16):
            return self.module(micro_batch, context)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @abstractmethod
    def exchange(self) -> None:
        """After the last micro-batch: dense gradients are the sums over processes when this returns."""

    def exchange_tables(self) -> None:
        """Of tables with dense gradients, which no wrapper has seen."""
        for name, part in self.dense.items():
            gradient = part.parameters[name].grad
            if name.startswith("tables.") and gradient is not None:
                self.processes.world.add_up(gradient)

    # -- state ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Parameters as ``model/NAME``, moments as ``optimizer/MOMENT/NAME``, vocabularies as ``vocabulary/TABLE/...``
        and what tables keep besides as ``kept/TABLE/...``, whole."""
        tensors = self._beside_parameters()
        for part in self.parts:
            tensors |= {name: value for name, value in part.tensors().items() if name not in tensors}
        for name, optimizer in self.row_optimizers.items():
            tensors |= _row_moments(self.row_tables[name], optimizer)
            tensors |= {
                f"optimizer/step/tables.{name}.{column}": torch.tensor(float(optimizer.steps))
                for column in ("weight", *["bias"] * self.row_tables[name].spec.bias)
                if optimizer.maths.counts
            }
        return tensors

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors to be filled with what a checkpoint has under ``names``: parameters and moments, in place where
        that is possible; :meth:`loaded` then takes in the rest."""
        wanted = self._beside_parameters()
        for part in self.parts:
            values = {f"model/{name}": value for name, value in part.values().items()}
            wanted |= {name: value for name, value in values.items() if name not in wanted}
        of_rows: dict[str, Tensor] = {}
        for name, optimizer in self.row_optimizers.items():
            of_rows |= _row_moments(self.row_tables[name], optimizer)
        for name in names:
            kind, _, rest = name.partition("/")
            moment, _, owner = rest.partition("/")
            if kind != "optimizer":
                continue
            if moment == "step":
                wanted[name] = torch.zeros(())
            elif owner in self.dense:
                wanted[name] = self.dense[owner].wanted(owner)
            elif name in of_rows:
                wanted[name] = of_rows[name]
        return wanted

    def _beside_parameters(self) -> dict[str, Tensor]:
        """All that is saved but dense parameters and moments."""
        named = _named_arrays("kept", {name: table.state() for name, table in self.model.tables.items()})
        return _of_tables(self.model) | of_buffers(self.model) | of_vocabularies(self.model) | named

    def lacking(self, tensors: Iterable[str]) -> list[str]:
        """Moments of parameters, as tensors of a checkpoint, that the optimisers count on and ``tensors`` hasn't."""
        needed = [f"optimizer/{moment}/{name}" for name in self.dense for moment in self.moments]
        for name, optimizer in self.row_optimizers.items():
            needed += _row_moments(self.row_tables[name], optimizer)
        return sorted(set(needed) - set(tensors))

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """Take the moments that :meth:`load` asked for and that now have their values."""
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            moment, _, owner = rest.partition("/")
            if kind != "optimizer":
                continue
            if owner in self.dense:
                self.dense[owner].take(moment, owner, value)
            elif moment == "step":
                self.row_optimizers[owner.removeprefix("tables.").split(".")[0]].steps = int(value)
        for table in self.row_tables.values():
            table.refilled()

    def _row_columns(self) -> Iterator[str]:
        for name, table in self.row_tables.items():
            yield f"tables.{name}.weight"
            if table.spec.bias:
                yield f"tables.{name}.bias"

    def _clip(self, clip_norm: float) -> Tensor:
        """One norm over dense gradients and those of all rows; all are scaled by min(1, clip_norm / norm)."""
        norms = [part.norm() for part in self.parts]
        if self._gradients:
            norms.append(self._row_norm())
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)  # as torch does it
        for part in self.parts:
            part.clip(factor, norm)
        for pieces in self._gradients.values():
            for gradient in pieces:
                gradient.factor = factor.to(gradient.device)
        return norm

    def _row_norm(self) -> Tensor:
        """Of the gradients of all rows, wherever they are."""
        owned, copied = torch.zeros(1), torch.zeros(1)
        for name, pieces in self._gradients.items():
            squares = sum((gradient.square_norm().cpu() for gradient in pieces), torch.zeros(()))
            (copied if self.row_tables[name].replicated else owned).add_(squares)
        return (self.processes.world.add_up(owned) + copied).sqrt()[0].to(self.processes.device)


def numbers_trained(model: Model) -> int:
    """How many numbers gradients move, over all processes."""
    dense = sum(parameter.numel() for _, parameter in model.named_dense() if parameter.requires_grad)
    own = [t.rows * (t.dim + t.spec.bias) for t in model.tables.values() if not t.dense]
    return dense + sum(own)


def _of_rows(optimizer: Any, table: Table) -> RowOptimizer:
    config, maths = optimizer.config, optimizer.of_rows()
    if table.by_columns and not maths.by_columns:
        raise UserError(
            f"optimizer {config.name} keeps one number a row, and of a table cut by columns each process would keep "
            "another one: use model.table.sharding=row_wise, or optimizer=lazy_adam",
            everywhere=True,
        )
    columns = [f"tables.{table.name}.{piece.column}" for piece in table.pieces()]
    named = [(name, nn.Parameter(torch.empty(0))) for name in dict.fromkeys(columns)]
    groups = parameter_groups(named, config.groups, config.lr, config.weight_decay)
    return table.row_optimizer(maths, groups)


def parameters(model: Model) -> dict[str, Tensor]:
    """All parameters of a model and its tables that train, and its persistent buffers, as ``model/NAME``, their own
    memory: to be saved, or filled."""
    own = {f"model/{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return _of_tables(model) | of_buffers(model) | own


def of_vocabularies(model: Model) -> dict[str, Tensor]:
    """What a model's vocabularies know, as ``vocabulary/TABLE/...``, their own memory: to be saved, or filled."""
    return _named_arrays(
        "vocabulary", {name: vocabulary.state() for name, vocabulary in model.vocabularies.items()}
    )


def mappings_of(model: Model) -> dict[str, Tensor]:
    """The same of what says which id has which row, all that a model needs that isn't trained any more."""
    return _named_arrays(
        "vocabulary", {name: vocabulary.mapping() for name, vocabulary in model.vocabularies.items()}
    )


def _named_arrays(kind: str, arrays: Mapping[str, Mapping[str, Array]]) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}/{part}": Slices(size, [([first, 0], values)])
        for name, parts in arrays.items()
        for part, (size, first, values) in parts.items()
    }


def _of_tables(model: Model) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for table in model.tables.values():
        if table.formed:
            assert isinstance(table, nn.Module)
            named = table.named_parameters(prefix=f"tables.{table.name}")
            tensors |= {f"model/{name}": parameter.detach() for name, parameter in named}
            continue
        pieces = table.pieces()
        tensors |= _named_slices("model", table, pieces, [piece.values_RC for piece in pieces])
    return tensors


def of_buffers(model: Model) -> dict[str, Tensor]:
    """What a module keeps from step to step that no gradient moves: running means."""
    return {
        f"model/{prefix}{'.' if prefix else ''}{name}": buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _row_moments(table: Table, optimizer: RowOptimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for moment in (*optimizer.maths.moments, *optimizer.maths.row_moments):
        values = [moments[moment] for moments in optimizer.moments]
        a_row = moment in optimizer.maths.row_moments
        tensors |= _named_slices(f"optimizer/{moment}", table, list(optimizer.pieces), values, a_row)
    return tensors


def _named_slices(
    prefix: str, table: Table, pieces: Sequence[Piece], values: Sequence[Tensor], a_row: bool = False
) -> dict[str, Tensor]:
    """``values`` beside the pieces of a table, as one named tensor a column: (I, D), or (I,) for a bias or (``a_row``)
    one number a row."""
    parts: dict[str, list[tuple[list[int], Tensor]]] = {
        c: [] for c in ["weight", *["bias"] * table.spec.bias]
    }
    for piece, beside in zip(pieces, values, strict=True):
        wide = piece.column == "weight" and not a_row
        part = ([piece.row0, piece.col0], beside) if wide else ([piece.row0], beside[:, 0])
        parts[piece.column].append(part)
    tensors: dict[str, Tensor] = {}
    for column, held in parts.items():
        size = [table.rows, table.dim] if column == "weight" and not a_row else [table.rows]
        # what every process has is an ordinary tensor: one of them writes it
        whole = held[0][1] if table.replicated else Slices(size, held)
        tensors[f"{prefix}/tables.{table.name}.{column}"] = whole
    return tensors
