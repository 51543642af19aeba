"""SASRec: self-attentive sequential recommendation (Kang and McAuley, ICDM 2018, arXiv 1808.09781).

By default the variant that the HSTU paper compares with:

    Q = LN(x)                                no affine, eps 1e-8
    z = LN(Q + MHA(Q, x, x))
    x = z + dropout(W2 dropout(ReLU(W1 z)))

With ``affine_norms`` and ``final_norm`` the original authors' layer.  With ``linear_std`` too it starts as in the
code of arXiv 2309.07602: nearly the identity, so that the first gradients go to the items.  The convolutions of
width 1 of the public codes are written as the linear layers they are.

Shapes: T actions in the batch, D model width, H heads, Q width per head.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from gr.adapters.slot import Slot
from gr.config import FRACTION, POSITIVE, ComponentConfig
from gr.models import init
from gr.models.encoder import head_width, softmax_attention
from gr.models.layers import FeedForward, Linear, Stack
from gr.models.layout import JaggedLayout
from gr_kernels.counter_random import derive_key

EPS = 1e-8


class SASRec(nn.Module):
    class Config(ComponentConfig):
        """ffn: inner width of the feed-forward layer.  dropout: inside it; attention_dropout: of the attention
        weights.  affine_norms: norms with learned gain and bias; final_norm: one more after the last block.
        linear_std: the weights of the attention's output and of the feed-forward layer start from N(0, linear_std^2)
        and their biases from zero; without it xavier-normal, and uniform within 1/sqrt(inputs)."""

        name: Literal["sasrec"] = "sasrec"
        layers: POSITIVE = 2
        heads: POSITIVE = 1
        ffn: POSITIVE = 50
        dropout: FRACTION = 0.2
        attention_dropout: FRACTION = 0.2
        affine_norms: bool = False
        final_norm: bool = False
        linear_std: Annotated[float, Field(gt=0)] | None = None
        causal: bool = True

    def __init__(self, config: Config, dim: int, max_length: int) -> None:
        super().__init__()
        self.uses_times, self.causal, self.cuttable = False, config.causal, True
        self.blocks = Stack(SASRecBlock(config, dim, layer) for layer in range(config.layers))
        self.final_norm = _norm(config, dim) if config.final_norm else nn.Identity()

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        x_TD = self.blocks(x_TD, layout)
        return self.final_norm(x_TD)


class SASRecBlock(nn.Module):
    def __init__(self, config: SASRec.Config, dim: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_width = head_width(dim, config.heads, "sasrec")
        self.attention_width = 2 * dim  # for gr.scaling.flops
        self.attention_norm, self.ffn_norm = _norm(config, dim), _norm(config, dim)
        # queries, keys and values are one (3D, D) matrix in the public codes; its xavier spread is kept
        projection = init.normal(math.sqrt(2 / (dim + 3 * dim)))
        self.query = Linear(dim, dim, projection, query_value={"query": range(dim)})
        self.key_value = Linear(dim, 2 * dim, projection, query_value={"value": range(dim, 2 * dim)})
        if config.linear_std is None:
            weight: init.Initialiser = init.xavier_normal
            biases = (init.uniform(1 / math.sqrt(dim)), init.uniform(1 / math.sqrt(config.ffn)))
        else:
            weight = init.normal(config.linear_std)
            biases = (init.zeros, init.zeros)
        self.output = Linear(dim, dim, weight)
        self.ffn = FeedForward(dim, config.ffn, "relu", config.dropout, weight, biases)
        self.after_attention, self.after_ffn = Slot(dim, dim), Slot(dim, dim)

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        heads = (self.config.heads, self.head_width)
        normed_TD = self.attention_norm(x_TD)
        keys, values = self.key_value(x_TD).chunk(2, dim=-1)
        attended_THQ = softmax_attention(
            self.query(normed_TD).unflatten(-1, heads),
            keys.unflatten(-1, heads),
            values.unflatten(-1, heads),
            layout,
            causal=self.config.causal,
            dropout=self.config.attention_dropout if self.training else 0.0,
            dropout_key=derive_key(layout.dropout_key, self.layer),
        )
        found_TD = self.after_attention(self.output(attended_THQ.flatten(1)), normed_TD)
        z_TD = self.ffn_norm(normed_TD + found_TD)
        key = derive_key(layout.dropout_key, self.layer, "ffn")
        return z_TD + self.after_ffn(self.ffn(z_TD, key, layout.cut), z_TD)


def _norm(config: SASRec.Config, dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=EPS, elementwise_affine=config.affine_norms)
