"""HSTU ranking trained the way public research code does it: the yardstick of ranking.py, and nothing else.

As padded_baseline.py, whose layers these are: sequences padded to the full length, items and what was done with them in
turn, so that a sequence of A actions is 2 A - 1 rows, and every layer has a (B, N, N) tensor of biases.  The
mathematics is that of gr.models.ranking with ``actions: interleaved`` (a test holds loss and gradients equal).

Shapes: B sequences, A actions of the longest, N = 2 A - 1 rows, K tasks, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.padded_baseline import Layer, PaddedBatch


@dataclass(frozen=True)
class PaddedActions:
    """Padded on the right with zeros; item i of the catalogue has the id i + 1.

    items_BA, times_BA: int64.  labels_BAK: float32, 0 or 1.
    """

    items_BA: Tensor
    times_BA: Tensor
    labels_BAK: Tensor


def pad(samples: list[tuple[Tensor, Tensor, Tensor]], length: int) -> PaddedActions:
    """Samples (item rows, seconds, labels) of at most ``length`` actions, one by one as a data loader does it."""
    rows = []
    for items, times, labels in samples:
        room = length - len(items)
        rows.append([F.pad(items + 1, (0, room)), F.pad(times, (0, room)), F.pad(labels, (0, 0, 0, room))])
    return PaddedActions(*(torch.stack(column) for column in zip(*rows)))


class PaddedRanking(nn.Module):
    """``length``: A.  hidden: width of the head's layer."""

    def __init__(
        self,
        items: int,
        length: int,
        dim: int,
        layers: int,
        heads: int,
        width: int,
        tasks: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        rows = 2 * length - 1
        self.dropout = dropout
        self.embedding = nn.Embedding(items + 1, dim, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(length, dim).normal_(std=0.02))
        self.done = nn.Parameter(torch.empty(2 * tasks, dim).normal_(std=0.02))
        self.layers = nn.ModuleList(Layer(dim, heads, width, width, rows, dropout) for _ in range(layers))
        self.hidden, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, tasks)
        self.register_buffer("causal_NN", torch.ones(rows, rows).tril(), persistent=False)
        nn.init.trunc_normal_(self.embedding.weight, std=0.02, a=-0.04, b=0.04)

    def forward(self, batch: PaddedActions) -> Tensor:
        """The mean loss of all real actions but each sequence's first."""
        real_BA = batch.items_BA != 0
        items_BAD = self.embedding(batch.items_BA)
        done_BAD = torch.cat([batch.labels_BAK, 1 - batch.labels_BAK], dim=-1) @ self.done
        rows_BNE = torch.stack([items_BAD + self.positions, done_BAD + self.positions], dim=2)
        x_BND = rows_BNE.flatten(1, 2)[:, :-1]
        times_BN = batch.times_BA.repeat_interleave(2, dim=1)[:, :-1]
        real_BN1 = real_BA.repeat_interleave(2, dim=1)[:, :-1, None]
        where = PaddedBatch(times_BN, times_BN, times_BN, times_BN)  # a row's time as query and as key
        x_BND = F.dropout(x_BND, self.dropout, self.training) * real_BN1
        for layer in self.layers:
            x_BND = layer(x_BND, where, self.causal_NN) * real_BN1
        judged_BA = real_BA.clone()
        judged_BA[:, 0] = False
        product_SD = x_BND[:, 0::2][judged_BA] * items_BAD[judged_BA]
        logits_SK = self.out(F.relu(self.hidden(product_SD)))
        return F.binary_cross_entropy_with_logits(logits_SK, batch.labels_BAK[judged_BA])
