"""The attention in plain PyTorch: any device and precision, and the standard the compiled kernels are held to.

Sequences of similar length are padded together into blocks of at most BLOCK_SCORES scores (a longer sequence is cut
into blocks of rows), so memory doesn't grow with the batch. The backward pass computes the scores again: only q, k, v
and the output's inputs are kept between the passes.

B sequences of a block, R query rows and J keys of each, T rows in the batch, H heads, Q query/key width, V value
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr_kernels.counter_random import philox
from gr_kernels.hstu_attention.problem import AttentionProblem

BLOCK_SCORES = 16 * 2**20
# Sequences of different lengths share a block while its scores, padding included, are at most PADDING times those of
# the sequences, or few enough that starting another block would take longer.
PADDING = 1.35
SMALL_BLOCK_SCORES = 2**17


def obstacle(q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, problem: AttentionProblem) -> str:
    """The reference takes every call."""
    return ""


def attention(q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, problem: AttentionProblem) -> Tensor:
    """hstu_attention() for a validated call: (T, H, V) in q's dtype; differentiable once."""
    bias = problem.bias
    return _Attention.apply(q_THQ, k_THQ, v_THV, bias.position, bias.time, problem)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Block:
    """Some rows of some sequences and their keys; positions past a sequence's end repeat its last row."""

    rows_BR: Tensor  # int64, rows of the batch
    keys_BJ: Tensor
    allowed_BRJ: Tensor  # bool: the row exists and sees the key
    valid_BR: Tensor  # bool: the row exists
    distance_RJ: Tensor  # i - j, at least 0


def _blocks(problem: AttentionProblem, heads: int) -> Iterator[_Block]:
    device = problem.offsets.device
    edges = problem.offsets.tolist()
    begin_and_length = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    by_length = sorted(begin_and_length, key=lambda pair: -pair[1])
    first = 0
    while first < len(by_length):
        longest = by_length[first][1]
        last, real = first, 0
        while last < len(by_length):
            padded = (last + 1 - first) * longest**2 * heads
            real += by_length[last][1] ** 2 * heads
            if last > first and padded > min(BLOCK_SCORES, max(PADDING * real, SMALL_BLOCK_SCORES)):
                break
            last += 1
        group = torch.tensor(by_length[first:last], dtype=torch.int64, device=device)
        step = max(1, min(longest, BLOCK_SCORES // (longest * heads)))
        for first_row in range(0, longest, step):
            yield _block(group, first_row, min(longest, first_row + step), longest, problem.mask.causal)
        first = last


def _block(group: Tensor, first_row: int, last_row: int, longest: int, causal: bool) -> _Block:
    begin_B1, length_B1 = group[:, :1], group[:, 1:]
    i_R = torch.arange(first_row, last_row, device=group.device)
    j_J = torch.arange(last_row if causal else longest, device=group.device)
    valid_BR = i_R < length_B1
    allowed_BRJ = valid_BR[:, :, None] & (j_J < length_B1)[:, None, :]
    distance_RJ = i_R[:, None] - j_J
    if causal:
        allowed_BRJ = allowed_BRJ & (distance_RJ >= 0)
    rows_BR = begin_B1 + torch.minimum(i_R, length_B1 - 1)
    keys_BJ = begin_B1 + torch.minimum(j_J, length_B1 - 1)
    return _Block(rows_BR, keys_BJ, allowed_BRJ, valid_BR, distance_RJ.clamp_min(0))


def _gather(x_THD: Tensor, rows_BR: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, R, D): the rows of a block, heads in front, in the precision of the computation."""
    return x_THD[rows_BR].to(dtype).transpose(1, 2)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _scores(
    q_BHRQ: Tensor, k_BHJQ: Tensor, block: _Block, bucket_BRJ: Tensor | None, problem: AttentionProblem
) -> Tensor:
    """(B, H, R, J): scale q·k + bias; what the mask forbids is left as it comes."""
    s_BHRJ = torch.matmul(q_BHRQ * problem.scale, k_BHJQ.transpose(2, 3))
    bias = problem.bias
    if bias.position is not None:
        s_BHRJ += bias.position.to(s_BHRJ.dtype)[block.distance_RJ]
    if bucket_BRJ is not None:
        assert bias.time is not None
        s_BHRJ += bias.time.to(s_BHRJ.dtype)[bucket_BRJ][:, None]
    return s_BHRJ


def _buckets(block: _Block, problem: AttentionProblem) -> Tensor | None:
    bias = problem.bias
    if bias.time is None:
        return None
    assert bias.query_times is not None and bias.key_times is not None
    dt_BRJ = bias.query_times[block.rows_BR][:, :, None] - bias.key_times[block.keys_BJ][:, None, :]
    return bias.buckets.bucket(dt_BRJ)


def _weights(s_BHRJ: Tensor, block: _Block, problem: AttentionProblem) -> Tensor:
    """A before dropout; zero where the mask forbids."""
    forbidden = ~block.allowed_BRJ[:, None]
    if problem.activation == "silu":
        weights = torch.nn.functional.silu(s_BHRJ).div_(problem.divisor)
        return weights.masked_fill_(forbidden, 0.0)
    # Rows past the end of a sequence see nothing: softmax over -inf alone is NaN, hence the second mask.
    return s_BHRJ.masked_fill(forbidden, float("-inf")).softmax(-1).masked_fill_(forbidden, 0.0)


def _keep(block: _Block, heads: int, problem: AttentionProblem, dtype: torch.dtype) -> Tensor | None:
    """(B, H, R, J): 0 for a dropped weight, 1 / (1 - dropout) for a kept one; None without dropout."""
    if problem.dropout == 0.0:
        return None
    keys = block.keys_BJ.shape[1]
    device = block.rows_BR.device
    head_H11 = torch.arange(heads, device=device)[:, None, None]
    quad_C = torch.arange((keys + 3) // 4, device=device)
    row_B1R1 = block.rows_BR[:, None, :, None] & 0xFFFFFFFF
    words = philox(problem.dropout_key, row_B1R1, head_H11, quad_C, torch.zeros_like(quad_C))
    word_BHRJ = torch.stack(words, dim=-1).flatten(-2)[..., :keys]
    return (word_BHRJ >= problem.drop_below).to(dtype).mul_(problem.keep_scale)


class _Attention(torch.autograd.Function):
    """The blocks one after another, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THQ: Tensor,
        k_THQ: Tensor,
        v_THV: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        problem: AttentionProblem,
    ) -> Tensor:
        ctx.save_for_backward(q_THQ, k_THQ, v_THV)
        ctx.problem = problem
        dtype = _compute_dtype(q_THQ.dtype)
        heads = q_THQ.shape[1]
        out_THV = torch.zeros(v_THV.shape, dtype=v_THV.dtype, device=v_THV.device)
        for block in _blocks(problem, heads):
            q, k = _gather(q_THQ, block.rows_BR, dtype), _gather(k_THQ, block.keys_BJ, dtype)
            weights = _weights(_scores(q, k, block, _buckets(block, problem), problem), block, problem)
            keep = _keep(block, heads, problem, dtype)
            if keep is not None:
                weights *= keep
            out_BRHV = torch.matmul(weights, _gather(v_THV, block.keys_BJ, dtype)).transpose(1, 2)
            out_THV[block.rows_BR[block.valid_BR]] = out_BRHV[block.valid_BR].to(out_THV.dtype)
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THV: Tensor) -> tuple[Tensor | None, ...]:
        q_THQ, k_THQ, v_THV = ctx.saved_tensors
        problem: AttentionProblem = ctx.problem
        bias = problem.bias
        dtype = _compute_dtype(q_THQ.dtype)
        heads = q_THQ.shape[1]
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q_THQ, k_THQ, v_THV))
        d_position = None if bias.position is None else torch.zeros_like(bias.position, dtype=dtype)
        d_time = None if bias.time is None else torch.zeros_like(bias.time, dtype=dtype)
        for block in _blocks(problem, heads):
            q, k = _gather(q_THQ, block.rows_BR, dtype), _gather(k_THQ, block.keys_BJ, dtype)
            v, d_out = _gather(v_THV, block.keys_BJ, dtype), _gather(d_out_THV, block.rows_BR, dtype)
            bucket_BRJ = _buckets(block, problem)
            s_BHRJ = _scores(q, k, block, bucket_BRJ, problem)
            weights = _weights(s_BHRJ, block, problem)
            d_weights = torch.matmul(d_out, v.transpose(2, 3))
            keep = _keep(block, heads, problem, dtype)
            kept = weights if keep is None else weights * keep
            if keep is not None:
                d_weights *= keep
            _add_rows(d_v, block.keys_BJ, torch.matmul(kept.transpose(2, 3), d_out))
            if problem.activation == "silu":
                sigmoid = torch.sigmoid(s_BHRJ)
                # SiLU'(s) = sigmoid(s) (1 + s (1 - sigmoid(s)))
                d_s = (1 - sigmoid).mul_(s_BHRJ).add_(1).mul_(sigmoid).mul_(d_weights).div_(problem.divisor)
            else:
                d_s = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
            d_s.masked_fill_(~block.allowed_BRJ[:, None], 0.0)
            d_s_BRJ = d_s.sum(1)
            if d_position is not None:
                d_position.index_add_(0, block.distance_RJ.flatten(), d_s_BRJ.sum(0).flatten())
            if d_time is not None:
                assert bucket_BRJ is not None
                d_time.index_add_(0, bucket_BRJ.flatten(), d_s_BRJ.flatten())
            d_s *= problem.scale
            _add_rows(d_q, block.rows_BR, torch.matmul(d_s, k))
            _add_rows(d_k, block.keys_BJ, torch.matmul(d_s.transpose(2, 3), q))
        return (
            d_q.to(q_THQ.dtype),
            d_k.to(k_THQ.dtype),
            d_v.to(v_THV.dtype),
            None if d_position is None or bias.position is None else d_position.to(bias.position.dtype),
            None if d_time is None or bias.time is None else d_time.to(bias.time.dtype),
            None,
        )


def _add_rows(x_THD: Tensor, rows_BR: Tensor, values_BHRD: Tensor) -> None:
    """Adds a block's rows to the batch's (those past the end of a sequence are zero)."""
    x_THD.index_add_(0, rows_BR.flatten(), values_BHRD.transpose(1, 2).flatten(0, 1))
