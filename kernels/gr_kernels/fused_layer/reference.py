"""Both operators in plain PyTorch, any device and dtype, keeping as little for the backward pass as the kernels do.

Norms, gates and SiLU are computed in float32 (float64 for float64) and rounded to the weight's dtype where a GEMM
reads them.

Shapes: T rows, D width of the norm's input, E outputs of the linear layer, V width of the gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.counter_random import philox
from gr_kernels.fused_layer.schema import Functions, keeps_normed, keeps_x, statistics_dtype
from gr_kernels.operators import unsigned


def keep_factors(
    shape: torch.Size, dropout: float, key: int, like: Tensor, numbers_T: Tensor | None = None
) -> Tensor:
    """(T, V) of `like`'s dtype: 0 where dropout zeroes, else 1 / (1 - dropout).

    The value of row t and column c goes by word c mod 4 of Philox4x32-10 at counter (t, 0, c div 4, 0): it is kept
    when the word is at least ceil(dropout 2^32). numbers: int64, t of each row, where these are some of many; else 0,
    1, 2, ...
    """
    rows, columns = shape
    row_T = torch.arange(rows, device=like.device) if numbers_T is None else numbers_T
    row_T1 = row_T[:, None] & 0xFFFFFFFF
    block_C = torch.arange((columns + 3) // 4, device=like.device)
    words = philox(key, row_T1, torch.zeros_like(block_C), block_C, torch.zeros_like(block_C))
    word_TV = torch.stack(words, dim=-1).flatten(1)[:, :columns]
    return (word_TV >= math.ceil(dropout * 2**32)).to(like.dtype).mul_(1.0 / (1.0 - dropout))


def _norm(
    x_TD: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(x), mean and 1 / standard deviation in the statistics' dtype."""
    dtype = statistics_dtype(x_TD.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    normed_TD, mean_T1, rstd_T1 = torch.native_layer_norm(x_TD.to(dtype), x_TD.shape[1:], weight, bias, eps)
    return normed_TD, mean_T1.flatten(), rstd_T1.flatten()


def _apply_norm(
    x_TD: Tensor, mean_T: Tensor, rstd_T: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """LN(x) once more, from its statistics."""
    normed_TD = (x_TD.to(mean_T.dtype) - mean_T[:, None]) * rstd_T[:, None]
    if weight is not None:
        normed_TD *= weight
    if bias is not None:
        normed_TD += bias
    return normed_TD


def _norm_backward(
    d_normed_TD: Tensor,
    x_TD: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x and of the norm's parameters, each in its own dtype (None for an absent one)."""
    dtype = mean_T.dtype
    wide = [None if p is None else p.to(dtype) for p in (weight, bias)]
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed_TD.to(dtype), x_TD.to(dtype), x_TD.shape[1:], mean_T[:, None], rstd_T[:, None], *wide,
        [True, weight is not None, bias is not None],
    )  # fmt: skip
    return (
        d_x.to(x_TD.dtype),
        None if weight is None else d_weight.to(weight.dtype),
        None if bias is None else d_bias.to(bias.dtype),
    )


def norm_linear_silu(
    x_TD: Tensor,
    weight_ED: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    eps: float,
    recompute: bool,
) -> tuple[Tensor, ...]:
    """(out (T, E), mean (T,), 1 / standard deviation (T,), LN(x) (T, D), its linear layer (T, E)).  The last two are
    empty where the backward pass forms them again."""
    normed, mean, rstd = _norm(x_TD, norm_weight, norm_bias, eps)
    normed = normed.to(weight_ED.dtype)
    linear = F.linear(normed, weight_ED, bias)
    out = F.silu(linear)
    kept = normed if keeps_normed(norm_weight, norm_bias, recompute) else weight_ED.new_empty(0)
    return out, mean, rstd, kept, weight_ED.new_empty(0) if recompute else linear


def norm_linear_silu_backward(
    d_parts: Sequence[Tensor],
    x_TD: Tensor,
    weight_ED: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    normed_TD: Tensor,
    linear_TE: Tensor,
    recompute: bool,
) -> tuple[Tensor | None, ...]:
    if not keeps_normed(norm_weight, norm_bias, recompute):
        normed_TD = _apply_norm(x_TD, mean_T, rstd_T, norm_weight, norm_bias).to(weight_ED.dtype)
    if recompute:
        linear_TE = F.linear(normed_TD, weight_ED, bias)
    d_out_TE = d_parts[0] if len(d_parts) == 1 else torch.cat(list(d_parts), dim=1)
    d_linear_TE = torch.ops.aten.silu_backward(d_out_TE, linear_TE)
    d_weight = d_linear_TE.T @ normed_TD
    d_bias = None if bias is None else d_linear_TE.sum(0)
    d_normed_TD = d_linear_TE @ weight_ED
    if not keeps_x(norm_weight, norm_bias, recompute):
        # LN(x) is its own LN, of mean 0 and deviation 1
        zero, one = torch.zeros_like(mean_T), torch.ones_like(rstd_T)
        standard_TD = normed_TD.to(mean_T.dtype)
        d_standard, _, _ = _norm_backward(d_normed_TD, standard_TD, zero, one, None, None)
        return (d_standard * rstd_T[:, None]).to(x_TD.dtype), d_weight, None, None, d_bias
    d_x, d_norm_weight, d_norm_bias = _norm_backward(
        d_normed_TD, x_TD, mean_T, rstd_T, norm_weight, norm_bias
    )
    return d_x, d_weight, d_norm_weight, d_norm_bias, d_bias


def gated_output(
    attended_TV: Tensor,
    gate_TV: Tensor,
    residual_TD: Tensor,
    weight_DV: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dropout: float,
    dropout_key: int,
    recompute: bool,
) -> tuple[Tensor, ...]:
    normed, mean, rstd = _norm(attended_TV, norm_weight, norm_bias, eps)
    gated = _gate(normed, gate_TV, dropout, dropout_key).to(weight_DV.dtype)
    out = (residual_TD + F.linear(gated, weight_DV, bias)).to(residual_TD.dtype)
    return out, mean, rstd, weight_DV.new_empty(0) if recompute else gated


def _gate(normed_TV: Tensor, gate_TV: Tensor, dropout: float, dropout_key: int) -> Tensor:
    """dropout(LN(o) u), in the statistics' dtype."""
    gated = normed_TV * gate_TV
    if dropout > 0.0:
        gated *= keep_factors(gated.shape, dropout, unsigned(dropout_key), gated)
    return gated


def gated_output_backward(
    d_out_TD: Tensor,
    attended_TV: Tensor,
    gate_TV: Tensor,
    weight_DV: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    gated_TV: Tensor,
    dropout: float,
    dropout_key: int,
    recompute: bool,
) -> tuple[Tensor | None, ...]:
    d_linear_TD = d_out_TD.to(weight_DV.dtype)
    normed_TV = _apply_norm(attended_TV, mean_T, rstd_T, norm_weight, norm_bias)
    if recompute:
        gated_TV = _gate(normed_TV, gate_TV, dropout, dropout_key).to(weight_DV.dtype)
    d_weight = d_linear_TD.T @ gated_TV
    d_bias = None if bias is None else d_linear_TD.sum(0)
    d_gated_TV = (d_linear_TD @ weight_DV).to(mean_T.dtype)
    if dropout > 0.0:
        d_gated_TV *= keep_factors(d_gated_TV.shape, dropout, unsigned(dropout_key), d_gated_TV)
    d_gate = (d_gated_TV * normed_TV).to(gate_TV.dtype)
    d_attended, d_norm_weight, d_norm_bias = _norm_backward(
        d_gated_TV * gate_TV, attended_TV, mean_T, rstd_T, norm_weight, norm_bias
    )
    return d_attended, d_gate, d_weight, d_bias, d_norm_weight, d_norm_bias


FUNCTIONS = Functions(
    "reference", norm_linear_silu, norm_linear_silu_backward, gated_output, gated_output_backward
)
