"""The forward kernel: a program takes one block of rows of one sequence and head, and walks over its keys.

Tiles of scores are (ROWS, KEYS). `sequence`, `numbers` and the runs of blocks are those of triton_mask.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.hstu_attention.triton_mask import allowed, count_blocks, key_blocks, nth_block
from gr_kernels.hstu_attention.triton_scores import (
    CHANGING,
    head_rows,
    load_rows,
    load_sequence,
    scores,
    store_rows,
    work_item,
)
from gr_kernels.triton_common.activations import silu_of_twice
from gr_kernels.triton_common.random import kept


@triton.jit
def _attend(
    state, block, rows, keys, sequence, numbers, scale, bias, dropout, S: tl.constexpr, MASKED: tl.constexpr
):
    """`state` with one block of keys added: (sum of weights times values, running maximum, running sum of weights)."""
    sums, top, total = state
    q, i, query_time, counter, head = rows
    k_base, k_row, v_base, v_row, key_times = keys
    n, last = sequence[0], sequence[5]
    first = block * S.KEYS
    j = first + tl.arange(0, S.KEYS)
    k = load_rows(k_base, first, n, k_row, S.KEYS, S.WIDTH_Q, S.BLOCK_Q, S, MASKED)
    products = tl.dot(q, tl.trans(k), input_precision=S.PRECISION)
    key_time = 0
    if S.TIME:
        key_time = tl.load(key_times + j, mask=j < n, other=0)[None, :]
    bias_i = tl.minimum(i, last - 1)[:, None]  # rows past the end read the last row's bias, and aren't stored
    s = scores(products, bias_i, j[None, :], query_time, key_time, scale, bias, S)
    if S.SOFTMAX:
        if MASKED:
            s = tl.where(allowed(i[:, None], j[None, :], sequence, numbers, S), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        floor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: no -inf - -inf
        weights = tl.exp(s - floor[:, None])
        shrink = tl.exp(top - floor)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        top = higher
    else:
        weights = silu_of_twice(s, S.FAST)
        if MASKED:
            weights = tl.where(allowed(i[:, None], j[None, :], sequence, numbers, S), weights, 0.0)
    if S.DROPOUT:
        key_low, key_high, drop_last, place = dropout
        weights = tl.where(
            kept(key_low, key_high, counter, head, place + first, drop_last, S.KEYS), weights, 0.0
        )
    v = load_rows(v_base, first, n, v_row, S.KEYS, S.WIDTH_V, S.BLOCK_V, S, MASKED)
    sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=S.PRECISION)
    return sums, top, total


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    offsets,
    query_offsets,
    targets,
    parts,
    order,
    position,
    time,
    query_times,
    key_times,
    thresholds,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    sequences: tl.int32,
    heads,
    blocks: tl.int32,
    group: tl.int32,
    rows: tl.int64,
    window: tl.int32,
    full_rows: tl.int32,
    contexts: tl.int32,
    scale: tl.float32,
    weight_scale: tl.float32,
    buckets_per_unit: tl.float32,
    bucket_margin: tl.float32,
    last_bucket: tl.int32,
    key_low: tl.uint32,
    key_high: tl.uint32,
    drop_last: tl.uint32,
    S: tl.constexpr,
):
    """out[row, head] = weight_scale * sum over seen keys of weight * value (for softmax divided by the weights' sum).

    For softmax lse[head, row] = log of the sum of exp(scores), (heads, rows) float32. `rows` is how many rows the
    batch has. `weight_scale` is 1 / divisor and dropout's 1 / (1 - p).
    """
    b, head, block = work_item(tl.program_id(0), order, sequences, heads, blocks, group, S, True)
    query_begin, key_begin, sequence, counters = load_sequence(
        b, offsets, query_offsets, targets, parts, contexts, S
    )
    o, last = sequence[1], sequence[5]
    first = block * S.ROWS
    if first >= last - o:
        return
    numbers = (window, full_rows, contexts)
    i = o + first + tl.arange(0, S.ROWS)
    query_time = 0
    if S.TIME:
        query_time = tl.load(query_times + query_begin - o + i, mask=i < last, other=0)[:, None]
        key_times += key_begin
    q_tile = load_rows(
        head_rows(q, query_begin, q_row, head, q_head, S.FAR),
        first,
        last - o,
        q_row,
        S.ROWS,
        S.WIDTH_Q,
        S.BLOCK_Q,
        S,
        True,
    )
    rows_of_block = (q_tile, i, query_time, (counters[0] + i).to(tl.uint32), head)
    keys = (
        head_rows(k, key_begin, k_row, head, k_head, S.FAR),
        k_row,
        head_rows(v, key_begin, v_row, head, v_head, S.FAR),
        v_row,
        key_times,
    )
    bias = (position, time, (thresholds, buckets_per_unit, bucket_margin, last_bucket))
    dropout = (key_low, key_high, drop_last, counters[1])
    sums = tl.full((S.ROWS, S.BLOCK_V), 0.0, dtype=tl.float32)
    top = tl.full((S.ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.full((S.ROWS,), 0.0, dtype=tl.float32)

    whole, whole_end, runs = key_blocks(o + first, tl.minimum(o + first + S.ROWS, last), sequence, numbers, S)
    for whole_block in range(whole, whole_end):
        sums, top, total = _attend(
            (sums, top, total),
            whole_block,
            rows_of_block,
            keys,
            sequence,
            numbers,
            scale,
            bias,
            dropout,
            S,
            False,
        )
    for index in range(count_blocks(runs)):
        some_block = nth_block(index, runs)
        sums, top, total = _attend(
            (sums, top, total),
            some_block,
            rows_of_block,
            keys,
            sequence,
            numbers,
            scale,
            bias,
            dropout,
            S,
            True,
        )

    if S.SOFTMAX:
        total = tl.where(total == 0.0, 1.0, total)  # rows past the end, which see nothing
        sums = sums / total[:, None]
        tl.store(lse + head * rows + query_begin - o + i, top + tl.log(total), mask=i < last)
    store_rows(
        head_rows(out, query_begin, out_row, head, out_head, S.FAR),
        first,
        last - o,
        out_row,
        sums * weight_scale,
        S.ROWS,
        S.WIDTH_V,
        S.BLOCK_V,
        S,
    )
