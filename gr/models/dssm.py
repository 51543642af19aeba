"""DSSM's user side as IDvs.MoRec (SIGIR 2023) has it: rows by themselves, l x (dropout, linear, GELU).

It sees what is known of the user (``model.input.features``) and no action: beside it any item tower is the other side
of a two-tower model.

Shapes: T actions in the batch, D model width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import COUNT, FRACTION, ComponentConfig
from gr.models import init
from gr.models.dropout import Dropout
from gr.models.layers import Linear
from gr.models.layout import JaggedLayout
from gr_kernels.counter_random import derive_key


class DSSM(nn.Module):
    class Config(ComponentConfig):
        """layers: l; with none a user's vector is what is looked up."""

        name: Literal["dssm"] = "dssm"
        layers: COUNT = 0
        dropout: FRACTION = 0.1

        def idle(self) -> dict[str, str]:
            return {} if self.layers else {"dropout": "layers is 0"}

    reads_items = False

    def __init__(self, config: Config, dim: int, max_length: int) -> None:
        super().__init__()
        self.uses_times, self.causal, self.cuttable = False, True, True
        self.layers = nn.ModuleList(Linear(dim, dim, init.xavier_normal) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        for number, layer in enumerate(self.layers):
            key = derive_key(layout.dropout_key, number)
            x_TD = F.gelu(layer(self.dropout(x_TD, key, layout.cut)))
        return x_TD
