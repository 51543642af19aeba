"""Jagged dropout as operators of torch.library. Each is its own gradient, for which it decides again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gr_kernels.operators import define, signed, unsigned
from gr_kernels.tracing import once


@dataclass(frozen=True)
class Operator:
    """gr_kernels::<name>, from a function of x, the probability, the key and the rows' numbers."""

    name: str
    run: Callable[[Tensor, float, int, Tensor | None], Tensor]
    register: Callable[[], None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "register", once(self._define))

    def __call__(self, x: Tensor, probability: float, key: int, rows: Tensor | None = None) -> Tensor:
        """jagged_dropout() for a call without obstacle, after `register`."""
        return self._operator()(x, probability, signed(key), rows)  # type: ignore[no-any-return]

    def _operator(self) -> Any:
        return getattr(torch.ops.gr_kernels, self.name)

    def _define(self) -> None:
        schema = "(Tensor x, float probability, int key, Tensor? rows=None) -> Tensor"
        define(self.name, schema, self._run, _fake, self._backward, _keep)

    def _run(self, x: Tensor, probability: float, key: int, rows: Tensor | None = None) -> Tensor:
        return self.run(x, probability, unsigned(key), rows)

    def _backward(self, ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        return self._operator()(d_out, *ctx.settings, *ctx.saved_tensors), None, None, None


def _fake(x: Tensor, probability: float, key: int, rows: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:3]
    ctx.save_for_backward(*inputs[3:])
