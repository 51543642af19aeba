"""The two public functions: check a call, pick an implementation, run it.

Shapes: T rows, D width of the model, E outputs of the first linear layer, V width of the gate (heads times values).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gr_kernels.dispatch import Choice, Implementation, choose, takes_all
from gr_kernels.fused_layer import reference, triton_op
from gr_kernels.operators import signed

# In order of preference; "auto" takes the first without an obstacle.
IMPLEMENTATIONS = (
    Implementation(
        "triton",
        triton_op.obstacle,
        triton_op.FUNCTIONS,
        "fused kernels",
        device="cuda",
        register=triton_op.FUNCTIONS.register,
    ),
    Implementation(
        "reference",
        takes_all,
        reference.FUNCTIONS,
        "plain PyTorch, any device and precision",
        register=reference.FUNCTIONS.register,
    ),
)


def norm_linear_silu(
    x_TD: Tensor,
    weight_ED: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float,
    recompute: bool = True,
    implementation: str = "auto",
) -> Tensor:
    """SiLU(LN(x) W^T + b): the first half of an HSTU block (Zhai et al., ICML 2024, eq. 1).

    Where the result is to be split into u, v, q and k, norm_linear_silu_parts() saves the backward pass a copy.

    Args:
        x_TD: rows to normalise, floating; may be wider than the weight (float32 rows, bfloat16 weight).
        weight_ED: as nn.Linear stores it; its dtype is the GEMM's and the result's.  Under autocast it is cast.
        norm_weight, norm_bias: (D,) each or None, any floating dtype: LN's scale and shift.
        bias: (E,) in the weight's dtype, or None.
        eps: added to the variance.
        recompute: keep LN(x) (x, where LN has scale or shift) and 8 bytes a row for the backward pass, and form the
            GEMM again there; else keep x, LN(x) and the GEMM's result.
        implementation: "auto", "triton" or "reference".

    Returns:
        (T, E) in the weight's dtype, contiguous.  Differentiable once.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run.
    """
    return _linear((), x_TD, weight_ED, norm_weight, norm_bias, bias, eps, recompute, implementation)  # type: ignore[no-any-return]


def norm_linear_silu_parts(
    x_TD: Tensor,
    weight_ED: Tensor,
    widths: Sequence[int],
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float,
    recompute: bool = True,
    implementation: str = "auto",
) -> tuple[Tensor, ...]:
    """norm_linear_silu(...).split(widths, dim=1), whose backward pass takes the parts' gradients where they lie.

    widths: of the parts, E in sum.  The other arguments, the memory kept and the errors are norm_linear_silu's.
    Returns views of one (T, E) tensor; don't write to them.  The kernels read gradients in place where there are at
    most four parts, of widths that 128 divides; others are first copied side by side.
    """
    if min(widths, default=0) < 1 or sum(widths) != weight_ED.shape[0]:
        raise ValueError(
            f"norm_linear_silu_parts: widths must be positive and add up to the weight's {weight_ED.shape[0]} rows, "
            f"not {list(widths)}."
        )
    return _linear(  # type: ignore[no-any-return]
        tuple(widths), x_TD, weight_ED, norm_weight, norm_bias, bias, eps, recompute, implementation
    )


def gated_output(
    attended_TV: Tensor,
    gate_TV: Tensor,
    residual_TD: Tensor,
    weight_DV: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float,
    dropout: float = 0.0,
    dropout_key: int = 0,
    recompute: bool = True,
    implementation: str = "auto",
) -> Tensor:
    """residual + dropout(LN(attended) * gate) W^T + b: the second half of an HSTU block (eq. 3).

    Args:
        attended_TV: the attention's output, heads side by side.
        gate_TV: u, of attended's shape and dtype.
        residual_TD: the block's input; may be wider than the weight.  The result has its dtype.
        weight_DV: as nn.Linear stores it; its dtype is the GEMM's.  Under autocast it is cast.
        bias: (D,) in the weight's dtype, or None.
        norm_weight, norm_bias: (V,) each or None, any floating dtype: LN's scale and shift.
        eps: added to the variance.
        dropout: probability with which a value is zeroed (the others are divided by 1 - dropout), a pure function of
            (dropout_key, row, column): pass another key at every step and layer.
        dropout_key: 64-bit.
        recompute: keep attended, gate and 8 bytes a row for the backward pass and form the gated rows again there;
            else keep them (V numbers a row more).
        implementation: "auto", "triton" or "reference".

    Returns:
        (T, D) in the residual's dtype, contiguous.  Differentiable once.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run.
    """
    weight_DV, bias = _autocast(attended_TV, weight_DV, bias)
    choice = _choose_gated(
        attended_TV,
        gate_TV,
        residual_TD,
        weight_DV,
        bias,
        norm_weight,
        norm_bias,
        dropout,
        dropout_key,
        implementation,
    )
    arguments = (
        *(attended_TV, gate_TV, residual_TD, weight_DV, bias, norm_weight, norm_bias),
        *(float(eps), float(dropout), signed(dropout_key), recompute),
    )
    with _without_autocast(attended_TV):
        return choice.implementation.run("gated_output", arguments)  # type: ignore[no-any-return]


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The linear layer's parameters in the dtype autocast wants of a GEMM, or as they are."""
    if not torch.is_autocast_enabled(x.device.type):
        return weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else contextlib.nullcontext()


def _linear(
    widths: tuple[int, ...],
    x_TD: Tensor,
    weight_ED: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    eps: float,
    recompute: bool,
    implementation: str,
) -> Any:
    """The result, or its parts where widths are given."""
    weight_ED, bias = _autocast(x_TD, weight_ED, bias)
    choice = _choose_linear(x_TD, weight_ED, norm_weight, norm_bias, bias, implementation)
    arguments = (x_TD, weight_ED, norm_weight, norm_bias, bias, float(eps), recompute)
    with _without_autocast(x_TD):
        return choice.implementation.run("norm_linear_silu", arguments, widths)


def _choose_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    implementation: str,
) -> Choice:
    check = _Checks("norm_linear_silu", x_TD.device)
    check.matrix("x", x_TD)
    check.matrix("weight", weight_ED, columns=x_TD.shape[1])
    for name, table in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check.vector(name, table, x_TD.shape[1])
    check.vector("bias", bias, weight_ED.shape[0], weight_ED.dtype)
    return choose(
        check.operator,
        IMPLEMENTATIONS,
        x_TD.device,
        (x_TD, weight_ED, norm_weight, norm_bias, bias),
        implementation,
    )


def _choose_gated(
    attended_TV: Tensor,
    gate_TV: Tensor,
    residual_TD: Tensor,
    weight_DV: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dropout: float,
    dropout_key: int,
    implementation: str,
) -> Choice:
    check = _Checks("gated_output", attended_TV.device)
    check.matrix("attended", attended_TV)
    rows, width = attended_TV.shape
    check.matrix("gate", gate_TV, rows, width, attended_TV.dtype)
    check.matrix("weight", weight_DV, columns=width)
    check.matrix("residual", residual_TD, rows, weight_DV.shape[0])
    check.vector("bias", bias, weight_DV.shape[0], weight_DV.dtype)
    for name, table in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check.vector(name, table, width)
    if not 0.0 <= dropout < 1.0:
        check.fail(f"dropout must be in [0, 1), not {dropout}")
    if not 0 <= dropout_key < 2**64:
        check.fail(f"dropout_key must be in [0, 2^64), not {dropout_key}: make it with derive_key")
    tensors = (attended_TV, gate_TV, residual_TD, weight_DV, bias, norm_weight, norm_bias)
    return choose(check.operator, IMPLEMENTATIONS, attended_TV.device, tensors, implementation)


class _Checks:
    """One sentence for a tensor that doesn't fit."""

    def __init__(self, operator: str, device: torch.device) -> None:
        self.operator, self.device = operator, device

    def fail(self, sentence: str) -> None:
        raise ValueError(f"{self.operator}: {sentence}.")

    def matrix(
        self,
        name: str,
        x: Tensor,
        rows: int | None = None,
        columns: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if x.dim() != 2:
            self.fail(f"{name} must have 2 dimensions, not shape {tuple(x.shape)}")
        for what, wanted, found in (("rows", rows, x.shape[0]), ("columns", columns, x.shape[1])):
            if wanted is not None and found != wanted:
                self.fail(f"{name} must have {wanted} {what}, not {found}")
        if x.shape[1] == 0:
            self.fail(f"{name} has no columns")
        self._common(name, x, dtype)

    def vector(self, name: str, x: Tensor | None, length: int, dtype: torch.dtype | None = None) -> None:
        if x is None:
            return
        if x.shape != (length,):
            self.fail(f"{name} must have shape ({length},), not {tuple(x.shape)}")
        self._common(name, x, dtype)

    def _common(self, name: str, x: Tensor, dtype: torch.dtype | None) -> None:
        if x.device != self.device:
            self.fail(f"{name} is on {x.device}, the first argument on {self.device}")
        if not x.dtype.is_floating_point:
            self.fail(f"{name} must be floating point, not {x.dtype}")
        if dtype is not None and x.dtype != dtype:
            self.fail(f"{name} is {x.dtype} and must be {dtype}")
