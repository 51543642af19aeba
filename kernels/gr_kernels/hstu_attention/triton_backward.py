"""The backward kernels. Two passes that write every gradient once: over the keys of a block of rows (d_q), over the
rows of a block of keys (d_k, d_v); 7 products a tile of scores, no atomics, so equal calls give equal bits. Or the
second pass alone, which then adds its part of d_q up atomically: 5 products.

Both compute the scores again. With weights A, ds the gradient of the scores and dA_ij = keep_ij d_out_i · v_j:
    silu:     ds = dA SiLU'(s)              softmax: ds = A (dA - delta_i), delta_i = d_out_i · out_i
    d_q_i = scale sum_j ds_ij k_j           d_k_j = scale sum_i ds_ij q_i        d_v_j = sum_i keep_ij A_ij d_out_i
Constants of a call (1 / divisor, scale, dropout's 1 / (1 - p)) multiply the sums, not every score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.hstu_attention.triton_mask import allowed, count_blocks, key_blocks, nth_block, row_blocks
from gr_kernels.hstu_attention.triton_scores import (
    CHANGING,
    head_rows,
    load_rows,
    load_sequence,
    row_pointers,
    scores,
    store_rows,
    work_item,
)
from gr_kernels.triton_common.activations import silu_and_slope_of_twice
from gr_kernels.triton_common.random import kept


@triton.jit
def delta_kernel(out, d_out, delta, out_row, out_head, rows: tl.int64, S: tl.constexpr):
    """delta[head, row] = d_out · out, (heads, rows) float32, of contiguous tensors of one shape; for softmax."""
    first, head = tl.program_id(0).to(tl.int64) * S.ROWS, tl.program_id(1).to(tl.int64)
    a = load_rows(out + head * out_head, first, rows, out_row, S.ROWS, S.WIDTH_V, S.BLOCK_V, S, True)
    b = load_rows(d_out + head * out_head, first, rows, out_row, S.ROWS, S.WIDTH_V, S.BLOCK_V, S, True)
    i = first + tl.arange(0, S.ROWS)
    tl.store(delta + head * rows + i, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), mask=i < rows)


@triton.jit
def weights_and_slope(s, lse, seen, S: tl.constexpr, MASKED: tl.constexpr):
    """Of a tile of `scores`, whichever way round: the weights before the constants, and what dA is multiplied by to
    get ds (softmax's delta apart); zero where unseen."""
    if S.SOFTMAX:
        weights = tl.exp(s - lse)
        if MASKED:
            weights = tl.where(seen, weights, 0.0)
        slope = weights
    else:
        weights, slope = silu_and_slope_of_twice(s, S.FAST)
        if MASKED:
            weights, slope = tl.where(seen, weights, 0.0), tl.where(seen, slope, 0.0)
    return weights, slope


@triton.jit
def score_gradient(d_weights, slope, keep, delta, keep_scale, S: tl.constexpr):
    """ds, for softmax with dropout's constant (d_weights is dA before dropout), for silu without."""
    if S.SOFTMAX:
        if S.DROPOUT:
            d_weights = tl.where(keep, d_weights * keep_scale, 0.0)
        ds = slope * (d_weights - delta)
    else:
        ds = d_weights * slope
        if S.DROPOUT:
            ds = tl.where(keep, ds, 0.0)
    return ds


@triton.jit
def row_gradients(
    block, rows, keys, sequence, numbers, scale, bias, dropout, S: tl.constexpr, MASKED: tl.constexpr
):
    """(ds, k) of a block of keys: ds is (ROWS, KEYS) float32, k the block's keys."""
    q, d_out, i, query_time, lse, delta, counter, head = rows
    k_base, k_row, v_base, v_row, key_times = keys
    key_low, key_high, drop_last, keep_scale, place = dropout
    n, last = sequence[0], sequence[5]
    first = block * S.KEYS
    j = first + tl.arange(0, S.KEYS)
    k = load_rows(k_base, first, n, k_row, S.KEYS, S.WIDTH_Q, S.BLOCK_Q, S, MASKED)
    v = load_rows(v_base, first, n, v_row, S.KEYS, S.WIDTH_V, S.BLOCK_V, S, MASKED)
    key_time = 0
    if S.TIME:
        key_time = tl.load(key_times + j, mask=j < n, other=0)[None, :]
    seen, keep = None, None
    if MASKED:
        seen = allowed(i[:, None], j[None, :], sequence, numbers, S)
    products = tl.dot(q, tl.trans(k), input_precision=S.PRECISION)
    bias_i = tl.minimum(i, last - 1)[:, None]  # rows past the end read the last row's bias, and aren't stored
    s = scores(products, bias_i, j[None, :], query_time, key_time, scale, bias, S)
    slope = weights_and_slope(s, lse, seen, S, MASKED)[1]
    d_weights = tl.dot(d_out, tl.trans(v), input_precision=S.PRECISION)
    if S.DROPOUT:
        keep = kept(key_low, key_high, counter, head, place + first, drop_last, S.KEYS)
    return score_gradient(d_weights, slope, keep, delta, keep_scale, S), k


@triton.jit
def load_row_block(
    q,
    d_out,
    lse,
    delta,
    query_times,
    first,
    query_begin,
    counter_begin,
    head,
    strides,
    rows,
    sequence,
    S: tl.constexpr,
):
    """What `row_gradients` needs of a block of rows."""
    q_row, q_head, out_row, out_head = strides
    o, last = sequence[1], sequence[5]
    i = o + first + tl.arange(0, S.ROWS)
    of_batch = query_begin - o + i
    q_base, d_out_base = (
        head_rows(q, query_begin, q_row, head, q_head, S.FAR),
        head_rows(d_out, query_begin, out_row, head, out_head, S.FAR),
    )
    q_tile = load_rows(q_base, first, last - o, q_row, S.ROWS, S.WIDTH_Q, S.BLOCK_Q, S, True)
    d_out_tile = load_rows(d_out_base, first, last - o, out_row, S.ROWS, S.WIDTH_V, S.BLOCK_V, S, True)
    query_time, lse_i, delta_i = 0, 0, 0
    if S.TIME:
        query_time = tl.load(query_times + of_batch, mask=i < last, other=0)[:, None]
    if S.SOFTMAX:
        lse_i = tl.load(lse + head * rows + of_batch, mask=i < last, other=0.0)[:, None]
        delta_i = tl.load(delta + head * rows + of_batch, mask=i < last, other=0.0)[:, None]
    return (q_tile, d_out_tile, i, query_time, lse_i, delta_i, (counter_begin + i).to(tl.uint32), head)


@triton.jit(do_not_specialize=CHANGING)
def d_q_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    d_q,
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
    d_q_row,
    d_q_head,
    sequences: tl.int32,
    heads,
    blocks: tl.int32,
    group: tl.int32,
    rows: tl.int64,
    window: tl.int32,
    full_rows: tl.int32,
    contexts: tl.int32,
    scale: tl.float32,
    score_scale: tl.float32,
    buckets_per_unit: tl.float32,
    bucket_margin: tl.float32,
    last_bucket: tl.int32,
    key_low: tl.uint32,
    key_high: tl.uint32,
    drop_last: tl.uint32,
    keep_scale: tl.float32,
    S: tl.constexpr,
):
    """d_q[row, head] = score_scale * sum over seen keys of ds * k."""
    b, head, block = work_item(tl.program_id(0), order, sequences, heads, blocks, group, S, True)
    query_begin, key_begin, sequence, counters = load_sequence(
        b, offsets, query_offsets, targets, parts, contexts, S
    )
    o, last = sequence[1], sequence[5]
    first = block * S.ROWS
    if first >= last - o:
        return
    numbers = (window, full_rows, contexts)
    strides = (q_row, q_head, out_row, out_head)
    rows_of_block = load_row_block(
        q, d_out, lse, delta, query_times, first, query_begin, counters[0], head, strides, rows, sequence, S
    )
    if S.TIME:
        key_times += key_begin
    keys = (
        head_rows(k, key_begin, k_row, head, k_head, S.FAR),
        k_row,
        head_rows(v, key_begin, v_row, head, v_head, S.FAR),
        v_row,
        key_times,
    )
    bias = (position, time, (thresholds, buckets_per_unit, bucket_margin, last_bucket))
    dropout = (key_low, key_high, drop_last, keep_scale, counters[1])
    sums = tl.full((S.ROWS, S.BLOCK_Q), 0.0, dtype=tl.float32)

    whole, whole_end, runs = key_blocks(o + first, tl.minimum(o + first + S.ROWS, last), sequence, numbers, S)
    for whole_block in range(whole, whole_end):
        ds, k_tile = row_gradients(
            whole_block, rows_of_block, keys, sequence, numbers, scale, bias, dropout, S, False
        )
        sums = tl.dot(ds.to(k_tile.dtype), k_tile, sums, input_precision=S.PRECISION)
    for index in range(count_blocks(runs)):
        some_block = nth_block(index, runs)
        ds, k_tile = row_gradients(
            some_block, rows_of_block, keys, sequence, numbers, scale, bias, dropout, S, True
        )
        sums = tl.dot(ds.to(k_tile.dtype), k_tile, sums, input_precision=S.PRECISION)

    base = head_rows(d_q, query_begin, d_q_row, head, d_q_head, S.FAR)
    store_rows(base, first, last - o, d_q_row, sums * score_scale, S.ROWS, S.WIDTH_Q, S.BLOCK_Q, S)


@triton.jit
def _collect(
    sums, block, rows, keys, sequence, numbers, scale, bias, dropout, S: tl.constexpr, MASKED: tl.constexpr
):
    """(d_k, d_v) with one block of rows added. Tiles are (KEYS, ROWS): weights are operands as they are."""
    d_k, d_v = sums
    q_base, q_row, d_out_base, out_row, lse, delta, query_times, d_q_base, counter_begin, head = rows
    k, v, first_key, key_time = keys
    key_low, key_high, drop_last, keep_scale, place = dropout
    o, last = sequence[1], sequence[5]
    first = block * S.ROWS
    r = first + tl.arange(0, S.ROWS)
    i, j = o + r, first_key + tl.arange(0, S.KEYS)
    q = load_rows(q_base, first, last - o, q_row, S.ROWS, S.WIDTH_Q, S.BLOCK_Q, S, MASKED)
    d_out = load_rows(d_out_base, first, last - o, out_row, S.ROWS, S.WIDTH_V, S.BLOCK_V, S, MASKED)
    query_time, lse_i, delta_i = 0, 0, 0
    if S.TIME:
        query_time = tl.load(query_times + r, mask=i < last, other=0)[None, :]
    if S.SOFTMAX:
        lse_i = tl.load(lse + r, mask=i < last, other=0.0)[None, :]
        delta_i = tl.load(delta + r, mask=i < last, other=0.0)[None, :]
    seen, keep = None, None
    if MASKED:
        seen = allowed(i[None, :], j[:, None], sequence, numbers, S)
    products = tl.dot(k, tl.trans(q), input_precision=S.PRECISION)
    # Rows past the end read the last row's bias; their d_out and q were loaded as zero, so they add nothing.
    bias_i = tl.minimum(i, last - 1)[None, :]
    s = scores(products, bias_i, j[:, None], query_time, key_time, scale, bias, S)
    weights, slope = weights_and_slope(s, lse_i, seen, S, MASKED)
    if S.DROPOUT:
        counter = (counter_begin + i).to(tl.uint32)
        keep = tl.trans(kept(key_low, key_high, counter, head, place + first_key, drop_last, S.KEYS))
        weights = tl.where(keep, weights, 0.0)
    d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision=S.PRECISION)
    d_weights = tl.dot(v, tl.trans(d_out), input_precision=S.PRECISION)
    ds = score_gradient(d_weights, slope, keep, delta_i, keep_scale, S).to(q.dtype)
    d_k = tl.dot(ds, q, d_k, input_precision=S.PRECISION)
    if S.ATOMIC:
        d_q = tl.dot(tl.trans(ds), k, input_precision=S.PRECISION)
        pointers = row_pointers(d_q_base, first, S.BLOCK_Q, S.ROWS, S.BLOCK_Q, False, 0)
        if MASKED:
            tl.atomic_add(pointers, d_q, mask=(i < last)[:, None], sem="relaxed")
        else:
            tl.atomic_add(pointers, d_q, sem="relaxed")
    return d_k, d_v


@triton.jit(do_not_specialize=CHANGING)
def d_kv_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    d_q,
    d_k,
    d_v,
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
    d_k_row,
    d_k_head,
    d_v_row,
    d_v_head,
    sequences: tl.int32,
    heads,
    blocks: tl.int32,
    group: tl.int32,
    rows: tl.int64,
    window: tl.int32,
    full_rows: tl.int32,
    contexts: tl.int32,
    scale: tl.float32,
    score_scale: tl.float32,
    weight_scale: tl.float32,
    buckets_per_unit: tl.float32,
    bucket_margin: tl.float32,
    last_bucket: tl.int32,
    key_low: tl.uint32,
    key_high: tl.uint32,
    drop_last: tl.uint32,
    keep_scale: tl.float32,
    S: tl.constexpr,
):
    """d_k = score_scale * sum over rows of ds * q and d_v = weight_scale * sum of weight * d_out, a block of keys.

    When ATOMIC, the sums of ds * k, without score_scale, are added to d_q, float32 (heads, rows, BLOCK_Q): a shape
    whose strides are known makes addresses that need few registers.
    """
    b, head, block = work_item(tl.program_id(0), order, sequences, heads, blocks, group, S, False)
    query_begin, key_begin, sequence, counters = load_sequence(
        b, offsets, query_offsets, targets, parts, contexts, S
    )
    n = sequence[0]
    first = block * S.KEYS
    if first >= n:
        return
    numbers = (window, full_rows, contexts)
    j = first + tl.arange(0, S.KEYS)
    k_tile = load_rows(
        head_rows(k, key_begin, k_row, head, k_head, S.FAR),
        first,
        n,
        k_row,
        S.KEYS,
        S.WIDTH_Q,
        S.BLOCK_Q,
        S,
        True,
    )
    v_tile = load_rows(
        head_rows(v, key_begin, v_row, head, v_head, S.FAR),
        first,
        n,
        v_row,
        S.KEYS,
        S.WIDTH_V,
        S.BLOCK_V,
        S,
        True,
    )
    key_time = 0
    if S.TIME:
        key_time = tl.load(key_times + key_begin + j, mask=j < n, other=0)[:, None]
        query_times += query_begin
    if S.SOFTMAX:
        lse += head * rows + query_begin
        delta += head * rows + query_begin
    d_q_base = 0
    if S.ATOMIC:
        d_q_base = d_q + (head * rows + query_begin) * S.BLOCK_Q
    rows_of_pair = (
        head_rows(q, query_begin, q_row, head, q_head, S.FAR),
        q_row,
        head_rows(d_out, query_begin, out_row, head, out_head, S.FAR),
        out_row,
        lse,
        delta,
        query_times,
        d_q_base,
        counters[0],
        head,
    )
    keys = (k_tile, v_tile, first, key_time)
    bias = (position, time, (thresholds, buckets_per_unit, bucket_margin, last_bucket))
    dropout = (key_low, key_high, drop_last, keep_scale, counters[1])
    k_sums = tl.full((S.KEYS, S.BLOCK_Q), 0.0, dtype=tl.float32)
    v_sums = tl.full((S.KEYS, S.BLOCK_V), 0.0, dtype=tl.float32)

    whole, whole_end, runs = row_blocks(first, tl.minimum(first + S.KEYS, n), sequence, numbers, S)
    for index in range(count_blocks(runs)):
        some_block = nth_block(index, runs)
        k_sums, v_sums = _collect(
            (k_sums, v_sums), some_block, rows_of_pair, keys, sequence, numbers, scale, bias, dropout, S, True
        )
    for whole_block in range(whole, whole_end):
        k_sums, v_sums = _collect(
            (k_sums, v_sums),
            whole_block,
            rows_of_pair,
            keys,
            sequence,
            numbers,
            scale,
            bias,
            dropout,
            S,
            False,
        )

    k_base = head_rows(d_k, key_begin, d_k_row, head, d_k_head, S.FAR)
    v_base = head_rows(d_v, key_begin, d_v_row, head, d_v_head, S.FAR)
    store_rows(k_base, first, n, d_k_row, k_sums * score_scale, S.KEYS, S.WIDTH_Q, S.BLOCK_Q, S)
    store_rows(v_base, first, n, d_v_row, v_sums * weight_scale, S.KEYS, S.WIDTH_V, S.BLOCK_V, S)
