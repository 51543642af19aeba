"""Layers that several encoders share.

Shapes: T actions in the batch, D model width, F inner width of a feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gr.adapters.modules import Side
from gr.models import init
from gr.models.cut import Cut
from gr.models.dropout import Dropout
from gr.models.layout import JaggedLayout
from gr_kernels.counter_random import derive_key
from gr_kernels.dispatch import preferred, preferring

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Stack(nn.ModuleList):
    """Layers (x, layout) -> x that follow one another.

    ``recompute``: keep of each layer its input alone for the backward pass, and form the rest again there.  ``side``:
    an adapter beside the layers (:class:`gr.adapters.modules.Side`), a part of the module above.
    """

    recompute = False
    side: Side | None = None

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        state_TD = None
        for number, layer in enumerate(self):
            x_TD = _again(layer, x_TD, layout) if self.recompute and self.training else layer(x_TD, layout)
            if self.side is not None:
                state_TD = self.side(number, x_TD, state_TD)
        return x_TD if state_TD is None else x_TD + state_TD


def _again(layer: nn.Module, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
    """``layer(x_TD, layout)``, formed once more in the backward pass: with the same kernels, and the same draws of
    torch's generator (other draws are functions of keys)."""
    kernels = preferred()

    def run(x_TD: Tensor) -> Tensor:
        with preferring(kernels):
            return layer(x_TD, layout)

    return checkpoint(run, x_TD, use_reentrant=False)


class Linear(nn.Module):
    """y = x W^T + b, with W (out, in), and b unless ``bias`` is None; both initialised as told.

    query_value: which rows of W make an attention's queries and values, for adapters that change those; ``adapter``:
    what one has put there, called for what it adds to W.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        weight: init.Initialiser,
        bias: init.Initialiser | None = init.zeros,
        query_value: Mapping[str, range] = {},
    ) -> None:
        super().__init__()
        self.query_value = query_value
        self.adapter: nn.Module | None = None
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = None if bias is None else nn.Parameter(torch.empty(outputs))
        self._initialisers = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def initialisers(self) -> dict[str, init.Initialiser]:
        return self._initialisers

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.adapted, self.bias)

    @property
    def adapted(self) -> Tensor:
        """W, with what an adapter adds to it."""
        return self.weight if self.adapter is None else self.weight + self.adapter()


class FeedForward(nn.Module):
    """dropout(W2 dropout(act(W1 x))): D -> F -> D.  inner_dropout: the inner one's probability, if another."""

    def __init__(
        self,
        dim: int,
        inner: int,
        activation: str,
        dropout: float,
        weight: init.Initialiser,
        biases: tuple[init.Initialiser, init.Initialiser] = (init.zeros, init.zeros),
        inner_dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.up = Linear(dim, inner, weight, biases[0])
        self.down = Linear(inner, dim, weight, biases[1])
        self.activation = ACTIVATIONS[activation]
        self.dropout = Dropout(dropout)
        self.inner_dropout = Dropout(dropout if inner_dropout is None else inner_dropout)

    def forward(self, x_TD: Tensor, dropout_key: int, cut: Cut | None = None) -> Tensor:
        inner_TF = self.inner_dropout(self.activation(self.up(x_TD)), derive_key(dropout_key, "inner"), cut)
        return self.dropout(self.down(inner_TF), derive_key(dropout_key, "outer"), cut)
