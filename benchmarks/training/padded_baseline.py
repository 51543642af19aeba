"""HSTU trained the way public research code does it: the yardstick of this benchmark, and nothing else.

What makes it plain, each as common public trainers have it:
  - every sequence is padded to N on the right, and linear layers, norms and dropout compute the padding too;
  - each layer fills a (B, N, N) tensor with relative position and time bias, and (B, H, N, N) with scores;
  - negatives are drawn for every position, and their embeddings gathered into a T x K x D tensor, which is
    L2-normalised anew at every step;
  - AdamW as torch.optim makes it by default.
The mathematics is that of gr.models.hstu with gr.models.objectives.sampled_softmax (a test holds loss and gradients
equal), so the ratio of the two times is that of the ways, not of the models.

Shapes: B sequences, N padded length, T real positions of the batch, H heads, D model width, Q query/key width per
head, V value width per head, K negatives, I catalogue size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

EPS = 1e-6
TIME_BUCKETS = 129
BUCKET_WIDTH = 0.301
EXTRA_LENGTH = 11  # the divisor of the attention is N + 11, as in the public code


@dataclass(frozen=True)
class PaddedBatch:
    """Padded on the right with zeros; item i of the catalogue has the id i + 1.

    All (B, N) int64: inputs, their times, the targets (the action after each input) and their times.
    """

    inputs_BN: Tensor
    times_BN: Tensor
    targets_BN: Tensor
    target_times_BN: Tensor


def pad(samples: list[tuple[Tensor, Tensor]], length: int) -> PaddedBatch:
    """Samples (item rows, seconds), each of n + 1 <= length + 1 actions, one by one as a data loader does it."""
    rows = []
    for items, times in samples:
        ids = items.long() + 1
        times = times.long()
        room = length - (len(ids) - 1)
        rows.append([F.pad(x, (0, room)) for x in (ids[:-1], times[:-1], ids[1:], times[1:])])
    return PaddedBatch(*(torch.stack(column) for column in zip(*rows)))


class RelativeBias(nn.Module):
    """b_ij = w_pos[i - j] + w_time[bucket of |t_{i+1} - t_j|], a (B, N, N) tensor."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(length).normal_(std=0.02))
        self.time = nn.Parameter(torch.empty(TIME_BUCKETS).normal_(std=0.02))

    def forward(self, batch: PaddedBatch) -> Tensor:
        length = batch.inputs_BN.shape[1]
        steps_N = torch.arange(length)
        position_NN = self.position[(steps_N[:, None] - steps_N).clamp_min(0)]
        gap_BNN = (batch.target_times_BN[:, :, None] - batch.times_BN[:, None, :]).abs().clamp_min(1)
        bucket_BNN = (gap_BNN.log() / BUCKET_WIDTH).long().clamp(0, TIME_BUCKETS - 1)
        time_BNN = self.time.index_select(0, bucket_BNN.flatten()).view_as(bucket_BNN)
        return position_NN + time_BNN


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, qk_dim: int, v_dim: int, length: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.divisor = length + EXTRA_LENGTH
        self.widths = [heads * v_dim, heads * v_dim, heads * qk_dim, heads * qk_dim]
        self.uvqk = nn.Linear(dim, sum(self.widths), bias=False)
        self.output = nn.Linear(heads * v_dim, dim)
        self.bias = RelativeBias(length)
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_BND: Tensor, batch: PaddedBatch, causal_NN: Tensor) -> Tensor:
        normed_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=EPS)
        u, v, q, k = F.silu(self.uvqk(normed_BND)).split(self.widths, dim=-1)
        with record_function("region:attention"):
            q_BNHQ, k_BNHQ, v_BNHV = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
            scores_BHNN = torch.einsum("bnhd,bmhd->bhnm", q_BNHQ, k_BNHQ)
            scores_BHNN = scores_BHNN + self.bias(batch).unsqueeze(1)
            weights_BHNN = F.silu(scores_BHNN) / self.divisor * causal_NN
            attended_BND = torch.einsum("bhnm,bmhd->bnhd", weights_BHNN, v_BNHV).flatten(2)
        gated = u * F.layer_norm(attended_BND, attended_BND.shape[-1:], eps=EPS)
        return x_BND + self.output(F.dropout(gated, self.dropout, self.training))


class PaddedHSTU(nn.Module):
    def __init__(
        self,
        items: int,
        length: int,
        dim: int,
        layers: int,
        heads: int,
        qk_dim: int,
        v_dim: int,
        negatives: int,
        dropout: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.items, self.negatives = items, negatives
        self.dropout, self.temperature = dropout, temperature
        self.embedding = nn.Embedding(items + 1, dim, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.layers = nn.ModuleList(Layer(dim, heads, qk_dim, v_dim, length, dropout) for _ in range(layers))
        self.register_buffer("causal_NN", torch.ones(length, length).tril(), persistent=False)
        nn.init.trunc_normal_(self.embedding.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.xavier_normal_(self.positions)
        with torch.no_grad():
            self.embedding.weight[0].zero_()

    def forward(self, batch: PaddedBatch, negatives_TK: Tensor | None = None) -> Tensor:
        """The mean loss over the real positions; ``negatives_TK``: ids to use instead of drawing them."""
        queries_BND = self.encode(batch)
        with record_function("region:loss"):
            real_BN = batch.targets_BN != 0
            return self.loss(queries_BND[real_BN], batch.targets_BN[real_BN], negatives_TK)

    def encode(self, batch: PaddedBatch) -> Tensor:
        """(B, N, D); padded rows are zero."""
        real_BN1 = (batch.inputs_BN != 0).unsqueeze(-1)
        scale = self.embedding.embedding_dim**0.5
        x_BND = self.embedding(batch.inputs_BN) * scale + self.positions
        x_BND = F.dropout(x_BND, self.dropout, self.training) * real_BN1
        for layer in self.layers:
            x_BND = layer(x_BND, batch, self.causal_NN) * real_BN1
        return x_BND

    def loss(self, queries_TD: Tensor, targets_T: Tensor, negatives_TK: Tensor | None = None) -> Tensor:
        """Mean sampled softmax over T positions; a negative equal to the target is masked."""
        if negatives_TK is None:
            negatives_TK = torch.randint(1, self.items + 1, (len(targets_T), self.negatives))
        queries_TD = F.normalize(queries_TD, dim=-1, eps=EPS)
        positives_TD = F.normalize(self.embedding(targets_T), dim=-1, eps=EPS)
        negatives_TKD = F.normalize(self.embedding(negatives_TK), dim=-1, eps=EPS)
        positive_T1 = (queries_TD * positives_TD).sum(-1, keepdim=True) / self.temperature
        negative_TK = torch.einsum("td,tkd->tk", queries_TD, negatives_TKD) / self.temperature
        negative_TK = negative_TK.masked_fill(negatives_TK == targets_T[:, None], -torch.inf)
        logits = torch.cat([positive_T1, negative_TK], dim=1)
        return -F.log_softmax(logits, dim=1)[:, 0].mean()


def optimizer(model: PaddedHSTU) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
