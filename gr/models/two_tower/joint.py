"""Networks that read user and item together: each is asked about every pair anew.

LR; Wide & Deep (Cheng et al., arXiv 1606.07792); DeepFM (Guo et al., arXiv 1703.04247); DCN (Wang et al., arXiv
1708.05123); AutoInt (Song et al., arXiv 1810.11921), with its deep part; COLD (Wang et al., arXiv 2007.16122).

Shapes: S impressions, F fields of both sides, D width of a field's vector, E numbers of a row, C numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gr.config import FRACTION, POSITIVE, ComponentConfig
from gr.errors import UserError
from gr.models import init
from gr.models.layers import Linear
from gr.models.two_tower.layers import (
    CrossNet,
    Firsts,
    Interacting,
    SqueezeExcitation,
    Tower,
    factorised,
)
from gr.models.two_tower.network import Bias, Network, Pairs, Shape
from gr.processes import Axis

STD = Annotated[float, Field(gt=0)]
WIDTHS = Annotated[list[POSITIVE], Field(min_length=1)]


class LR(Network):
    """Logistic regression: a weight a category (tables of width 1) and one a number."""

    class Config(ComponentConfig):
        name: Literal["lr"] = "lr"

    def __init__(self, config: Any, user: Shape, item: Shape, dim: int, axis: Axis) -> None:
        super().__init__(config, user, item, dim, axis)
        numbers = user.numbers + item.numbers
        self.numbers = Linear(numbers, 1, init.zeros, None) if numbers else None
        self.bias = Bias()

    @staticmethod
    def table_width(config: Any, dim: int) -> int:
        return 1

    def forward(self, pairs: Pairs) -> tuple[Tensor, None]:
        vectors_SFD, numbers_SC = _together(pairs)
        total_S = vectors_SFD.sum((1, 2))
        if self.numbers is not None:
            total_S = total_S + self.numbers(numbers_SC)[:, 0]
        return self.bias(total_S), None


class Deep(Network):
    """An MLP of all fields and numbers, and beside it what a subclass adds.  ``deep``: widths of its layers.  ``std``:
    of its first weights."""

    class Config(ComponentConfig):
        deep: WIDTHS = [300, 300, 128]
        dropout: FRACTION = 0.1
        std: STD = 1e-4

    firsts = True

    def __init__(self, config: Any, user: Shape, item: Shape, dim: int, axis: Axis) -> None:
        super().__init__(config, user, item, dim, axis)
        self.fields, self.dim = user.fields + item.fields, dim
        self.inputs = user.flat(dim) + item.flat(dim)
        self.mlp = Tower(self.inputs, config.deep, config.dropout, config.std, None)
        self.linear = Firsts(user.numbers + item.numbers, config.std) if self.firsts else None
        self.bias = Bias()
        self.beside(config)
        out = self.out_width(config)
        self.out = Linear(out, 1, init.uniform(out**-0.5), None)

    def beside(self, config: Any) -> None:
        """Make the parts that a kind has beside the MLP."""

    def out_width(self, config: Any) -> int:
        """Numbers that the last layer reads."""
        return config.deep[-1]

    def read(self, vectors_SFD: Tensor, numbers_SC: Tensor, key: int) -> Tensor:
        """What the last layer reads."""
        return self.mlp(_flat(vectors_SFD, numbers_SC), key)

    def extra(self, vectors_SFD: Tensor) -> Tensor | None:
        """(S, 1) what is added to its result."""
        return None

    def forward(self, pairs: Pairs) -> tuple[Tensor, None]:
        vectors_SFD, numbers_SC = _together(pairs)
        total_S1 = self.out(self.read(vectors_SFD, numbers_SC, pairs.key))
        if self.linear is not None:
            assert pairs.user.firsts_SF is not None and pairs.item.firsts_SF is not None
            firsts_SF = torch.cat([pairs.user.firsts_SF, pairs.item.firsts_SF], dim=1)
            total_S1 = total_S1 + self.linear(firsts_SF, numbers_SC)
        if (extra_S1 := self.extra(vectors_SFD)) is not None:
            total_S1 = total_S1 + extra_S1
        return self.bias(total_S1[:, 0]), None


class WideDeep(Deep):
    class Config(Deep.Config):
        name: Literal["wide_deep"] = "wide_deep"


class DeepFM(Deep):
    class Config(Deep.Config):
        name: Literal["deepfm"] = "deepfm"

    def extra(self, vectors_SFD: Tensor) -> Tensor:
        return factorised(vectors_SFD)


class DCN(Deep):
    class Config(Deep.Config):
        """cross: layers of the cross network."""

        name: Literal["dcn"] = "dcn"
        cross: POSITIVE = 2

    def beside(self, config: Any) -> None:
        self.cross = CrossNet(self.inputs, config.cross)

    def out_width(self, config: Any) -> int:
        return self.inputs + config.deep[-1]

    def read(self, vectors_SFD: Tensor, numbers_SC: Tensor, key: int) -> Tensor:
        x_SE = _flat(vectors_SFD, numbers_SC)
        return torch.cat([self.cross(x_SE), self.mlp(x_SE, key)], dim=1)


class AutoInt(Deep):
    class Config(Deep.Config):
        """layers, heads: of the attention over fields."""

        name: Literal["autoint"] = "autoint"
        layers: POSITIVE = 3
        heads: POSITIVE = 2

    def beside(self, config: Any) -> None:
        if self.dim % config.heads:
            raise UserError(
                f"config key 'model.network.heads' is {config.heads}, and its heads share the {self.dim} numbers of "
                "model.dim: give a divisor of that"
            )
        self.attention = nn.Sequential(*(Interacting(self.dim, config.heads) for _ in range(config.layers)))

    def out_width(self, config: Any) -> int:
        return self.fields * self.dim + config.deep[-1]

    def read(self, vectors_SFD: Tensor, numbers_SC: Tensor, key: int) -> Tensor:
        deep_SW = super().read(vectors_SFD, numbers_SC, key)
        return torch.cat([self.attention(vectors_SFD).flatten(1), deep_SW], dim=1)


class COLD(Deep):
    """Fields weighted by how much they matter, then the MLP."""

    class Config(Deep.Config):
        name: Literal["cold"] = "cold"

    firsts = False

    def beside(self, config: Any) -> None:
        self.weights = SqueezeExcitation(self.fields, self.dim)

    def read(self, vectors_SFD: Tensor, numbers_SC: Tensor, key: int) -> Tensor:
        return super().read(self.weights(vectors_SFD), numbers_SC, key)


def _together(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(S, F, D) and (S, C) of both sides."""
    sides = (pairs.user, pairs.item)
    return torch.cat([s.vectors_SFD for s in sides], dim=1), torch.cat([s.numbers_SC for s in sides], dim=1)


def _flat(vectors_SFD: Tensor, numbers_SC: Tensor) -> Tensor:
    return torch.cat([vectors_SFD.flatten(1), numbers_SC], dim=1)
