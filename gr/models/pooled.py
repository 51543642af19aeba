"""The user's side of a two-tower model for retrieval: the mean of what was acted on, through layers of its own.

As YouTube's candidate generation has it (Covington et al., RecSys 2016): no action meets another, only their sum does.
The other side is the table of items.  It is what generative models are compared with (arXiv 2402.17152).

Shapes: T actions in the batch, D model width, W hidden width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import FRACTION, POSITIVE, ComponentConfig
from gr.models import init
from gr.models.dropout import Dropout
from gr.models.layers import Linear
from gr.models.layout import JaggedLayout
from gr_kernels.counter_random import derive_key


class Pooled(nn.Module):
    class Config(ComponentConfig):
        """layers times (linear, ReLU, dropout) of width ``hidden``, and a linear layer back to D."""

        name: Literal["pooled"] = "pooled"
        layers: POSITIVE = 2
        hidden: POSITIVE = 256
        dropout: FRACTION = 0.0

    def __init__(self, config: Config, dim: int, max_length: int) -> None:
        super().__init__()
        self.uses_times, self.causal, self.cuttable = False, True, False
        widths = [dim, *[config.hidden] * config.layers]
        self.layers = nn.ModuleList(Linear(i, o, init.xavier_uniform) for i, o in pairwise(widths))
        self.output = Linear(config.hidden, dim, init.xavier_uniform)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        x_TW = mean_so_far(x_TD, layout)
        for number, layer in enumerate(self.layers):
            x_TW = self.dropout(F.relu(layer(x_TW)), derive_key(layout.dropout_key, number))
        return self.output(x_TW)


def mean_so_far(x_TD: Tensor, layout: JaggedLayout) -> Tensor:
    """(T, D): of each row and those before it in its sequence.

    Sums over 2, 4, 8, ... rows are put together, so that each row's are the same additions wherever its sequence lies
    (a running sum over the batch would have its companions' rounding)."""
    places_T1, total_TD, span = layout.positions_T[:, None], x_TD, 1
    while span < layout.max_length:
        before_TD = F.pad(total_TD, (0, 0, span, 0))[: layout.rows]
        total_TD = total_TD + before_TD.masked_fill(places_T1 < span, 0)
        span *= 2
    return total_TD / (places_T1 + 1)
