"""The attention written down as plainly as possible: one sequence at a time, every score in memory, autograd's
gradients. It is the definition: in float64 what the other implementations are tested against, in float32 what plain
PyTorch gets.

n key rows and m query rows (the last ones) of one sequence, T query and S key rows in the batch, H heads,
Q query/key width, V value width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gr_kernels.counter_random import philox
from gr_kernels.hstu_attention.buckets import distance
from gr_kernels.hstu_attention.mask import AttentionMask, allowed
from gr_kernels.hstu_attention.problem import Activation, Problem, RelativeBias


def definition(
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
    """hstu_attention() in the tensors' own precision; `factors` are the (H, n, n) dropout multipliers of each
    sequence."""
    bias = bias or RelativeBias()
    query_edges = (offsets_B1 if query_offsets is None else query_offsets).tolist()
    edges, device = offsets_B1.tolist(), q_THQ.device
    outputs = [v_SHV.new_zeros((query_edges[0], *v_SHV.shape[1:]))]
    for sequence in range(len(edges) - 1):
        keys = slice(edges[sequence], edges[sequence + 1])
        queries = slice(query_edges[sequence], query_edges[sequence + 1])
        q_HmQ, k_HnQ, v_HnV = (x.transpose(0, 1) for x in (q_THQ[queries], k_SHQ[keys], v_SHV[keys]))
        m, n = q_HmQ.shape[1], k_HnQ.shape[1]
        i_m1, j_n = torch.arange(n - m, n, device=device)[:, None], torch.arange(n, device=device)
        scores_Hmn = scale * torch.matmul(q_HmQ, k_HnQ.transpose(1, 2))
        if bias.position is not None:
            scores_Hmn = scores_Hmn + bias.position[(i_m1 - j_n).clamp_min(0)]
        if bias.time is not None:
            assert bias.query_times is not None and bias.key_times is not None
            dt_mn = distance(bias.query_times[queries, None], bias.key_times[keys])
            bucket_mn = torch.searchsorted(bias.buckets.thresholds().to(device), dt_mn, right=True)
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


def dropout_factors(offsets_B1: Tensor, heads: int, dropout: float, dropout_key: int) -> list[Tensor]:
    """Of each sequence (H, n, n) float64: 0 for a dropped weight, 1 / (1 - dropout) for a kept one."""
    factors = []
    edges, device = offsets_B1.tolist(), offsets_B1.device
    for begin, end in zip(edges, edges[1:]):
        row_n1, j_n = (
            torch.arange(begin, end, device=device)[:, None],
            torch.arange(end - begin, device=device),
        )
        head_H11 = torch.arange(heads, device=device)[:, None, None]
        words = philox(dropout_key, row_n1 & 0xFFFFFFFF, head_H11, j_n // 4, torch.zeros_like(j_n))
        word_Hnn = torch.stack(words).gather(0, (j_n % 4).expand(1, *words[0].shape))[0]
        factors.append((word_Hnn >= math.ceil(dropout * 2**32)).double() / (1.0 - dropout))
    return factors


def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """hstu_attention() for a validated call: lower precisions are computed in float32 and rounded once.

    It reads offsets, and keeps every score for autograd. torch.compile doesn't trace into it.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    position, time = (
        None if table is None else table.to(wide) for table in (problem.bias.position, problem.bias.time)
    )
    factors = None
    if problem.dropout:
        factors = dropout_factors(problem.offsets, q.shape[1], problem.dropout, problem.dropout_key)
    out = definition(
        q.to(wide),
        k.to(wide),
        v.to(wide),
        problem.offsets,
        divisor=problem.divisor,
        scale=problem.scale,
        activation=problem.activation,
        mask=problem.mask,
        bias=replace(problem.bias, position=position, time=time),
        query_offsets=problem.query_offsets,
        factors=factors,
    )
    # 0, a sum of no numbers: without a sequence, gradients are zeros all the same
    nothing = sum(x[:0].sum() for x in (q, k, v, position, time) if x is not None)
    return (out + nothing).to(q.dtype)
