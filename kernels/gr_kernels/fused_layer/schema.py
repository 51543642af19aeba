"""The two operators as torch.library sees them: tensors and numbers, shapes without computing, gradients.

An implementation is four functions, registered under its name; all of them keep the same tensors for the backward
pass, and which those are stands here (and in README.md, with what they weigh).

Shapes: T rows, D width of the norm's input, E outputs of the linear layer, V width of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tensors = tuple[Tensor, ...]
Tables = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Implementation:
    """How one implementation computes; every function may be given rows of any stride, last dimension contiguous.

    With `recompute`, `linear` and `gated` aren't kept, and are empty; nor is one of `x` and `normed`: keeps_x() says
    which.  LN without parameters can be differentiated from its result, which is as narrow as the GEMM.

    norm_linear_silu: (x_TD, weight_ED, norm_weight, norm_bias, bias, eps, recompute)
        -> out_TE, mean_T, rstd_T, normed_TD (empty where x is kept instead), linear_TE (before the SiLU; empty with
        recompute).
    norm_linear_silu_backward: (d_parts, x_TD, weight_ED, norm_weight, norm_bias, bias, mean_T, rstd_T, normed_TD,
        linear_TE, recompute) -> gradients of x, weight, norm_weight, norm_bias, bias; None for an absent one.
        d_parts: the gradient of out_TE in one piece or several side by side, each of any row stride.
    gated_output: (attended_TV, gate_TV, residual_TD, weight_DV, bias, norm_weight, norm_bias, eps, dropout,
        dropout_key, recompute) -> out_TD, mean_T, rstd_T, gated_TV; the last empty with recompute.
    gated_output_backward: (d_out_TD, attended_TV, gate_TV, weight_DV, bias, norm_weight, norm_bias, mean_T, rstd_T,
        gated_TV, dropout, dropout_key, recompute)
        -> gradients of attended, gate, weight, bias, norm_weight, norm_bias.  (The residual's is d_out.)

    mean and rstd: (T,) float32, or float64 for float64.  dropout_key: 64 bits, unsigned.
    """

    norm_linear_silu: Callable[..., Tensors]
    norm_linear_silu_backward: Callable[..., Tables]
    gated_output: Callable[..., Tensors]
    gated_output_backward: Callable[..., Tables]


_SCHEMAS = {
    "norm_linear_silu": (
        "(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? bias, float eps, bool recompute)"
        " -> (Tensor out, Tensor mean, Tensor rstd, Tensor normed, Tensor linear)"
    ),
    "norm_linear_silu_backward": (
        "(Tensor[] d_parts, Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? bias, Tensor mean,"
        " Tensor rstd, Tensor normed, Tensor linear, bool recompute)"
        " -> (Tensor d_x, Tensor d_weight, Tensor d_norm_weight, Tensor d_norm_bias, Tensor d_bias)"
    ),
    "gated_output": (
        "(Tensor attended, Tensor gate, Tensor residual, Tensor weight, Tensor? bias, Tensor? norm_weight,"
        " Tensor? norm_bias, float eps, float dropout, SymInt dropout_key, bool recompute)"
        " -> (Tensor out, Tensor mean, Tensor rstd, Tensor gated)"
    ),
    "gated_output_backward": (
        "(Tensor d_out, Tensor attended, Tensor gate, Tensor weight, Tensor? bias, Tensor? norm_weight,"
        " Tensor? norm_bias, Tensor mean, Tensor rstd, Tensor gated, float dropout, SymInt dropout_key,"
        " bool recompute)"
        " -> (Tensor d_attended, Tensor d_gate, Tensor d_weight, Tensor d_bias, Tensor d_norm_weight,"
        " Tensor d_norm_bias)"
    ),
}


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


def signed(key: int) -> int:
    """The int64 with the bits of a 64-bit key, as the schema takes it."""
    return key - 2**64 if key >= 2**63 else key


def unsigned(key: int) -> int:
    return key + 2**64 if key < 0 else key


def register(name: str, implementation: Implementation) -> None:
    """Defines the four operators of an implementation; when its module is imported, which is on first use."""

    def with_all(function: Callable[..., Tables]) -> Callable[..., Tensors]:
        """An operator returns tensors: an absent gradient is an empty one."""

        def run(d_out: Any, x: Tensor, *arguments: Any) -> Tensors:
            return tuple(x.new_empty(0) if g is None else g for g in function(d_out, x, *arguments))

        return run

    functions: dict[str, Callable[..., Tensors]] = {
        "norm_linear_silu": implementation.norm_linear_silu,
        "norm_linear_silu_backward": with_all(implementation.norm_linear_silu_backward),
        "gated_output": implementation.gated_output,
        "gated_output_backward": with_all(implementation.gated_output_backward),
    }
    for function, run in functions.items():
        qualified = f"gr_kernels::{function}_{name}"
        torch.library.define(qualified, _SCHEMAS[function])
        torch.library.impl(qualified, "default", run)
        torch.library.register_fake(qualified, _FAKE[function])
    torch.library.register_autograd(
        f"gr_kernels::norm_linear_silu_{name}",
        _linear_gradient(operator("norm_linear_silu_backward", name)),
        setup_context=_keep_linear_of_operator,
    )
    torch.library.register_autograd(
        f"gr_kernels::gated_output_{name}",
        _gated_gradient(operator("gated_output_backward", name)),
        setup_context=_keep_gated,
    )
    for function in ("norm_linear_silu_backward", "gated_output_backward"):
        torch.library.register_autograd(f"gr_kernels::{function}_{name}", _refuse)


def _refuse(ctx: Any, *d_gradients: Tensor) -> None:
    raise RuntimeError("fused_layer's operators are differentiable once, and a gradient was differentiated.")


def _fake_linear(
    x: Tensor, weight: Tensor, norm_weight: Any, norm_bias: Any, bias: Any, eps: float, recompute: bool
) -> Tensors:
    rows, outputs = x.shape[0], weight.shape[0]
    statistics = (x.new_empty(rows, dtype=statistics_dtype(x.dtype)) for _ in range(2))
    normed = weight.new_empty(x.shape if keeps_normed(norm_weight, norm_bias, recompute) else (0,))
    linear = weight.new_empty((0,) if recompute else (rows, outputs))
    return (weight.new_empty(rows, outputs), *statistics, normed, linear)


def _fake_linear_backward(d_parts: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensors:
    tables = (x.new_empty(0) if table is None else table.new_empty(table.shape) for table in rest[:3])
    norm_weight, norm_bias, normed, recompute = (rest[i] for i in (0, 1, 5, 7))
    shape = x.shape if keeps_x(norm_weight, norm_bias, recompute) else normed.shape
    return (x.new_empty(shape), weight.new_empty(weight.shape), *tables)


def _fake_gated(attended: Tensor, gate: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Tensors:
    rows = attended.shape[0]
    statistics = (attended.new_empty(rows, dtype=statistics_dtype(attended.dtype)) for _ in range(2))
    gated = weight.new_empty((0,) if rest[-1] else attended.shape)
    return (residual.new_empty(residual.shape), *statistics, gated)


def _fake_gated_backward(
    d_out: Tensor, attended: Tensor, gate: Tensor, weight: Tensor, *rest: Any
) -> Tensors:
    tables = (attended.new_empty(0) if table is None else table.new_empty(table.shape) for table in rest[:3])
    return (*(x.new_empty(x.shape) for x in (attended, gate, weight)), *tables)


_FAKE: dict[str, Callable[..., Tensors]] = {
    "norm_linear_silu": _fake_linear,
    "norm_linear_silu_backward": _fake_linear_backward,
    "gated_output": _fake_gated,
    "gated_output_backward": _fake_gated_backward,
}


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


def _linear_gradient(backward: Any) -> Callable[..., Any]:
    def gradient(ctx: Any, d_out: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 7
        tensors = ctx.saved_tensors
        gradients = backward([d_out], *tensors, ctx.recompute)
        present = (g if t is not None else None for g, t in zip(gradients, tensors))
        return (*present, None, None)

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
        tensors = ctx.saved_tensors
        weight, mean = tensors[1], tensors[5]
        given = [
            weight.new_zeros(mean.shape[0], width) if part is None else part
            for part, width in zip(d_parts, ctx.widths)
        ]
        gradients = operator("norm_linear_silu", ctx.name, backward=True)(given, *tensors, ctx.recompute)
        present = (g if t is not None else None for g, t in zip(gradients, tensors))
        return (None, None, *present, None, None)


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    """Keeps what was attended, the gate, mean and rstd; without recomputation also the gated rows.  And parameters."""
    attended, gate, _residual, *parameters, _, ctx.dropout, ctx.dropout_key, ctx.recompute = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(attended, gate, *parameters, *output[1:])


def _gated_gradient(backward: Any) -> Callable[..., Any]:
    def gradient(ctx: Any, d_out: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 11
        tensors = ctx.saved_tensors
        gradients = backward(d_out.contiguous(), *tensors, ctx.dropout, ctx.dropout_key, ctx.recompute)
        d_attended, d_gate, *d_parameters = (g if t is not None else None for g, t in zip(gradients, tensors))
        return (d_attended, d_gate, d_out, *d_parameters, None, None, None, None)

    return gradient
