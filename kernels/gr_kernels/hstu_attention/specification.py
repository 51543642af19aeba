"""The attention written down as plainly as possible: one sequence at a time, every score in memory, autograd's
gradients. In float64 it is what the implementations are tested against; in float32 it is what plain PyTorch gets.

n key rows and m query rows (the last ones) of one sequence, T query and S key rows in the batch, H heads,
Q query/key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.hstu_attention.buckets import distance
from gr_kernels.hstu_attention.mask import AttentionMask, allowed
from gr_kernels.hstu_attention.problem import Activation, RelativeBias


def specification(
    q_THQ: Tensor,
    k_SHQ: Tensor,
    v_SHV: Tensor,
    offsets_B1: Tensor,
    *,
    divisor: float,
    scale: float = 1.0,
    activation: Activation = "silu",
    mask: AttentionMask = AttentionMask(),
    bias: RelativeBias | None = None,
    query_offsets: Tensor | None = None,
    factors: list[Tensor] | None = None,
) -> Tensor:
    """hstu_attention() without blocks; `factors` are the (H, n, n) dropout multipliers of each sequence."""
    bias = bias or RelativeBias()
    query_edges = (offsets_B1 if query_offsets is None else query_offsets).tolist()
    edges = offsets_B1.tolist()
    outputs = [v_SHV.new_zeros((query_edges[0], *v_SHV.shape[1:]))]
    for sequence in range(len(edges) - 1):
        keys = slice(edges[sequence], edges[sequence + 1])
        queries = slice(query_edges[sequence], query_edges[sequence + 1])
        q_HmQ, k_HnQ, v_HnV = (x.transpose(0, 1) for x in (q_THQ[queries], k_SHQ[keys], v_SHV[keys]))
        m, n = q_HmQ.shape[1], k_HnQ.shape[1]
        i_m1, j_n = torch.arange(n - m, n)[:, None], torch.arange(n)
        scores_Hmn = scale * torch.matmul(q_HmQ, k_HnQ.transpose(1, 2))
        if bias.position is not None:
            scores_Hmn = scores_Hmn + bias.position[(i_m1 - j_n).clamp_min(0)]
        if bias.time is not None:
            assert bias.query_times is not None and bias.key_times is not None
            dt_mn = distance(bias.query_times[queries, None], bias.key_times[keys])
            bucket_mn = torch.searchsorted(bias.buckets.thresholds(), dt_mn, right=True)
            scores_Hmn = scores_Hmn + bias.time[bucket_mn]
        targets = 0 if mask.targets is None else int(mask.targets[sequence])
        hidden_mn = ~allowed(mask, i_m1, j_n, n, targets)
        if activation == "silu":
            weights_Hmn = (torch.nn.functional.silu(scores_Hmn) / divisor).masked_fill(hidden_mn, 0.0)
        else:
            weights_Hmn = scores_Hmn.masked_fill(hidden_mn, float("-inf")).softmax(-1)
        if factors is not None:
            weights_Hmn = weights_Hmn * factors[sequence][:, n - m :].to(weights_Hmn.dtype)
        outputs.append(torch.matmul(weights_Hmn, v_HnV).transpose(0, 1))
    outputs.append(v_SHV.new_zeros((q_THQ.shape[0] - query_edges[-1], *v_SHV.shape[1:])))
    return torch.cat(outputs)
