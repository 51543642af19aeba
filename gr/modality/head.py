"""From content to an item's vector: a projection, and a fusion with the vector of its id.

Shapes: U items, E width of content, D of the model's items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import COUNT, FRACTION, Section
from gr_kernels.counter_random import derive_key

SHORTEST = 1e-12
"""The length of a vector that is one of zeros."""


class HeadSection(Section):
    """y = act(W x + b), then ``layers`` times act(W dropout(y) + b), of width D (IDvs.MoRec, SIGIR 2023: GELU; its
    two-stage variant has 8 such layers).  unit: content is L2-normalised first, times ``scale``.  frozen: it stays as
    the run of ``train.start_from`` left it."""

    activation: Literal["gelu", "none"] = "gelu"
    layers: COUNT = 0
    dropout: FRACTION = 0.0
    unit: bool = True
    scale: Annotated[float, Field(gt=0)] = 1.0
    frozen: bool = False

    def idle(self) -> dict[str, str]:
        idle = {} if self.layers else {"dropout": "layers is 0"}
        return idle if self.unit else idle | {"scale": "unit is false"}


class Head(nn.Module):
    """Content (U, E) -> vectors (U, D)."""

    def __init__(self, config: HeadSection, width: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(width, dim)
        self.more = nn.ModuleList(nn.Linear(dim, dim) for _ in range(config.layers))
        self.requires_grad_(not config.frozen)

    def forward(self, content_UE: Tensor) -> Tensor:
        config = self.config
        if config.unit:
            content_UE = _unit(content_UE) * config.scale
        activation: Callable[[Tensor], Tensor] = F.gelu if config.activation == "gelu" else lambda x: x
        x_UD = activation(self.first(content_UE))
        for layer in self.more:
            x_UD = activation(layer(F.dropout(x_UD, config.dropout, self.training)))
        return x_UD


def _unit(content_UE: Tensor) -> Tensor:
    """Each vector by its length.  One of zeros, which an encoder may make of an empty picture, has no direction and
    stays: divided by a smallest length its gradient would be 10^12 times too large, and soon no number."""
    length_U1 = content_UE.norm(dim=1, keepdim=True)
    return content_UE / length_U1.masked_fill(length_U1 < SHORTEST, math.inf)


class Fusion(nn.Module):
    """An item's two vectors as one.

    add: id + content.  concat: a linear layer over both (D values of the id, D of the content).  gated: g id +
    (1 - g) content, g = sigmoid(W [id, content] + b), a gate for each of the D values.
    """

    def __init__(self, how: Literal["add", "concat", "gated"], dim: int) -> None:
        super().__init__()
        self.how = how
        self.mix = None if how == "add" else nn.Linear(2 * dim, dim)

    def forward(self, id_UD: Tensor, content_UD: Tensor) -> Tensor:
        if self.mix is None:
            return id_UD + content_UD
        mixed_UD = self.mix(torch.cat([id_UD, content_UD], dim=1))
        if self.how == "concat":
            return mixed_UD
        gate_UD = mixed_UD.sigmoid()
        return gate_UD * id_UD + (1 - gate_UD) * content_UD


def initialise(module: nn.Module, seed: int, prefix: str) -> None:
    """Fill linear layers by (seed, name): weights N(0, 2 / (inputs + outputs)) (Xavier), biases zero."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(derive_key(seed, "parameter", f"{prefix}.{name}") >> 1)
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.zero_()
            else:
                std = math.sqrt(2 / sum(parameter.shape))
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
