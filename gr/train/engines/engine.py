"""What every engine does: gradients of the global mean loss, one clipped step of everything, named state.

Gradients are *sums* over processes of the gradients of (sum of losses / global count of targets): no factor of the
number of processes stands anywhere, and dense parameters and tables have the same scale whatever the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gr.embeddings.row_updates import RowGradients, RowUpdate
from gr.embeddings.table import Table
from gr.models.model import Model
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train.host_copy import HostCopy
from gr.train.optimizers import check_rules, counts_steps_in_groups, set_rate


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
        self.model, self.processes, self.clip_norm, self.bf16 = model, processes, clip_norm, bf16
        self.dense = dict(model.named_dense())
        self.optimizer: torch.optim.Optimizer = optimizer.dense(self.dense.items())
        self.row_tables: dict[str, Table] = {n: t for n, t in model.tables.items() if not t.dense}
        self.row_updates: dict[str, RowUpdate] = {n: optimizer.of_rows(t) for n, t in self.row_tables.items()}
        self.moments: tuple[str, ...] = optimizer.moments
        self._rows: dict[str, RowGradients] = {}
        check_rules(optimizer.config.groups, [*self.dense, *self._row_columns()])

    # -- a step ---------------------------------------------------------------------------------------------------

    def forward_backward(self, parts: Sequence[Any], context: StepContext, targets: int) -> HostCopy:
        """Gradients of (sum of the losses of all processes' micro-batches / ``targets``); returns this process's sum
        of losses, which never waits for them."""
        views = self.model.views(parts, context)
        context = replace(context, views=views)
        scale, total = 1 / max(targets, 1), torch.zeros((), device=self.processes.device)
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            with self.accumulating(last):
                with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.bf16):
                    loss = self.module(part, context)
                total += loss.detach()
                if last:
                    copy = HostCopy(total)
                (loss * scale).backward()
        self.exchange()
        self._rows = {name: table.gather_gradients(views[name]) for name, table in self.row_tables.items()}
        return copy

    def step(self, rate_factor: float) -> Tensor | None:
        """Move everything by its gradient, clipped; returns the norm before clipping, or None if nothing is."""
        for groups in (self.optimizer.param_groups, *(u.param_groups for u in self.row_updates.values())):
            set_rate(groups, rate_factor)
        norm = None if self.clip_norm is None else self._clip(self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, gradients in self._rows.items():
            self.row_updates[name].step(gradients)
        if self._rows:
            self._rows = {}
            self.processes.barrier()  # nobody reads a row that somebody is still moving
        return norm

    @property
    def rate(self) -> float:
        """The learning rate of the last step (the first group's)."""
        return self.optimizer.param_groups[0]["lr"]

    def finite(self) -> bool:
        """Whether every parameter, and every row of this process, is a number."""
        checks = [parameter.isfinite().all() for parameter in self.dense.values()]
        for table in self.row_tables.values():
            checks += [table.vectors(start, stop).isfinite().all() for start, stop in table.own_chunks()]
        return bool(torch.stack(checks).all())

    # -- what differs between engines -----------------------------------------------------------------------------

    module: nn.Module
    """What is called for a micro-batch's loss: the model, or what wraps it."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around each micro-batch's forward and backward pass."""

    @abstractmethod
    def exchange(self) -> None:
        """After the last micro-batch: dense gradients are the sums over processes when this returns."""

    # -- state ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Parameters as ``model/NAME`` and moments as ``optimizer/MOMENT/NAME``, whole."""
        tensors = parameters(self.model)
        for name, parameter in self.dense.items():
            state = dict(self.optimizer.state.get(parameter, {}))
            if state and counts_steps_in_groups(self.optimizer):
                state["step"] = torch.tensor(float(self._group_of(parameter)["step"]))
            for moment, value in state.items():
                if value is not None:
                    tensors[f"optimizer/{moment}/{name}"] = torch.as_tensor(value)
        for table, update in self.row_updates.items():
            for column, moments in update.moments().items():
                name = f"tables.{table}.{column}"
                tensors |= {f"optimizer/{moment}/{name}": value for moment, value in moments.items()}
                if update.steps is not None:
                    tensors[f"optimizer/step/{name}"] = torch.tensor(float(update.steps))
        return tensors

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors to be filled with what a checkpoint has under ``names``: parameters and moments, in place where
        that is possible; :meth:`loaded` then takes in the rest."""
        wanted = parameters(self.model)
        for name in names:
            kind, _, rest = name.partition("/")
            moment, _, owner = rest.partition("/")
            if kind != "optimizer":
                continue
            if owner in self.dense:
                like = self.dense[owner]
                wanted[name] = torch.zeros(()) if moment == "step" else torch.zeros_like(like, device="cpu")
            elif moment == "step":
                wanted[name] = torch.zeros(())
            else:
                table, column = owner.removeprefix("tables.").split(".")
                wanted[name] = self.row_updates[table].moments()[column][moment]
        return wanted

    def lacking(self, tensors: Iterable[str]) -> list[str]:
        """Moments of parameters, as tensors of a checkpoint, that the optimisers count on and ``tensors`` hasn't."""
        names = [*self.dense, *self._row_columns()]
        needed = [f"optimizer/{moment}/{name}" for name in names for moment in self.moments]
        return sorted(set(needed) - set(tensors))

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """Take the moments that :meth:`load` asked for and that now have their values."""
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            moment, _, owner = rest.partition("/")
            if kind != "optimizer":
                continue
            if owner not in self.dense:
                if moment == "step":
                    self.row_updates[owner.removeprefix("tables.").split(".")[0]].steps = int(value)
                continue
            parameter = self.dense[owner]
            group = self._group_of(parameter)
            if moment == "step" and counts_steps_in_groups(self.optimizer):
                group["step"] = int(value)
                continue
            # torch counts steps on the CPU, but where one kernel does the whole update
            on_device = moment != "step" or group.get("fused") or group.get("capturable")
            self.optimizer.state[parameter][moment] = value.to(parameter.device) if on_device else value

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))

    def _row_columns(self) -> Iterator[str]:
        for name, table in self.row_tables.items():
            yield f"tables.{name}.weight"
            if table.spec.bias:
                yield f"tables.{name}.bias"

    def _clip(self, clip_norm: float) -> Tensor:
        """One norm over dense gradients and those of all rows; all are scaled by min(1, clip_norm / norm)."""
        gradients = [p.grad for p in self.dense.values() if p.grad is not None]
        if not self._rows:
            norm = torch.nn.utils.get_total_norm(gradients)
        else:
            squares = torch.stack([rows.square_norm() for rows in self._rows.values()]).sum()[None]
            of_rows = self.processes.world.add_up(squares).sqrt()[0].to(self.processes.device)
            norm = torch.linalg.vector_norm(torch.stack([torch.nn.utils.get_total_norm(gradients), of_rows]))
        torch.nn.utils.clip_grads_with_norm_(self.dense.values(), clip_norm, norm)
        if self._rows:
            factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)  # torch's own
            self._rows = {name: rows.scaled(factor) for name, rows in self._rows.items()}
        return norm


def parameters(model: Model) -> dict[str, Tensor]:
    """All parameters of a model and its tables as ``model/NAME``, their own memory: to be saved, or filled."""
    tensors: dict[str, Tensor] = {}
    for table in model.tables.values():
        tensors |= {
            f"model/tables.{table.name}.{column}": values for column, values in table.columns().items()
        }
    return tensors | {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
