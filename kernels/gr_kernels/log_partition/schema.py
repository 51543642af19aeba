"""Losses over a table's rows as operators of torch.library, for implementations that give every query's value.

Shapes: T queries, I table rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from gr_kernels.operators import Arguments, Field, define, field, refuse_twice
from gr_kernels.tracing import once

_LEAVES = (field("Tensor queries"), field("Tensor table"), field("Tensor? bias"))
_SETTINGS = (field("float scale"), field("float? normalize_eps"))
_KEPT = (field("Tensor peaks"), field("Tensor sums"))
_WANTED = (field("bool want_table"), field("bool want_bias"))

Values = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Operators:
    """gr_kernels::<name> and gr_kernels::<name>_backward, from two functions. They trace and differentiate once.

    rows: the tensors that say which rows a query looks at, between bias and scale in both functions' arguments.
    forward: (queries, table, bias, *rows, scale, normalize_eps, want_means) -> values_T, peaks_T, sums_T, means_TD.
        Peak and sum are what a value was formed with; a mean is the value's slope along the query, over the scale
        (no rows where it isn't wanted). All are float32.
    backward: (d_values, queries, table, bias, *rows, peaks, sums, scale, normalize_eps, want_table, want_bias) ->
        d_table (I, D) in the table's dtype, d_bias (I,) float32; empty where not wanted.
    """

    name: str
    rows: tuple[Field, ...]
    forward: Callable[..., Values]
    backward: Callable[..., tuple[Tensor, Tensor]]
    register: Callable[[], None] = dataclass_field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "register", once(self._define))

    def __call__(
        self,
        queries: Tensor,
        table: Tensor,
        bias: Tensor | None,
        *rows: Tensor | None,
        scale: float,
        normalize_eps: float | None,
    ) -> Tensor:
        """The values, after `register`."""
        settings = (scale, normalize_eps, queries.requires_grad)
        values_T: Tensor = self._operator()(queries, table, bias, *rows, *settings)[0]
        return values_T

    def _operator(self, suffix: str = "") -> Any:
        return getattr(torch.ops.gr_kernels, self.name + suffix)

    def _define(self) -> None:
        inputs = Arguments([*_LEAVES, *self.rows, *_SETTINGS, field("bool want_means")])
        results = "(Tensor values, Tensor peaks, Tensor sums, Tensor means)"
        define(self.name, f"({inputs.schema}) -> {results}", self.forward, _fake, self._differentiate, _keep)
        inputs = Arguments([field("Tensor d_values"), *_LEAVES, *self.rows, *_KEPT, *_SETTINGS, *_WANTED])
        schema = f"({inputs.schema}) -> (Tensor d_table, Tensor d_bias)"
        define(f"{self.name}_backward", schema, self.backward, _fake_backward)
        refuse_twice(f"{self.name}_backward")

    def _differentiate(self, ctx: Any, d_values: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        d_queries = d_table = d_bias = None
        want_queries, want_table, want_bias = ctx.needs_input_grad[:3]
        if d_values is not None:
            *tensors, means_TD = ctx.saved_tensors
            queries, _, bias = tensors[:3]
            if want_queries:
                d_queries = (means_TD * (d_values * ctx.settings[0])[:, None]).to(queries.dtype)
            if want_table or want_bias:
                table_ID, bias_I = self._operator("_backward")(
                    d_values, *tensors, *ctx.settings, want_table, want_bias
                )
                d_table = table_ID if want_table else None
                d_bias = bias_I.to(bias.dtype) if want_bias else None
        return d_queries, d_table, d_bias, *[None] * (len(ctx.needs_input_grad) - 3)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Values) -> None:
    *tensors, scale, normalize_eps, _ = inputs
    _, *formed_with = output
    ctx.settings = (scale, normalize_eps)
    ctx.save_for_backward(*tensors, *formed_with)
    ctx.mark_non_differentiable(*formed_with)
    ctx.set_materialize_grads(False)


def _fake(queries: Tensor, *rest: Any) -> Values:
    count, width = queries.shape
    values_T, peaks_T, sums_T = (queries.new_empty(count, dtype=torch.float32) for _ in range(3))
    means_TD = queries.new_empty(count if rest[-1] else 0, width, dtype=torch.float32)
    return values_T, peaks_T, sums_T, means_TD


def _fake_backward(d_values: Tensor, queries: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, want_table, want_bias = rest
    catalogue, width = table.shape
    d_table = table.new_empty(catalogue if want_table else 0, width)
    return d_table, table.new_empty(catalogue if want_bias else 0, dtype=torch.float32)
