"""The attention written down as plainly as possible: one sequence at a time, every score in memory, autograd's
gradients. In float64 it is what the implementations are tested against; in float32 it is what plain PyTorch gets.

n rows of one sequence, T rows in the batch, H heads, Q query/key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.hstu_attention.problem import Activation, AttentionMask, RelativeBias


def specification(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    offsets_B1: Tensor,
    *,
    divisor: float,
    scale: float = 1.0,
    activation: Activation = "silu",
    mask: AttentionMask = AttentionMask(),
    bias: RelativeBias | None = None,
    factors: list[Tensor] | None = None,
) -> Tensor:
    """hstu_attention() without blocks; `factors` are the (H, n, n) dropout multipliers of each sequence."""
    bias = bias or RelativeBias()
    outputs = [v_THV.new_zeros((int(offsets_B1[0]), *v_THV.shape[1:]))]
    for sequence in range(offsets_B1.shape[0] - 1):
        rows = slice(int(offsets_B1[sequence]), int(offsets_B1[sequence + 1]))
        q_HnQ, k_HnQ, v_HnV = (x[rows].transpose(0, 1) for x in (q_THQ, k_THQ, v_THV))
        n = q_HnQ.shape[1]
        scores_Hnn = scale * torch.matmul(q_HnQ, k_HnQ.transpose(1, 2))
        distance_nn = torch.arange(n)[:, None] - torch.arange(n)
        if bias.position is not None:
            scores_Hnn = scores_Hnn + bias.position[distance_nn.clamp_min(0)]
        if bias.time is not None:
            assert bias.query_times is not None and bias.key_times is not None
            dt_nn = (bias.query_times[rows, None] - bias.key_times[rows]).abs()
            bucket_nn = torch.searchsorted(bias.buckets.thresholds(), dt_nn, right=True)
            scores_Hnn = scores_Hnn + bias.time[bucket_nn]
        hidden_nn = distance_nn < 0 if mask.causal else torch.zeros_like(distance_nn, dtype=torch.bool)
        if activation == "silu":
            weights_Hnn = (torch.nn.functional.silu(scores_Hnn) / divisor).masked_fill(hidden_nn, 0.0)
        else:
            weights_Hnn = scores_Hnn.masked_fill(hidden_nn, float("-inf")).softmax(-1)
        if factors is not None:
            weights_Hnn = weights_Hnn * factors[sequence].to(weights_Hnn.dtype)
        outputs.append(torch.matmul(weights_Hnn, v_HnV).transpose(0, 1))
    outputs.append(v_THV.new_zeros((v_THV.shape[0] - int(offsets_B1[-1]), *v_THV.shape[1:])))
    return torch.cat(outputs)
