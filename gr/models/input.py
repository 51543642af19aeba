"""Item input: x = dropout(sqrt(D) (E[item] + features) + P[position] (+ what a model adds)).

Shapes: T actions in the batch, N positions, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import InputSection
from gr.models import init
from gr.models.dropout import Dropout
from gr.models.layout import JaggedLayout
from gr.models.tasks import MASK
from gr_kernels.counter_random import derive_key
from gr_kernels.jagged import add_positions_and_times


class ItemInput(nn.Module):
    """Vectors of the input tokens; position 0 is the first action that was kept.

    dim: D.  max_length: the longest input.  masks: whether tokens may be MASK, which has a learned vector of its own.
    item_std: of the table's first values.
    """

    def __init__(
        self,
        config: InputSection,
        dim: int,
        max_length: int,
        masks: bool,
        item_std: float,
    ) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.scale = math.sqrt(dim) if config.scale else 1.0
        self.item_std = item_std
        self.dropout = Dropout(config.dropout)
        places = max_length + config.extra_positions
        self.positions = nn.Parameter(torch.empty(places, dim)) if config.positions != "none" else None
        if masks:
            self.mask = nn.Parameter(torch.empty(dim))

    def initialisers(self) -> dict[str, init.Initialiser]:
        positions = {
            "none": init.zeros,
            "xavier_normal": init.xavier_normal,
            "truncated_normal": init.truncated_normal(math.sqrt(1 / self.dim)),
            "normal": init.normal(self.item_std),
        }
        # the mask stands where an item's vector would: it starts as one does
        return {
            "positions": positions[self.config.positions],
            "mask": init.truncated_normal(self.item_std),
        }

    def forward(
        self,
        tokens_T: Tensor,
        layout: JaggedLayout,
        items_TD: Tensor,
        features_TD: Tensor | None = None,
        beside_TD: Tensor | None = None,
    ) -> Tensor:
        """(T, D) float32; ``items_TD``: the tokens' vectors, anything where one is hidden; ``features_TD``: added to
        those, and scaled as they are; ``beside_TD``: what else is known of the actions, added before the dropout."""
        if hasattr(self, "mask"):
            x_TD = torch.where((tokens_T == MASK)[:, None], self.mask, items_TD)
        else:
            x_TD = items_TD
        if features_TD is not None:
            x_TD = x_TD + features_TD
        if layout.cut is not None:  # rows of a sequence, from anywhere in it
            x_TD = x_TD * self.scale
            if self.positions is not None:
                x_TD = x_TD + F.embedding(layout.positions_T, self.positions)
        elif self.positions is not None or self.config.scale:
            x_TD = add_positions_and_times(
                x_TD,
                layout.offsets_B1,
                max_length=layout.max_length,
                scale=self.scale,
                position_PD=self.positions,
            )
        if beside_TD is not None:
            x_TD = x_TD + beside_TD
        return self.dropout(x_TD, derive_key(layout.dropout_key, "input"), layout.cut)
