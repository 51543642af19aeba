"""The attention written down as plainly as possible: one sequence at a time, every score in memory, autograd's
gradients. It is the definition: in float64 what the other implementations are tested against, in float32 what plain
PyTorch gets.

n key rows and m query rows (the last ones) of one sequence, T query and S key rows in the batch, H heads,
Q query/key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gr_kernels.counter_random import philox
from gr_kernels.hstu_attention.buckets import distance
from gr_kernels.hstu_attention.mask import AttentionMask, allowed
from gr_kernels.hstu_attention.problem import Activation, Gradients, Problem, RelativeBias


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
        scores_Hmn = _scores(q_HmQ, k_HnQ, i_m1, j_n, scale, bias, queries, keys)
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


def _scores(
    q_HmQ: Tensor,
    k_HnQ: Tensor,
    i_m1: Tensor,
    j_n: Tensor,
    scale: float,
    bias: RelativeBias,
    queries: slice,
    keys: slice,
) -> Tensor:
    """(H, m, n): scale q·k + bias of rows at the places i of a sequence and keys at the places j, masked by nobody."""
    scores_Hmn = scale * torch.matmul(q_HmQ, k_HnQ.transpose(1, 2))
    if bias.position is not None:
        scores_Hmn = scores_Hmn + bias.position[(i_m1 - j_n).clamp_min(0)]
    if bias.time is not None:
        assert bias.query_times is not None and bias.key_times is not None
        dt_mn = distance(bias.query_times[queries, None], bias.key_times[keys])
        bucket_mn = torch.searchsorted(bias.buckets.thresholds().to(dt_mn.device), dt_mn, right=True)
        scores_Hmn = scores_Hmn + bias.time[bucket_mn]
    return scores_Hmn


def dropout_factors(offsets_B1: Tensor, heads: int, dropout: float, dropout_key: int) -> list[Tensor]:
    """Of each sequence (H, n, n) float64: 0 for a dropped weight, 1 / (1 - dropout) for a kept one."""
    factors = []
    edges, device = offsets_B1.tolist(), offsets_B1.device
    for begin, end in zip(edges, edges[1:]):
        row_n1, j_n = (
            torch.arange(begin, end, device=device)[:, None],
            torch.arange(end - begin, device=device),
        )
        factors.append(_factors(row_n1, j_n, heads, dropout, dropout_key))
    return factors


def _factors(row_m1: Tensor, j_n: Tensor, heads: int, dropout: float, dropout_key: int) -> Tensor:
    """(H, m, n) float64, of rows by their number in the batch and keys by their place in the sequence."""
    head_H11 = torch.arange(heads, device=j_n.device)[:, None, None]
    words = philox(dropout_key, row_m1 & 0xFFFFFFFF, head_H11, j_n // 4, torch.zeros_like(j_n))
    word_Hmn = torch.stack(words).gather(0, (j_n % 4).expand(1, *words[0].shape))[0]
    return (word_Hmn >= math.ceil(dropout * 2**32)).double() / (1.0 - dropout)


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


def part_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """parts.attend_part() for a validated call."""
    out_THV, lse_HT = v.new_zeros((q.shape[0], *v.shape[1:])), None
    if problem.activation == "softmax":
        wide = torch.promote_types(q.dtype, torch.float32)
        lse_HT = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=wide, device=q.device)
    for queries, keys, scores_Hmn, hidden_mn, factors_Hmn in _parts(q, k, problem):
        if lse_HT is None:
            weights_Hmn = torch.nn.functional.silu(scores_Hmn).masked_fill(hidden_mn, 0.0) / problem.divisor
        else:
            seen_Hmn = scores_Hmn.masked_fill(hidden_mn, -math.inf)
            lse_HT[:, queries] = seen_Hmn.logsumexp(-1)
            weights_Hmn = seen_Hmn.softmax(-1)
        v_HnV = v[keys].transpose(0, 1).to(weights_Hmn.dtype)
        out_THV[queries] = torch.matmul(weights_Hmn * factors_Hmn, v_HnV).transpose(0, 1).to(q.dtype)
    return out_THV, lse_HT


def part_backward(
    d_out: Tensor, out: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, problem: Problem
) -> Gradients:
    """parts.attend_part_backward() for a validated call, by autograd's gradients of what the weights come to.

    Softmax's weights are exp(s - lse), lse a constant: what its change would add is sum_j A_ij (d_out_i · out_i).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    tables = (problem.bias.position, problem.bias.time)
    leaves = [None if x is None else x.detach().to(wide).requires_grad_() for x in (q, k, v, *tables)]
    q_leaf, k_leaf, v_leaf, position, time = leaves
    assert q_leaf is not None and k_leaf is not None and v_leaf is not None
    bias = replace(problem.bias, position=position, time=time)
    with torch.enable_grad():
        # 0, a sum of no numbers: without a pair, gradients are zeros all the same
        total = torch.stack([x[:0].sum() for x in leaves if x is not None]).sum()
        for queries, keys, scores_Hmn, hidden_mn, factors_Hmn in _parts(
            q_leaf, k_leaf, replace(problem, bias=bias)
        ):
            d_out_HmV = d_out[queries].transpose(0, 1).to(wide)
            if problem.activation == "silu":
                weights_Hmn = torch.nn.functional.silu(scores_Hmn) / problem.divisor
            else:
                assert out is not None and lse is not None
                weights_Hmn = (scores_Hmn - lse[:, queries, None]).exp()
                mean_Hm = (d_out_HmV * out[queries].transpose(0, 1).to(wide)).sum(-1)
                total = total - (weights_Hmn.masked_fill(hidden_mn, 0.0).sum(-1) * mean_Hm).sum()
            weights_Hmn = weights_Hmn.masked_fill(hidden_mn, 0.0) * factors_Hmn
            total = (
                total + (torch.matmul(weights_Hmn, v_leaf[keys].transpose(0, 1).to(wide)) * d_out_HmV).sum()
            )
        found = iter(torch.autograd.grad(total, [x for x in leaves if x is not None]))
    given = (q, k, v, *tables)
    return tuple(None if x is None else next(found).to(x.dtype) for x in given)  # type: ignore[return-value]


def _parts(
    q_THQ: Tensor, k_SHQ: Tensor, problem: Problem
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Of each sequence with queries and keys in this call: their rows, scores (H, m, n), which of them the mask hides
    (m, n), and dropout's factors (H, m, n), all ones without it; wide."""
    part, device = problem.part, q_THQ.device
    assert part is not None and problem.query_offsets is not None
    wide = torch.promote_types(q_THQ.dtype, torch.float32)
    edges, query_edges = problem.offsets.tolist(), problem.query_offsets.tolist()
    starts = zip(part.query_starts.tolist(), part.key_starts.tolist(), part.first_rows.tolist(), strict=True)
    for sequence, (query_start, key_start, first_row) in enumerate(starts):
        queries = slice(query_edges[sequence], query_edges[sequence + 1])
        keys = slice(edges[sequence], edges[sequence + 1])
        m, n = queries.stop - queries.start, keys.stop - keys.start
        if m == 0 or n == 0:
            continue
        i_m1 = torch.arange(query_start, query_start + m, device=device)[:, None]
        j_n = torch.arange(key_start, key_start + n, device=device)
        q_HmQ, k_HnQ = (x.transpose(0, 1).to(wide) for x in (q_THQ[queries], k_SHQ[keys]))
        scores_Hmn = _scores(q_HmQ, k_HnQ, i_m1, j_n, problem.scale, problem.bias, queries, keys)
        hidden_mn = ~allowed(problem.mask, i_m1, j_n, problem.max_length, 0)
        factors_Hmn = torch.ones_like(scores_Hmn)
        if problem.dropout:
            row_m1 = first_row + i_m1
            factors_Hmn = _factors(row_m1, j_n, q_THQ.shape[1], problem.dropout, problem.dropout_key).to(wide)
        yield queries, keys, scores_Hmn, hidden_mn, factors_Hmn
