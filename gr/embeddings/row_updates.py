"""How the rows of a table that keeps them to itself move: its gradients, and the optimisers' maths on them.

A name of an optimiser fixes which rows move.  ``adamw``, and ``sgd`` with momentum or decay, move every row in every
step: :class:`AllRows` goes through a process's rows in chunks, and gives each to the very optimiser that moves dense
parameters.  Plain ``sgd`` leaves rows without a gradient where they are: :class:`SeenRows`.

Shapes: U rows with a gradient, D width, C rows of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]


class Rows(Protocol):
    """The rows of a table that this process owns."""

    name: str
    dim: int
    weight_ID: Tensor
    bias_I: Tensor | None

    def own_chunks(self) -> Iterator[tuple[int, int]]: ...

    def storage(self, name: str, width: int) -> Tensor: ...


@dataclass(frozen=True)
class RowGradients:
    """Gradients of the rows that a process owns, each row once: rows_U, int64, ascending; weight_UD; bias_U."""

    rows_U: Tensor
    weight_UD: Tensor
    bias_U: Tensor | None

    @staticmethod
    def summed(rows: Tensor, gradients: Tensor, dim: int) -> RowGradients:
        """From what all processes sent, rank after rank: (n,) rows and (n, D) gradients, or (n, D + 1) with a bias's.

        A row's gradients are added in the order of ranks: the same bits at the same number of them.
        """
        rows_U, place = rows.unique(return_inverse=True)
        total = gradients.new_zeros(len(rows_U), gradients.shape[1]).index_add_(0, place, gradients)
        return RowGradients(rows_U, total[:, :dim], total[:, dim] if gradients.shape[1] > dim else None)

    def square_norm(self) -> Tensor:
        """The sum of the squares of all numbers: a float32 scalar."""
        total = self.weight_UD.square().sum()
        return total if self.bias_U is None else total + self.bias_U.square().sum()

    def scaled(self, factor: Tensor) -> RowGradients:
        factor = factor.to(self.weight_UD.device)
        bias_U = None if self.bias_U is None else self.bias_U * factor
        return replace(self, weight_UD=self.weight_UD * factor, bias_U=bias_U)


class RowUpdate(ABC):
    """An optimiser of one table's rows.  ``param_groups``: torch's, of which the rates are set."""

    param_groups: list[dict[str, Any]]
    steps: int | None
    """Steps so far; None where the maths doesn't count them."""

    @abstractmethod
    def step(self, gradients: RowGradients) -> None:
        """Move this process's rows."""

    @abstractmethod
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """column (``weight``, ``bias``) -> moment's name -> the whole table's numbers, in place."""


class AllRows(RowUpdate):
    """Every row moves in every step, by a torch optimiser whose parameters are chunks of the table's own memory."""

    def __init__(
        self,
        table: Rows,
        optimizer: Callable[[Named], torch.optim.Optimizer],
        moments: Iterable[str],
        counts_steps: bool,
    ) -> None:
        self.counts_steps = counts_steps
        self.columns = {"weight": (table.weight_ID, table.dim)}
        if table.bias_I is not None:
            self.columns["bias"] = (table.bias_I, 1)
        self.chunks = [
            (
                start,
                stop,
                {name: nn.Parameter(values[start:stop]) for name, (values, _) in self.columns.items()},
            )
            for start, stop in table.own_chunks()
        ]
        names = [
            (f"tables.{table.name}.{column}", parameter)
            for _, _, parameters in self.chunks
            for column, parameter in parameters.items()
        ]
        self.optimizer = optimizer(names)
        self.param_groups = self.optimizer.param_groups
        self._moments: dict[str, dict[str, Tensor]] = {column: {} for column in self.columns}
        for moment in moments:
            for column, (values, width) in self.columns.items():
                self._moments[column][moment] = table.storage(f"{moment}.{column}", width).view(values.shape)
        for start, stop, parameters in self.chunks:
            for column, parameter in parameters.items():
                state = self.optimizer.state[parameter]
                if counts_steps:
                    state["step"] = torch.tensor(0.0)
                state.update({m: values[start:stop] for m, values in self._moments[column].items()})

    def step(self, gradients: RowGradients) -> None:
        bounds = torch.searchsorted(gradients.rows_U, torch.tensor([start for start, _, _ in self.chunks]))
        ends = [*bounds.tolist()[1:], len(gradients.rows_U)]
        given = {"weight": gradients.weight_UD, "bias": gradients.bias_U}
        for (start, _, parameters), first, last in zip(self.chunks, bounds.tolist(), ends, strict=True):
            for column, parameter in parameters.items():
                values = given[column]
                assert values is not None
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad[gradients.rows_U[first:last] - start] = values[first:last]
            self.optimizer.step()
            self.optimizer.zero_grad()  # to None: the next chunk's step leaves this one where it is

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return self._moments

    @property  # type: ignore[override]
    def steps(self) -> int | None:
        if not self.counts_steps:
            return None
        _, _, parameters = self.chunks[0]
        return int(self.optimizer.state[parameters["weight"]]["step"])

    @steps.setter
    def steps(self, steps: int | None) -> None:
        if steps is None:
            return
        for _, _, parameters in self.chunks:
            for parameter in parameters.values():
                self.optimizer.state[parameter]["step"] = torch.tensor(float(steps))


class SeenRows(RowUpdate):
    """Plain gradient descent: rows without a gradient stay."""

    steps = None

    def __init__(self, table: Rows, param_groups: list[dict[str, Any]]) -> None:
        self.table, self.param_groups = table, param_groups

    def step(self, gradients: RowGradients) -> None:
        self.table.weight_ID.index_add_(0, gradients.rows_U, gradients.weight_UD, alpha=-self._rate("weight"))
        if self.table.bias_I is not None and gradients.bias_U is not None:
            self.table.bias_I.index_add_(0, gradients.rows_U, gradients.bias_U, alpha=-self._rate("bias"))

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def _rate(self, column: str) -> float:
        name = f"tables.{self.table.name}.{column}"
        return next(group["lr"] for group in self.param_groups if name in group["names"])
