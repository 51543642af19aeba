"""The two operators as torch.library sees them: tensors and numbers, shapes without computing, gradients.

An implementation is four functions; all of them keep the same tensors for the backward pass, and which those are
stands here (and in README.md, with what they weigh).

Shapes: T rows, D width of the norm's input, E outputs of the linear layer, V width of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field as dataclass_field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr_kernels.operators import Arguments, define, field, refuse_twice
from gr_kernels.tracing import once

Tensors = tuple[Tensor, ...]
Tables = tuple[Tensor | None, ...]

_NORM = [field("Tensor? norm_weight"), field("Tensor? norm_bias")]
_STATISTICS = [field("Tensor mean"), field("Tensor rstd")]
_DROPOUT = [field("float dropout"), field("key dropout_key")]
LINEAR = Arguments(
    [
        *(field("Tensor x"), field("Tensor weight"), *_NORM, field("Tensor? bias")),
        *(field("float eps"), field("bool recompute")),
    ]
)
LINEAR_KEPT = [*_STATISTICS, field("Tensor normed"), field("Tensor linear")]
LINEAR_BACKWARD = Arguments(
    [
        field("Tensor[] d_parts"),
        *(LINEAR.fields[place] for place in LINEAR.tensors),
        *(*LINEAR_KEPT, field("bool recompute")),
    ]
)
LINEAR_GRADIENTS = ("x", "weight", "norm_weight", "norm_bias", "bias")
GATED = Arguments(
    [
        *(field("Tensor attended"), field("Tensor gate"), field("Tensor residual"), field("Tensor weight")),
        *(field("Tensor? bias"), *_NORM, field("float eps"), *_DROPOUT, field("bool recompute")),
    ]
)
GATED_KEPT = [*_STATISTICS, field("Tensor gated")]
GATED_BACKWARD = Arguments(
    [
        field("Tensor d_out"),
        *(GATED.fields[place] for place in GATED.tensors if GATED.fields[place].name != "residual"),
        *(*GATED_KEPT, *_DROPOUT, field("bool recompute")),
    ]
)
GATED_GRADIENTS = ("attended", "gate", "weight", "bias", "norm_weight", "norm_bias")


def _results(names: list[str]) -> str:
    return f"({', '.join(f'Tensor {name}' for name in names)})"


_SCHEMAS = {
    "norm_linear_silu": f"({LINEAR.schema}) -> {_results(['out', *(x.name for x in LINEAR_KEPT)])}",
    "norm_linear_silu_backward": (
        f"({LINEAR_BACKWARD.schema}) -> {_results([f'd_{name}' for name in LINEAR_GRADIENTS])}"
    ),
    "gated_output": f"({GATED.schema}) -> {_results(['out', *(x.name for x in GATED_KEPT)])}",
    "gated_output_backward": (
        f"({GATED_BACKWARD.schema}) -> {_results([f'd_{name}' for name in GATED_GRADIENTS])}"
    ),
}


@dataclass(frozen=True)
class Functions:
    """How one implementation computes; every function may be given rows of any stride, last dimension contiguous.

    name: the operators are gr_kernels::<function>_<name>.

    With `recompute`, `linear` and `gated` aren't kept, and are empty; nor is one of `x` and `normed`: keeps_x() says
    which.  LN without parameters can be differentiated from its result, which is as narrow as the GEMM.

    norm_linear_silu: LINEAR's arguments -> out_TE, mean_T, rstd_T, normed_TD (empty where x is kept instead),
        linear_TE (before the SiLU; empty with recompute).
    norm_linear_silu_backward: LINEAR_BACKWARD's -> LINEAR_GRADIENTS; None for an absent argument's.
        d_parts: the gradient of out_TE in one piece or several side by side, each of any row stride.
    gated_output: GATED's -> out_TD, mean_T, rstd_T, gated_TV; the last empty with recompute.
    gated_output_backward: GATED_BACKWARD's -> GATED_GRADIENTS.  (The residual's is d_out.)

    mean and rstd: (T,) float32, or float64 for float64.  dropout_key: signed.
    """

    name: str
    norm_linear_silu: Callable[..., Tensors]
    norm_linear_silu_backward: Callable[..., Tables]
    gated_output: Callable[..., Tensors]
    gated_output_backward: Callable[..., Tables]
    register: Callable[[], None] = dataclass_field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "register", once(self._define))

    def __call__(self, function: str, arguments: tuple[Any, ...], widths: tuple[int, ...] = ()) -> Any:
        """The result of an operator, after `register`; norm_linear_silu's in parts where widths are given."""
        if widths:
            return Parts.apply(self.name, widths, *arguments)
        return operator(function, self.name)(*arguments)[0]

    def _define(self) -> None:
        name = self.name
        define(
            f"norm_linear_silu_{name}",
            _SCHEMAS["norm_linear_silu"],
            self.norm_linear_silu,
            _fake_linear,
            _linear_gradient(name),
            _keep_linear_of_operator,
        )
        define(
            f"gated_output_{name}",
            _SCHEMAS["gated_output"],
            self.gated_output,
            _fake_gated,
            _gated_gradient(name),
            _keep_gated,
        )
        for function, run, fake in (
            ("norm_linear_silu_backward", self.norm_linear_silu_backward, _fake_linear_backward),
            ("gated_output_backward", self.gated_output_backward, _fake_gated_backward),
        ):
            define(f"{function}_{name}", _SCHEMAS[function], _with_all(run), fake)
            refuse_twice(f"{function}_{name}")


def _with_all(function: Callable[..., Tables]) -> Callable[..., Tensors]:
    """An operator returns tensors: an absent gradient is an empty one."""

    def run(d_out: Any, x: Tensor, *arguments: Any) -> Tensors:
        return tuple(x.new_empty(0) if g is None else g for g in function(d_out, x, *arguments))

    return run


def operator(function: str, implementation: str, backward: bool = False) -> Any:
    """The registered torch operator: gr_kernels::<function>[_backward]_<implementation>."""
    return getattr(torch.ops.gr_kernels, f"{function}{'_backward' if backward else ''}_{implementation}")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What means, deviations and elementwise work are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps_x(norm_weight: Tensor | None, norm_bias: Tensor | None, recompute: bool) -> bool:
    """Whether norm_linear_silu keeps x for its backward pass: always but with recompute and a norm that has no
    parameters, where LN(x) is kept instead."""
    return not recompute or norm_weight is not None or norm_bias is not None


def keeps_normed(norm_weight: Tensor | None, norm_bias: Tensor | None, recompute: bool) -> bool:
    """Whether norm_linear_silu keeps LN(x)."""
    return not recompute or not keeps_x(norm_weight, norm_bias, recompute)


def _fake_linear(
    x: Tensor, weight: Tensor, norm_weight: Any, norm_bias: Any, bias: Any, eps: float, recompute: bool
) -> Tensors:
    rows, outputs = x.shape[0], weight.shape[0]
    statistics = (x.new_empty(rows, dtype=statistics_dtype(x.dtype)) for _ in range(2))
    normed = weight.new_empty(x.shape if keeps_normed(norm_weight, norm_bias, recompute) else (0,))
    linear = weight.new_empty((0,) if recompute else (rows, outputs))
    return (weight.new_empty(rows, outputs), *statistics, normed, linear)


def _fake_linear_backward(*arguments: Any) -> Tensors:
    given = LINEAR_BACKWARD.by_name(arguments)
    if not keeps_x(given["norm_weight"], given["norm_bias"], given["recompute"]):
        given["x"] = given["x"].new_empty(given["normed"].shape)
    return _fake_gradients(given, LINEAR_GRADIENTS)


def _fake_gated(attended: Tensor, gate: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Tensors:
    rows = attended.shape[0]
    statistics = (attended.new_empty(rows, dtype=statistics_dtype(attended.dtype)) for _ in range(2))
    gated = weight.new_empty((0,) if rest[-1] else attended.shape)
    return (residual.new_empty(residual.shape), *statistics, gated)


def _fake_gated_backward(*arguments: Any) -> Tensors:
    return _fake_gradients(GATED_BACKWARD.by_name(arguments), GATED_GRADIENTS)


def _fake_gradients(given: dict[str, Any], names: tuple[str, ...]) -> Tensors:
    """Like the arguments of these names; empty for absent ones."""
    empty = given[names[0]].new_empty(0)
    return tuple(
        torch.empty_like(empty) if given[n] is None else given[n].new_empty(given[n].shape) for n in names
    )


def _present(gradients: Tensors, names: tuple[str, ...], given: dict[str, Any]) -> dict[str, Tensor]:
    """By name, without those of absent arguments."""
    return {name: gradient for name, gradient in zip(names, gradients) if given[name] is not None}


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    """Keeps x or LN(x), mean and rstd; without recomputation both, and the linear layer's output.  And parameters."""
    x, *parameters, _, ctx.recompute = inputs
    norm_weight, norm_bias = parameters[1:3]
    kept = x if keeps_x(norm_weight, norm_bias, ctx.recompute) else x.new_empty(0)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kept, *parameters, *output[1:])


def _keep_linear_of_operator(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep_linear(ctx, inputs, output)


def _linear_gradients(
    ctx: Any, name: str, d_parts: list[Tensor], kept: tuple[Tensor, ...] | None = None
) -> Tables:
    """Of all inputs of norm_linear_silu, from the gradients of its parts.  kept: the saved tensors, where they were
    read already (activation checkpointing lets them be read once)."""
    arguments = (d_parts, *(ctx.saved_tensors if kept is None else kept), ctx.recompute)
    gradients = operator("norm_linear_silu", name, backward=True)(*arguments)
    return LINEAR.named(_present(gradients, LINEAR_GRADIENTS, LINEAR_BACKWARD.by_name(arguments)))


def _linear_gradient(name: str) -> Callable[..., Tables]:
    def gradient(ctx: Any, d_out: Tensor | None, *others: None) -> Tables:
        return LINEAR.named({}) if d_out is None else _linear_gradients(ctx, name, [d_out])

    return gradient


class Parts(torch.autograd.Function):
    """norm_linear_silu whose result is given as several columns' views, and whose gradients are taken as they come:
    autograd's own split would first write them side by side, which is a pass over memory of its own."""

    @staticmethod
    def forward(ctx: Any, name: str, widths: tuple[int, ...], *inputs: Any) -> tuple[Tensor, ...]:
        output = operator("norm_linear_silu", name)(*inputs)
        ctx.name, ctx.widths = name, widths
        _keep_linear(ctx, inputs, output)
        return output[0].split(widths, dim=1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_parts: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        _, weight, *_, mean, _rstd, _normed, _linear = kept
        given = [
            weight.new_zeros(mean.shape[0], width) if part is None else part
            for part, width in zip(d_parts, ctx.widths)
        ]
        return (None, None, *_linear_gradients(ctx, ctx.name, given, kept))


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    """Keeps what was attended, the gate, mean and rstd; without recomputation also the gated rows.  And parameters."""
    attended, gate, _residual, *parameters, _, ctx.dropout, ctx.dropout_key, ctx.recompute = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(attended, gate, *parameters, *output[1:])


def _gated_gradient(name: str) -> Callable[..., Tables]:
    def gradient(ctx: Any, d_out: Tensor | None, *others: None) -> Tables:
        if d_out is None:
            return GATED.named({})
        arguments = (d_out.contiguous(), *ctx.saved_tensors, ctx.dropout, ctx.dropout_key, ctx.recompute)
        gradients = operator("gated_output", name, backward=True)(*arguments)
        present = _present(gradients, GATED_GRADIENTS, GATED_BACKWARD.by_name(arguments))
        return GATED.named({**present, "residual": d_out})

    return gradient
