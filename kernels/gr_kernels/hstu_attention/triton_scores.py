"""What the Triton kernels share: which work a program does, loading rows, scores with their bias, and dropout.

Tiles are written for any orientation: i and query times have one shape that broadcasts with that of j and key times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gr_kernels.triton_common.gather import gather, gather_some

# Arguments that differ from batch to batch: a kernel isn't compiled anew for a 1 or a multiple of 16 among them.
CHANGING = [
    *("sequences", "blocks", "group", "rows", "entries"),
    *("window", "full_rows", "contexts", "last_bucket", "key_low", "key_high", "drop_last"),
]


@triton.jit
def work_item(index, order, sequences, heads, blocks, group, S: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(sequence, head, block) of the index-th piece of work; there are sequences * heads * blocks.

    `group` (sequence, head) pairs, whose keys and values fit the L2 cache together, go side by side, their longest
    blocks first: the last blocks of rows when causal rows walk over keys, the first blocks of keys when keys walk over
    rows. `order` lists the sequences from the longest on.
    """
    pairs = sequences * heads
    first = index // (group * blocks) * group
    within = index % (group * blocks)
    width = tl.minimum(group, pairs - first)
    block = within // width
    if LAST_FIRST:
        block = blocks - 1 - block
    pair = first + within % width
    sequence, head = pair // heads, pair % heads
    if S.ORDERED:
        sequence = tl.load(order + sequence).to(tl.int32)
    return sequence, head, block


@triton.jit
def load_sequence(b, offsets, query_offsets, targets, parts, contexts, S: tl.constexpr):
    """(first query row, first key row, the tuple that triton_mask.py describes, where dropout counts from); rows of the
    batch are int64.

    Dropout counts from (the number of the row that the first key is, that key's place in the whole sequence). `parts`
    holds, for parts of sequences, (o, those two) of each, int64.
    """
    begin = tl.load(offsets + b)
    n = (tl.load(offsets + b + 1) - begin).to(tl.int32)
    query_begin, m = begin, n
    if S.CROSS:
        query_begin = tl.load(query_offsets + b)
        m = (tl.load(query_offsets + b + 1) - query_begin).to(tl.int32)
    history, ahead = n, n * 0
    if S.TARGETS:
        history = tl.maximum(n - tl.load(targets + b).to(tl.int32), 0)
    if S.CONTEXTS:
        ahead = ahead + contexts - 1
    o, last, counters = n - m, n, (begin, n * 0)
    if S.PART:
        o = tl.load(parts + 3 * b).to(tl.int32)
        last = o + m
        counters = (tl.load(parts + 3 * b + 1), tl.load(parts + 3 * b + 2).to(tl.int32))
    return query_begin, begin, (n, o, history, ahead, tl.maximum(history - ahead, 0), last), counters


@triton.jit
def head_rows(base, row, row_stride, head, head_stride, FAR: tl.constexpr):
    """The pointer to a row of the batch, which is 64-bit, in one head."""
    if FAR:
        head = tl.cast(head, tl.int64)
    return base + row * row_stride + head * head_stride


@triton.jit
def row_pointers(
    base, first, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr, ALIGNED: tl.constexpr
):
    """(ROWS, BLOCK) pointers to rows from `first` on. The tile's start is 64-bit; within a tile 32 bits, which are
    cheaper, are enough unless FAR."""
    start = base + tl.cast(first, tl.int64) * stride
    row = tl.arange(0, ROWS)[:, None]
    if FAR:
        row = row.to(tl.int64)
    pointers = start + (row * stride + tl.arange(0, BLOCK)[None, :])
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [1, ALIGNED])
    return pointers


@triton.jit
def load_rows(
    base,
    first,
    end,
    stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(ROWS, BLOCK): rows [first, first + ROWS), zero from column WIDTH on and, when MASKED, from row `end` on."""
    pointers = row_pointers(base, first, stride, ROWS, BLOCK, S.FAR, S.ALIGNED)
    if MASKED:
        there = (first + tl.arange(0, ROWS) < end)[:, None]
        if WIDTH != BLOCK:
            there = there & (tl.arange(0, BLOCK) < WIDTH)[None, :]
        tile = tl.load(pointers, mask=there, other=0.0)
    elif WIDTH != BLOCK:
        tile = tl.load(pointers, mask=(tl.arange(0, BLOCK) < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    base,
    first,
    end,
    stride,
    tile,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
):
    """Stores rows [first, min(first + ROWS, end)) of a (ROWS, BLOCK) tile, WIDTH columns of them."""
    there = (first + tl.arange(0, ROWS) < end)[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    pointers = row_pointers(base, first, stride, ROWS, BLOCK, S.FAR, S.ALIGNED)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=there)


@triton.jit
def time_bucket(query_time, key_time, buckets, SQRT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """TimeBuckets.bucket_between of int64 tensors that broadcast, exactly.

    LONGEST needn't be looked at: its bucket is `last`, or above it, and so is that of anything longer.

    The logarithm or root in float32 is less than `margin` buckets off (triton_op.py has the bound). Lowered by the
    margin it is in the right bucket or one below; only within two margins of a border does the integer threshold have
    to be looked up, so that hardly any lane loads.
    """
    thresholds, per_unit, margin, last = buckets
    dt = query_time - key_time
    wrapped = ((query_time ^ key_time) & (query_time ^ dt)) < 0
    dt = tl.abs(dt).to(tl.uint64)
    size = (dt >> 32).to(tl.uint32).to(tl.float32) * 4294967296.0 + dt.to(tl.uint32).to(tl.float32)
    size = tl.where(wrapped, float("inf"), size)
    if SQRT:
        exact = tl.sqrt(size) * per_unit
    else:
        exact = tl.log2(tl.maximum(size, 1.0)) * per_unit
    below = tl.floor(tl.minimum(tl.maximum(exact - margin, 0.0), last.to(tl.float32)))
    bucket = below.to(tl.int32)
    near = (exact + margin >= below + 1.0) & (bucket < last)
    border = gather_some(thresholds + bucket, near, ASSEMBLY).to(tl.uint64)
    return bucket + (near & (dt >= border)).to(tl.int32)


@triton.jit
def scores(products, i, j, query_time, key_time, scale, bias, S: tl.constexpr):
    """UNIT (scale q·k + bias) in float32."""
    position, time, buckets = bias
    s = products * (scale * S.UNIT)
    if S.POSITION:
        s += S.UNIT * gather(position + tl.maximum(i - j, 0), S.FAST)
    if S.TIME:
        bucket = time_bucket(query_time, key_time, buckets, S.SQRT, S.FAST)
        s += S.UNIT * gather(time + bucket, S.FAST)
    return s
