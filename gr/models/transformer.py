"""The standard Transformer encoder (Vaswani et al., arXiv 1706.03762), causal or bidirectional.

norm pre:   x <- x + dropout(MHA(LN(x)));  x <- x + FFN(LN(x));  one LN after the last block
norm post:  x <- LN(x + dropout(MHA(x)));  x <- LN(x + FFN(x))

Bidirectional with post-norms, GELU and ``input_norm`` it is the encoder of BERT4Rec (Sun et al., arXiv
1904.06690; BERT, arXiv 1810.04805).

Shapes: T actions in the batch, D model width, H heads, Q width per head.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from gr.adapters.slot import Slot
from gr.config import FRACTION, POSITIVE, ComponentConfig
from gr.models import init
from gr.models.dropout import Dropout
from gr.models.encoder import head_width, softmax_attention
from gr.models.layers import FeedForward, Linear, Stack
from gr.models.layout import JaggedLayout
from gr_kernels.counter_random import derive_key

EPS = 1e-12
INIT_STD = 0.02


class Transformer(nn.Module):
    class Config(ComponentConfig):
        """ffn: inner width, 4 D by default.  dropout: of both branches, and of the feed-forward layer's inner values
        unless ``ffn_dropout`` says another probability (BERT's is 0).  input_norm: a norm and dropout before the
        first block."""

        name: Literal["transformer"] = "transformer"
        layers: POSITIVE = 2
        heads: POSITIVE = 1
        ffn: POSITIVE | None = None
        dropout: FRACTION = 0.1
        attention_dropout: FRACTION = 0.1
        ffn_dropout: FRACTION | None = None
        activation: Literal["gelu", "relu"] = "gelu"
        norm: Literal["pre", "post"] = "pre"
        input_norm: bool = False
        causal: bool = True

    def __init__(self, config: Config, dim: int, max_length: int) -> None:
        super().__init__()
        self.config = config
        self.uses_times, self.causal, self.cuttable = False, config.causal, True
        self.input_norm = nn.LayerNorm(dim, eps=EPS) if config.input_norm else None
        self.input_dropout = Dropout(config.dropout)
        self.blocks = Stack(TransformerBlock(config, dim, layer) for layer in range(config.layers))
        self.final_norm = nn.LayerNorm(dim, eps=EPS) if config.norm == "pre" else None

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        if self.input_norm is not None:
            x_TD = self.input_dropout(
                self.input_norm(x_TD), derive_key(layout.dropout_key, "input_norm"), layout.cut
            )
        x_TD = self.blocks(x_TD, layout)
        return x_TD if self.final_norm is None else self.final_norm(x_TD)


class TransformerBlock(nn.Module):
    def __init__(self, config: Transformer.Config, dim: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_width = head_width(dim, config.heads, "transformer")
        self.attention_width = 2 * dim  # for gr.scaling.flops
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        weight = init.normal(INIT_STD)
        rows = {"query": range(dim), "value": range(2 * dim, 3 * dim)}
        self.qkv = Linear(dim, 3 * dim, weight, query_value=rows)
        self.output = Linear(dim, dim, weight)
        self.dropout = Dropout(config.dropout)
        self.ffn = FeedForward(
            dim,
            config.ffn or 4 * dim,
            config.activation,
            config.dropout,
            weight,
            inner_dropout=config.ffn_dropout,
        )
        self.after_attention, self.after_ffn = Slot(dim, dim), Slot(dim, dim)

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        ffn_key = derive_key(layout.dropout_key, self.layer, "ffn")
        if self.config.norm == "pre":
            x_TD = x_TD + self._attention(self.attention_norm(x_TD), layout)
            return x_TD + self._feed_forward(self.ffn_norm(x_TD), ffn_key, layout)
        x_TD = self.attention_norm(x_TD + self._attention(x_TD, layout))
        return self.ffn_norm(x_TD + self._feed_forward(x_TD, ffn_key, layout))

    def _feed_forward(self, x_TD: Tensor, key: int, layout: JaggedLayout) -> Tensor:
        return self.after_ffn(self.ffn(x_TD, key, layout.cut), x_TD)

    def _attention(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        heads = (self.config.heads, self.head_width)
        q, k, v = (part.unflatten(-1, heads) for part in self.qkv(x_TD).chunk(3, dim=-1))
        attended_THQ = softmax_attention(
            q,
            k,
            v,
            layout,
            causal=self.config.causal,
            dropout=self.config.attention_dropout if self.training else 0.0,
            dropout_key=derive_key(layout.dropout_key, self.layer),
        )
        key = derive_key(layout.dropout_key, self.layer, "output")
        found_TD = self.dropout(self.output(attended_THQ.flatten(1)), key, layout.cut)
        return self.after_attention(found_TD, x_TD)
