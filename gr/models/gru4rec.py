"""GRU4Rec: a gated recurrent unit over the sequence (Hidasi et al., ICLR 2016, arXiv 1511.06939).

Shapes: B sequences, T actions in the batch, N longest sequence, D model width, R hidden width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import FRACTION, POSITIVE, ComponentConfig
from gr.models import init
from gr.models.dropout import Dropout
from gr.models.layers import Linear
from gr.models.layout import JaggedLayout
from gr_kernels.counter_random import derive_key
from gr_kernels.tracing import with_numbers


class GRU4Rec(nn.Module):
    class Config(ComponentConfig):
        """hidden: R; where it is not D, a linear layer leads back.  dropout: after every GRU layer."""

        name: Literal["gru4rec"] = "gru4rec"
        layers: POSITIVE = 1
        hidden: POSITIVE = 64
        dropout: FRACTION = 0.0

    def __init__(self, config: Config, dim: int, max_length: int) -> None:
        super().__init__()
        self.uses_times, self.causal, self.cuttable = False, True, False
        self.dropout = Dropout(config.dropout)
        between = config.dropout if config.layers > 1 else 0.0
        self.gru = nn.GRU(dim, config.hidden, config.layers, dropout=between)
        self.output = Linear(config.hidden, dim, init.xavier_uniform) if config.hidden != dim else None

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        # torch's GRU wants a step at least: for an empty batch it runs over one row of zeros, taken off again
        lengths = layout.lengths if layout.rows else (1,)
        x_TD = x_TD if layout.rows else F.pad(x_TD, (0, 0, 0, 1))
        with with_numbers():
            order_T, batch_sizes_N = packing(lengths)
        order_T = order_T.to(x_TD.device, non_blocking=True)
        packed_TR = self._run(x_TD.index_select(0, order_T), batch_sizes_N, sum(n > 0 for n in lengths))
        back_T = torch.empty_like(order_T).scatter_(
            0, order_T, torch.arange(len(order_T), device=x_TD.device)
        )
        out_TR = packed_TR.index_select(0, back_T)[: layout.rows]
        out_TR = self.dropout(out_TR, derive_key(layout.dropout_key, "output"))
        return out_TR if self.output is None else self.output(out_TR)

    def _run(self, packed_TD: Tensor, batch_sizes_N: Tensor, sequences: int) -> Tensor:
        """What nn.GRU does with a PackedSequence, but for its checks: they ask numbers, which aren't there on paper."""
        gru = self.gru
        first_LBR = packed_TD.new_zeros(gru.num_layers, sequences, gru.hidden_size)
        settings = (gru.bias, gru.num_layers, gru.dropout, self.training, gru.bidirectional)
        weights: list[Any] = gru._flat_weights
        return torch.gru(packed_TD, batch_sizes_N, first_LBR, weights, *settings)[0]


def packing(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """How jagged rows become a PackedSequence: (order_T, batch_sizes_N), on the CPU, where torch wants the sizes.

    Packed row p is row order_T[p]: all first rows, longest sequence first, then all second rows, and so on;
    batch_sizes_N says how many sequences have a first, second ... row.
    """
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    starts_B = lengths_B.cumsum(0) - lengths_B
    longest_first = torch.argsort(lengths_B, descending=True, stable=True)
    present_NB = torch.arange(int(lengths_B.max()))[:, None] < lengths_B[longest_first]
    rows_NB = torch.arange(present_NB.shape[0])[:, None] + starts_B[longest_first]
    return rows_NB[present_NB], present_NB.sum(1)
