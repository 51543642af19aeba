"""The gradients of the bias tables: dw_pos[d] = sum of ds_ij with i - j = d, dw_time[b] = sum of ds_ij in bucket b.

A program takes blocks of rows of sequences in a fixed order, and for each tile of scores sums ds over the heads
(which share the bias) before it sorts the sum into diagonals and buckets: the sorting, dearer than the products, is
paid once for all heads. Every program adds to rows of its own, which the host sums: equal calls give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.hstu_attention.triton_backward import load_row_block, score_gradient, weights_and_slope
from gr_kernels.hstu_attention.triton_mask import allowed, key_blocks
from gr_kernels.hstu_attention.triton_scores import CHANGING, head_rows, load_rows, load_sequence, time_bucket
from gr_kernels.triton_common.gather import gather
from gr_kernels.triton_common.random import kept


@triton.jit
def _add(pointers, values, mask):
    """Adds to memory that is this program's alone. The barrier: the next to touch it may be another thread."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)
    tl.debug_barrier()


@triton.jit
def add_diagonals(ds, first_row, first_key, positions, n, S: tl.constexpr):
    """positions[i - j] += the sum of ds over each diagonal of a (ROWS, KEYS) tile, ROWS <= KEYS.

    Row i of the tile is turned by i places, so that column c holds the diagonals c (where i >= c) and c - KEYS.
    """
    r, c = tl.arange(0, S.ROWS)[:, None], tl.arange(0, S.KEYS)
    turned = tl.gather(ds, (r - c[None, :]) & (S.KEYS - 1), 1)
    near = tl.sum(tl.where(r >= c[None, :], turned, 0.0), 0)
    far = tl.sum(tl.where(r >= c[None, :], 0.0, turned), 0)
    distance = first_row - first_key + c
    _add(positions + distance, near, (distance >= 0) & (distance < n) & (c < S.ROWS))
    distance -= S.KEYS
    _add(positions + distance, far, (distance >= 0) & (distance < n))
    if S.CONTEXTS:  # contexts see later rows, at distance 0
        i, j = first_row + r, first_key + c[None, :]
        _add(positions, tl.sum(tl.where(i < j, ds, 0.0)), first_row < first_key + S.KEYS)


@triton.jit
def add_buckets(ds, bucket, seen, times, last_bucket):
    """times[b] += the sum of ds over bucket b. A tile rarely has more than a few, as near times have near buckets."""
    lowest = tl.min(tl.where(seen, bucket, last_bucket))
    highest = tl.max(tl.where(seen, bucket, 0))
    for b in range(lowest, highest + 1):
        total = tl.sum(tl.where(bucket == b, ds, 0.0))
        tl.store(times + b, tl.load(times + b) + total)
    tl.debug_barrier()


@triton.jit(do_not_specialize=CHANGING)
def table_gradients_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    position_sums,
    time_sums,
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
    rows: tl.int64,
    entries: tl.int32,
    window: tl.int32,
    full_rows: tl.int32,
    contexts: tl.int32,
    scale: tl.float32,
    buckets_per_unit: tl.float32,
    bucket_margin: tl.float32,
    last_bucket: tl.int32,
    key_low: tl.uint32,
    key_high: tl.uint32,
    drop_last: tl.uint32,
    keep_scale: tl.float32,
    S: tl.constexpr,
):
    """position_sums (programs, entries) and time_sums (programs, last_bucket + 1), float32, start as zeros.

    Without the constants 1 / divisor and, for silu, dropout's 1 / (1 - p).
    """
    program = tl.program_id(0)
    numbers = (window, full_rows, contexts)
    strides = (q_row, q_head, out_row, out_head)
    buckets = (thresholds, buckets_per_unit, bucket_margin, last_bucket)
    if S.POSITION:
        position_sums += program.to(tl.int64) * entries
    if S.TIME:
        time_sums += program.to(tl.int64) * (last_bucket + 1)
    for work in range(program, sequences * blocks, tl.num_programs(0)):
        b, block = work % sequences, blocks - 1 - work // sequences
        if S.ORDERED:
            b = tl.load(order + b).to(tl.int32)
        query_begin, key_begin, sequence, counters = load_sequence(
            b, offsets, query_offsets, targets, parts, contexts, S
        )
        n, o, last = sequence[0], sequence[1], sequence[5]
        first = block * S.ROWS
        i = o + first + tl.arange(0, S.ROWS)
        bias_i = tl.minimum(i, last - 1)[:, None]
        query_time = 0
        if S.TIME:
            query_time = tl.load(query_times + query_begin - o + i, mask=i < last, other=0)[:, None]
        end = tl.minimum(o + first + S.ROWS, last)
        walk = key_blocks(o + first, end, sequence, numbers, S)
        whole_end, runs = walk[1], walk[2]
        start, after, own_start, own = runs[0], runs[3], runs[4], runs[5]
        connected = whole_end + after - start
        count = tl.where(first < last - o, connected + own, 0)
        for index in range(count):
            key_block = tl.where(index < connected, start + index, own_start + index - connected)
            first_key = key_block * S.KEYS
            j = first_key + tl.arange(0, S.KEYS)
            seen = allowed(i[:, None], j[None, :], sequence, numbers, S)
            bias = tl.full((S.ROWS, S.KEYS), 0.0, dtype=tl.float32)
            if S.POSITION:
                bias += S.UNIT * gather(position + tl.maximum(bias_i - j[None, :], 0), S.FAST)
            if S.TIME:
                key_time = tl.load(key_times + key_begin + j, mask=j < n, other=0)[None, :]
                bucket = time_bucket(query_time, key_time, buckets, S.SQRT, S.FAST)
                bias += S.UNIT * gather(time + bucket, S.FAST)
            ds = tl.full((S.ROWS, S.KEYS), 0.0, dtype=tl.float32)
            for head in range(heads):
                loaded = load_row_block(
                    q,
                    d_out,
                    lse,
                    delta,
                    query_times,
                    first,
                    query_begin,
                    counters[0],
                    head,
                    strides,
                    rows,
                    sequence,
                    S,
                )
                q_tile, d_out_tile, lse_i, delta_i, counter = (
                    loaded[0],
                    loaded[1],
                    loaded[4],
                    loaded[5],
                    loaded[6],
                )
                k_base = head_rows(k, key_begin, k_row, head, k_head, S.FAR)
                v_base = head_rows(v, key_begin, v_row, head, v_head, S.FAR)
                k_tile = load_rows(k_base, first_key, n, k_row, S.KEYS, S.WIDTH_Q, S.BLOCK_Q, S, True)
                v_tile = load_rows(v_base, first_key, n, v_row, S.KEYS, S.WIDTH_V, S.BLOCK_V, S, True)
                products = tl.dot(q_tile, tl.trans(k_tile), input_precision=S.PRECISION)
                slope = weights_and_slope(products * (scale * S.UNIT) + bias, lse_i, seen, S, True)[1]
                d_weights = tl.dot(d_out_tile, tl.trans(v_tile), input_precision=S.PRECISION)
                keep = None
                if S.DROPOUT:
                    keep = kept(key_low, key_high, counter, head, counters[1] + first_key, drop_last, S.KEYS)
                ds += score_gradient(d_weights, slope, keep, delta_i, keep_scale, S)
            if S.POSITION:
                add_diagonals(ds, o + first, first_key, position_sums, last, S)
            if S.TIME:
                # Buckets are found again rather than kept in registers over the heads; a volatile load can't be
                # recognised as the one before.
                times = key_times + key_begin + j
                again = tl.load(times, mask=j < n, other=0, volatile=True)[None, :]
                bucket = time_bucket(query_time, again, buckets, S.SQRT, S.FAST)
                add_buckets(ds, bucket, seen, time_sums, last_bucket)
