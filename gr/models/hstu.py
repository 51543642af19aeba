"""HSTU: hierarchical sequential transduction units (Zhai et al., ICML 2024, arXiv 2402.17152).

The layer behind the paper's public tables ("research" layer):

    x' = LN(x)                              no affine, eps 1e-6
    u, v, q, k = SiLU(x' W)                 no bias
    A_ij = SiLU(q_i . k_j + b_ij) / N       for j <= i; N is a constant of the model
    y = dropout(u * LN(concat_h sum_j A_ij v_j))
    x <- x + y W_o + b_o

with b_ij = w_pos[i - j] + w_time[bucket(t_{i+1} - t_j)], one table of each a layer, shared by the heads.

Shapes: T actions in the batch, D model width, H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gr.adapters.slot import Slot
from gr.config import FRACTION, POSITIVE, ComponentConfig
from gr.models import init
from gr.models.attention import attention
from gr.models.cut import Cut
from gr.models.dropout import from_generator, generator_dropout
from gr.models.layers import Linear, Stack
from gr.models.layout import JaggedLayout
from gr_kernels.counter_random import derive_key
from gr_kernels.fused_layer import gated_output, norm_linear_silu_parts
from gr_kernels.fused_layer.op import IMPLEMENTATIONS as FUSED
from gr_kernels.fused_layer.reference import keep_factors
from gr_kernels.hstu_attention import TimeBuckets
from gr_kernels.tracing import device_type

EPS = 1e-6
INIT_STD = 0.02
# The public code's N is the longest input plus ten places for generated items plus one
EXTRA_LENGTH = 11
BUCKETS = TimeBuckets("log", 129, 0.301)


class HSTU(nn.Module):
    """A stack of HSTU layers, causal, without a final norm."""

    class Config(ComponentConfig):
        """divisor: N, by default max_length + 11.  activation softmax: softmax(q.k / sqrt(Q) + b) instead of
        SiLU(...)/N.  dropout: of the gated output; attention_dropout: of the weights A."""

        name: Literal["hstu"] = "hstu"
        layers: POSITIVE = 2
        heads: POSITIVE = 1
        qk_dim: POSITIVE = 50
        v_dim: POSITIVE = 50
        dropout: FRACTION = 0.2
        attention_dropout: FRACTION = 0.0
        activation: Literal["silu", "softmax"] = "silu"
        relative_position: bool = True
        relative_time: bool = True
        divisor: Annotated[float, Field(gt=0)] | None = None

        def idle(self) -> dict[str, str]:
            return {"divisor": "activation is softmax"} if self.activation == "softmax" else {}

    def __init__(self, config: Config, dim: int, max_length: int) -> None:
        super().__init__()
        self.uses_times, self.causal, self.cuttable = config.relative_time, True, True
        self.layers = Stack(HSTULayer(config, dim, max_length, layer) for layer in range(config.layers))

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        return self.layers(x_TD, layout)


class HSTULayer(nn.Module):
    def __init__(self, config: HSTU.Config, dim: int, max_length: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.attention_width = config.heads * (config.qk_dim + config.v_dim)  # for gr.scaling.flops
        self.scale = 1.0 if config.activation == "silu" else config.qk_dim**-0.5
        self.divisor = config.divisor or float(max_length + EXTRA_LENGTH)
        values, keys = config.heads * config.v_dim, config.heads * config.qk_dim
        widths = (values, values, keys, keys)
        self.uvqk = Projection(dim, widths)
        self.output = GatedOutput(values, dim, config.dropout)
        # the gated output takes the place of a feed-forward layer, and has the residual in it
        self.after_attention, self.after_output = Slot(values), Slot(dim, dim, residual=True)
        self.position_bias = nn.Parameter(torch.empty(max_length)) if config.relative_position else None
        self.time_bias = nn.Parameter(torch.empty(BUCKETS.count)) if config.relative_time else None

    def initialisers(self) -> dict[str, init.Initialiser]:
        return {"position_bias": init.normal(INIT_STD), "time_bias": init.normal(INIT_STD)}

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        config = self.config
        u, v, q, k = self.uvqk(x_TD)
        attended_THV = attention(
            q.unflatten(-1, (config.heads, config.qk_dim)),
            k.unflatten(-1, (config.heads, config.qk_dim)),
            v.unflatten(-1, (config.heads, config.v_dim)),
            layout,
            scale=self.scale,
            divisor=self.divisor,
            activation=config.activation,
            position=self.position_bias,
            time=self.time_bias,
            buckets=BUCKETS,
            dropout=config.attention_dropout if self.training else 0.0,
            dropout_key=derive_key(layout.dropout_key, self.layer),
        )
        key = derive_key(layout.dropout_key, self.layer, "output")
        attended_TV = self.after_attention(attended_THV.flatten(1), x_TD)
        return self.after_output(self.output(attended_TV, u, x_TD, key, layout.cut), x_TD)


class Projection(Linear):
    """x -> SiLU(LN(x) W), cut into u, v, q and k of the given widths."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        u, v, q, _ = widths
        rows = {"value": range(u, u + v), "query": range(u + v, u + v + q)}
        super().__init__(dim, sum(widths), init.normal(INIT_STD), None, rows)
        self.widths = widths

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # a Linear by its parameters alone
        return norm_linear_silu_parts(
            x_TD,
            self.adapted,
            self.widths,
            eps=EPS,
            # on GPUs memory is short: there LN(x) and its product with W are formed again in the backward pass
            recompute=device_type(x_TD.device) != "cpu",
        )


class GatedOutput(Linear):
    """x + dropout(u * LN(o)) W_o + b_o."""

    def __init__(self, values: int, dim: int, dropout: float) -> None:
        super().__init__(values, dim, init.xavier_uniform)
        self.dropout = dropout

    def forward(  # type: ignore[override]
        self, attended_TV: Tensor, u_TV: Tensor, x_TD: Tensor, dropout_key: int, cut: Cut | None = None
    ) -> Tensor:
        if (
            from_generator(x_TD.device, FUSED) or cut is not None
        ):  # the operator counts rows, and those that it gets
            gated_TV = u_TV * F.layer_norm(attended_TV, u_TV.shape[-1:], eps=EPS)
            return x_TD + super().forward(self._dropped(gated_TV, dropout_key, cut))
        return gated_output(
            attended_TV,
            u_TV,
            x_TD,
            self.weight,
            self.bias,
            eps=EPS,
            dropout=self.dropout if self.training else 0.0,
            dropout_key=dropout_key,
        )

    def _dropped(self, gated_TV: Tensor, dropout_key: int, cut: Cut | None) -> Tensor:
        """The operator's dropout of all rows or, by their numbers, of a cut's."""
        if not self.training or not self.dropout:
            return gated_TV
        if from_generator(gated_TV.device, FUSED):
            return generator_dropout(gated_TV, self.dropout, cut)
        numbers_T = None if cut is None else cut.numbers_T
        return gated_TV * keep_factors(gated_TV.shape, self.dropout, dropout_key, gated_TV, numbers_T)
