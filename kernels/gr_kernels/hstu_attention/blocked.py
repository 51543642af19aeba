"""The attention in plain PyTorch for any device, precision and mask, in blocks.

Sequences of similar length are padded together into blocks of a bounded number of scores (a longer sequence is cut
into blocks of rows), so memory doesn't grow with the batch. The backward pass computes the scores again: only q, k, v
and the problem are kept between the passes.

B sequences of a block, R query rows and J keys of each, T query and S key rows in the batch, H heads, Q query/key
width, V value width. Dimensions 1 or B, and 1 or H, are written B1 and H1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gr_kernels.bias_table_gradient import bias_table_gradient
from gr_kernels.counter_random import philox
from gr_kernels.dispatch import preferring
from gr_kernels.hstu_attention.mask import AttentionMask, allowed
from gr_kernels.hstu_attention.problem import Gradients, Problem
from gr_kernels.hstu_attention.schema import Operators
from gr_kernels.products import wide_product

# Scores of a block: on CPU few enough that its half dozen tensors stay near the cache, elsewhere enough to fill a GPU.
BLOCK_SCORES = 2**19
DEVICE_BLOCK_SCORES = 2**24
ROWS = 32  # a block has at least these rows of a long sequence
CAUSAL_PARTS = 2  # and at most this part of them, since earlier rows do without the later keys
# Sequences of different lengths share a block while its scores, padding included, are at most PADDING times those of
# the sequences, or few enough that starting another block would take longer.
PADDING = 1.35
SMALL_BLOCK_SCORES = 2**17


def forward(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The output, and where it is a part of a softmax's the log-sums (H, T); nothing else that the backward pass would
    want."""
    precision = _Precision.of(q_THQ)
    heads = q_THQ.shape[1]
    out_THV = _zeros((q_THQ.shape[0], *v_SHV.shape[1:]), q_THQ, precision)
    lse_HT = None
    if problem.part is not None and problem.activation == "softmax":
        lse_HT = torch.full((heads, q_THQ.shape[0]), -torch.inf, dtype=precision.sums, device=q_THQ.device)
    for block in _blocks(problem, heads, precision):
        q, k = _gather(q_THQ, block.queries_BR, precision), _gather(k_SHQ, block.keys_BJ, precision)
        s_BHRJ = _scores(q, k, block, _buckets(block, problem), problem, precision)
        lse_BHR1 = None
        if lse_HT is not None:
            lse_BHR1 = _seen(s_BHRJ, block).logsumexp(-1, keepdim=True)
            lse_HT[:, block.queries_BR] = lse_BHR1[..., 0].transpose(0, 1)
        weights_BHRJ = _weights(s_BHRJ, block, problem, lse_BHR1)
        keep_BHRJ = _keep(block, heads, problem)
        if keep_BHRJ is not None:
            weights_BHRJ *= keep_BHRJ
        out_BHRV = _matmul(weights_BHRJ, _gather(v_SHV, block.keys_BJ, precision), precision)
        _add_rows(out_THV, block.queries_BR, out_BHRV * block.exists_BR[:, None, :, None])
    return out_THV.div_(_divisor(problem)).to(q_THQ.dtype), lse_HT


def backward(
    d_out_THV: Tensor, out: Any, lse: Any, q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: Problem
) -> Gradients:
    """The gradients of q, k, v and the bias tables. Scale and divisor are multiplied in at the very end.

    out, lse: of a part of a softmax alone, where they are the whole rows'.
    """
    precision = _Precision.of(q_THQ)
    position, time = problem.bias.position, problem.bias.time
    heads = q_THQ.shape[1]
    d_q, d_k, d_v = (_zeros(x.shape, x, precision) for x in (q_THQ, k_SHQ, v_SHV))
    # Entries of the tables are sums over the whole batch, one number after another: float64 keeps their digits.
    d_position, d_time = (
        None if x is None else torch.zeros_like(x, dtype=torch.float64) for x in (position, time)
    )
    for block in _blocks(problem, heads, precision):
        q, k = _gather(q_THQ, block.queries_BR, precision), _gather(k_SHQ, block.keys_BJ, precision)
        v, d_out = _gather(v_SHV, block.keys_BJ, precision), _gather(d_out_THV, block.queries_BR, precision)
        d_out = d_out * block.exists_BR[:, None, :, None]
        bucket_BRJ = _buckets(block, problem)
        s_BHRJ = _scores(q, k, block, bucket_BRJ, problem, precision)
        lse_BHR1 = None if lse is None else lse[:, block.queries_BR].transpose(0, 1)[..., None]
        weights_BHRJ = _weights(s_BHRJ, block, problem, lse_BHR1)
        d_weights_BHRJ = _matmul(d_out, v.transpose(2, 3), precision)
        keep_BHRJ = _keep(block, heads, problem)
        kept_BHRJ = weights_BHRJ
        if keep_BHRJ is not None:
            kept_BHRJ = weights_BHRJ * keep_BHRJ
            d_weights_BHRJ *= keep_BHRJ
        _add_rows(d_v, block.keys_BJ, _matmul(kept_BHRJ.transpose(2, 3), d_out, precision))
        if problem.activation == "silu":
            d_s_BHRJ = torch.ops.aten.silu_backward(d_weights_BHRJ, s_BHRJ).mul_(block.seen_BRJ[:, None])
        else:
            if lse is None:
                mean_BHR1 = (weights_BHRJ * d_weights_BHRJ).sum(-1, keepdim=True)
            else:  # over all keys of the rows, of which these are some
                out_BHRV = _gather(out, block.queries_BR, precision)
                mean_BHR1 = (out_BHRV * d_out).sum(-1, keepdim=True, dtype=precision.sums)
            d_s_BHRJ = d_weights_BHRJ.sub_(mean_BHR1).mul_(weights_BHRJ)
        d_s_BRJ = d_s_BHRJ.sum(1) if heads > 1 else d_s_BHRJ[:, 0]
        if d_position is not None:
            shared = block.distance_B1RJ.shape[0] == 1  # one entry for all sequences
            d_s_B1RJ = d_s_BRJ.sum(0, keepdim=True) if shared else d_s_BRJ
            _add_sums(d_position, block.distance_B1RJ, d_s_B1RJ, problem.deterministic)
        if bucket_BRJ is not None:
            assert d_time is not None
            _add_sums(d_time, bucket_BRJ, d_s_BRJ, problem.deterministic)
        _add_rows(d_q, block.queries_BR, _matmul(d_s_BHRJ, k, precision))
        _add_rows(d_k, block.keys_BJ, _matmul(d_s_BHRJ.transpose(2, 3), q, precision))
    divisor = _divisor(problem)
    return (
        d_q.mul_(problem.scale / divisor).to(q_THQ.dtype),
        d_k.mul_(problem.scale / divisor).to(k_SHQ.dtype),
        d_v.div_(divisor).to(v_SHV.dtype),
        None if d_position is None or position is None else d_position.div_(divisor).to(position.dtype),
        None if d_time is None or time is None else d_time.div_(divisor).to(time.dtype),
    )


@dataclass(frozen=True)
class _Precision:
    """The dtypes of the computation: of the products' factors, and of their results and all else."""

    factors: torch.dtype
    sums: torch.dtype

    @staticmethod
    def of(q: Tensor) -> _Precision:
        """That of q, but float32 for lower ones; where tensor cores multiply bfloat16, factors of products stay so.

        (Not float16: the scores of unscaled inputs, and gradients divided by a long length, may leave its range. Not on
        CPUs, with instructions for bfloat16 or without: PyTorch rounds their products' results to it too.)
        """
        if q.dtype in (torch.float32, torch.float64):
            return _Precision(q.dtype, q.dtype)
        quick = q.dtype == torch.bfloat16 and q.device.type != "cpu"
        return _Precision(torch.bfloat16 if quick else torch.float32, torch.float32)


def _matmul(a: Tensor, b: Tensor, precision: _Precision) -> Tensor:
    return wide_product(a.to(precision.factors), b.to(precision.factors))


def _zeros(shape: Sequence[int], like: Tensor, precision: _Precision) -> Tensor:
    return torch.zeros(shape, dtype=precision.sums, device=like.device)


class _Sequence(NamedTuple):
    """n key rows from `begin`, m query rows from `query_begin`; the last t of the n are targets.

    The first query stands o rows behind the first key; that is row `row` of the batch, and as a draw of dropout the
    `quad`-th four keys of its sequence begin with it.
    """

    begin: int
    n: int
    query_begin: int
    m: int
    t: int
    o: int
    row: int
    quad: int


@dataclass(frozen=True)
class _Block:
    """Some rows of some sequences and their keys; positions past a sequence's end repeat its last row.

    Masks are numbers: multiplying by them is many times faster on CPU than filling where a bool says so.
    """

    queries_BR: Tensor  # int64, rows of q
    keys_BJ: Tensor  # int64, rows of k
    rows_BR: Tensor  # int64, the queries' place among the rows of k, which is what dropout counts by
    exists_BR: Tensor  # 1 if the query row exists, else 0
    seen_BRJ: Tensor  # 1 if the key exists and the row sees it (one that doesn't exist sees some key), else 0
    distance_B1RJ: Tensor  # int64, max(i - j, 0)
    first_key: int  # of the sequence; the others follow
    quads_B11: (
        Tensor | None
    )  # int64: four keys of the sequence each, before the first that the call has; None: none


def _blocks(problem: Problem, heads: int, precision: _Precision) -> Iterator[_Block]:
    block_scores = BLOCK_SCORES if problem.offsets.device.type == "cpu" else DEVICE_BLOCK_SCORES
    sequences = sorted(_sequences(problem), key=lambda x: (-x.n, -x.m))
    first = 0
    while first < len(sequences):
        n, m, real, last = sequences[first].n, 0, 0, first
        while last < len(sequences):
            m_with_next = max(m, sequences[last].m)
            padded = (last + 1 - first) * m_with_next * n * heads
            real += sequences[last].m * sequences[last].n * heads
            if last > first and padded > min(block_scores, max(PADDING * real, SMALL_BLOCK_SCORES)):
                break
            m, last = m_with_next, last + 1
        group = sequences[first:last]
        step = max(ROWS, block_scores // (len(group) * n * heads))
        if problem.mask.causal:
            step = min(step, max(ROWS, -(-m // CAUSAL_PARTS)))
        for first_row in range(0, m, step):
            yield _block(group, first_row, min(m, first_row + step), problem, precision)
        first = last


def _sequences(problem: Problem) -> list[_Sequence]:
    """Those with something to compute."""
    edges = problem.offsets.tolist()
    query_edges = edges if problem.query_offsets is None else problem.query_offsets.tolist()
    targets, part = problem.mask.targets, problem.part
    t = [0] * len(edges) if targets is None else targets.tolist()
    if part is not None:
        stands = list(
            zip(part.query_starts.tolist(), part.key_starts.tolist(), part.first_rows.tolist(), strict=True)
        )
    every = []
    for sequence, (begin, end, query_begin, query_end) in enumerate(
        zip(edges, edges[1:], query_edges, query_edges[1:])
    ):
        n, m = end - begin, query_end - query_begin
        o, row, quad = n - m, begin, 0
        if part is not None:
            query_start, key_start, first_row = stands[sequence]
            o, row, quad = query_start - key_start, first_row + key_start, key_start // 4
        every.append(_Sequence(begin, n, query_begin, m, t[sequence], o, row, quad))
    return [sequence for sequence in every if sequence.m > 0 and sequence.n > 0]


def _block(
    group: Sequence[_Sequence],
    first_row: int,
    last_row: int,
    problem: Problem,
    precision: _Precision,
) -> _Block:
    device, mask = problem.offsets.device, problem.mask
    first_key, last_key = _key_range(group, first_row, last_row, mask)
    begin_B1, n_B1, query_begin_B1, m_B1, t_B1, o_B1, row_B1, quad_B1 = torch.tensor(group, device=device).T[
        :, :, None
    ]
    r_R = torch.arange(first_row, last_row, device=device)
    j_J = torch.arange(first_key, last_key, device=device)
    r_BR = torch.minimum(r_R, m_B1 - 1)
    i_BR = o_B1 + r_BR
    # Where all sequences are alike, up to their lengths, what they share is computed once.
    i_B1R1 = (r_R if problem.query_offsets is None else i_BR)[..., None]
    if mask.plain:
        seen_B1RJ = allowed(mask, i_B1R1, j_J, max(x.n for x in group), 0)
    else:
        seen_B1RJ = allowed(mask, i_BR[..., None], j_J, n_B1[..., None], t_B1[..., None])
    return _Block(
        queries_BR=query_begin_B1 + r_BR,
        keys_BJ=begin_B1 + torch.minimum(j_J, n_B1 - 1),
        rows_BR=row_B1 + i_BR,
        exists_BR=(r_R < m_B1).to(precision.factors),
        seen_BRJ=(seen_B1RJ & (j_J < n_B1)[:, None, :]).to(precision.sums),
        distance_B1RJ=(i_B1R1 - j_J).clamp_min_(0).view(-1, r_R.shape[0], j_J.shape[0]),
        first_key=first_key,
        quads_B11=None if problem.part is None else quad_B1[:, :, None],
    )


def _key_range(
    group: Sequence[_Sequence], first_row: int, last_row: int, mask: AttentionMask
) -> tuple[int, int]:
    """The keys, first and behind the last, that rows first_row to last_row of these sequences may see."""
    longest = max(x.n for x in group)
    first = min(x.o for x in group) + first_row
    if not mask.causal or first < mask.contexts:
        return 0, longest
    last_key = min(longest, max(x.o for x in group) + last_row)
    ahead = max(mask.contexts - 1, 0)
    # The earliest row of each sequence: its last one if it ends before the block, the end of history for a target.
    first_key = min(min(x.o + first_row, x.n - 1, x.n - x.t) for x in group) - mask.window
    # A window reaches back to the first key while it reaches a context; some rows it doesn't bind at all.
    free = mask.full_rows > 0 and any(
        x.n - x.t - ahead - mask.full_rows <= 0 or last_key > x.n - x.t - mask.full_rows for x in group
    )
    if not mask.window or free or first_key <= ahead:
        return 0, last_key
    return first_key - first_key % 4, last_key  # dropout draws four keys at a time


def _gather(x_THD: Tensor, rows_BR: Tensor, precision: _Precision) -> Tensor:
    """(B, H, R, D): the rows of a block, heads in front, as factors of products."""
    some = x_THD.index_select(0, rows_BR.flatten()).to(precision.factors)
    return some.view(*rows_BR.shape, *x_THD.shape[1:]).transpose(1, 2)


def _divisor(problem: Problem) -> float:
    """What the output is divided by; softmax has its own."""
    return problem.divisor if problem.activation == "silu" else 1.0


def _scores(
    q_BHRQ: Tensor,
    k_BHJQ: Tensor,
    block: _Block,
    bucket_BRJ: Tensor | None,
    problem: Problem,
    precision: _Precision,
) -> Tensor:
    """(B, H, R, J): scale q·k + bias; what the mask forbids is left as it comes."""
    s_BHRJ = _matmul(q_BHRQ, k_BHJQ.transpose(2, 3), precision)
    if problem.scale != 1.0:
        s_BHRJ *= problem.scale
    bias = problem.bias
    if bias.position is not None:
        s_BHRJ += _look_up(bias.position, block.distance_B1RJ, precision)[:, None]
    if bucket_BRJ is not None:
        assert bias.time is not None
        s_BHRJ += _look_up(bias.time, bucket_BRJ, precision)[:, None]
    return s_BHRJ


def _look_up(table: Tensor, index: Tensor, precision: _Precision) -> Tensor:
    return table.to(precision.sums).index_select(0, index.flatten()).view(index.shape)


def _buckets(block: _Block, problem: Problem) -> Tensor | None:
    bias = problem.bias
    if bias.time is None:
        return None
    assert bias.query_times is not None and bias.key_times is not None
    query_time_BR1 = bias.query_times[block.queries_BR][:, :, None]
    return bias.buckets.bucket_between(query_time_BR1, bias.key_times[block.keys_BJ][:, None, :])


def _weights(s_BHRJ: Tensor, block: _Block, problem: Problem, lse_BHR1: Tensor | None) -> Tensor:
    """The activation's values before dropout and divisor; zero where the mask forbids. lse: softmax's log-sums, where
    they are known already, and of more keys than these."""
    if problem.activation == "silu":
        return torch.nn.functional.silu(s_BHRJ).mul_(block.seen_BRJ[:, None])
    if lse_BHR1 is not None:
        return _seen(s_BHRJ, block).sub_(lse_BHR1).exp_()
    return _seen(s_BHRJ, block).softmax(-1)


def _seen(s_BHRJ: Tensor, block: _Block) -> Tensor:
    """The scores, -inf where the mask forbids."""
    forbidden_BRJ = 1 - block.seen_BRJ.reciprocal()  # 0 or -inf
    return s_BHRJ + forbidden_BRJ[:, None]


def _keep(block: _Block, heads: int, problem: Problem) -> Tensor | None:
    """(B, H, R, J): 0 for a dropped weight, 1 / (1 - dropout) for a kept one; None without dropout."""
    if problem.dropout == 0.0:
        return None
    keys = block.keys_BJ.shape[1]
    device = block.rows_BR.device
    head_H11 = torch.arange(heads, device=device)[:, None, None]
    quad_C = torch.arange((keys + 3) // 4, device=device) + block.first_key // 4
    if block.quads_B11 is not None:
        quad_C = quad_C + block.quads_B11[..., None]
    row_B1R1 = block.rows_BR[:, None, :, None] & 0xFFFFFFFF
    words = philox(problem.dropout_key, row_B1R1, head_H11, quad_C, torch.zeros_like(quad_C))
    word_BHRJ = torch.stack(words, dim=-1).flatten(-2)[..., :keys]
    return (word_BHRJ >= problem.drop_below).to(block.seen_BRJ.dtype).mul_(problem.keep_scale)


def _add_rows(x_THD: Tensor, rows_BR: Tensor, values_BHRD: Tensor) -> None:
    """Adds a block's rows to the batch's (those past the end of a sequence are zero)."""
    x_THD.index_add_(0, rows_BR.flatten(), values_BHRD.transpose(1, 2).flatten(0, 1))


def _add_sums(table: Tensor, index: Tensor, values: Tensor, deterministic: bool) -> None:
    """table[index] += values, where many values have one entry."""
    with preferring("auto"):  # what is preferred to this implementation needn't be able to
        table += bias_table_gradient(values, index, table.shape[0], deterministic=deterministic)


attention = Operators("hstu_attention_blocked", forward, backward)
