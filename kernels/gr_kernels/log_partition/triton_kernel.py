"""The Triton kernels of the softmax over a whole table: both are attention whose keys are its values.

``partial_sums`` holds a block of queries and streams the table; ``table_gradient`` holds a block of the table and
streams the queries. Logits exist a tile at a time, in base 2: y = z log2(e), so that exp z = exp2 y is one special-
function operation. Every program owns what it writes: no atomics, the same bits in every run.

T changes from batch to batch, and so does I where the table is the batch's own candidates: Triton doesn't specialise on
them (it would compile again for 1 and for multiples of 16). Rows lie at multiples of D, a constexpr, whatever they are.

Shapes: T queries, I table rows, D width, X excluded names of a query, S splits of the table.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _column_terms(table_rows, inside, inverse, bias, scale2):
    """What turns a product with table row i into a logit in base 2: (factor_i, offset_i, |inverse_i|).

    Rows beyond the table get the offset -inf, as masked ones do: no tile needs a mask of its own.
    """
    offset = tl.where(inside, 0.0, float("-inf"))
    if bias is not None:
        offset += tl.load(bias + table_rows, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    length = tl.full(offset.shape, 1.0, tl.float32)
    if inverse is not None:
        length = tl.abs(tl.load(inverse + table_rows, mask=inside, other=1.0))
    return length * scale2, offset, length


@triton.jit(do_not_specialize=["T", "I", "tiles_per_split"])
def partial_sums(
    queries,  # (T, D)
    table,  # (I, D)
    inverse,  # (I,) float32 or None: 1 / max(|e|, eps), negative where eps was the larger
    bias,  # (I,) float32 or None
    names,  # (I,) int32 or None: row i is called i
    excluded,  # (T, X) int32 or None: names that query t doesn't see
    peaks,  # (S, T) float32 out: largest logit, base 2
    sums,  # (S, T) float32 out: sum of exp2(logit - peak)
    means,  # (S, T, D) float32 out, or None: sum of exp2(logit - peak) times the (normalised) row
    T,
    I,
    tiles_per_split,
    scale2,  # scale * log2(e)
    D: tl.constexpr,
    X: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D up to a power of two
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # programs that run together take the same stretch of the table, which the L2 cache then reads once for all
    row_blocks = tl.cdiv(T, BLOCK_T)
    block, split = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    # a block's first cell in 64 bits, the others' distance from it in 32
    held = tl.arange(0, BLOCK_T)[:, None] * D + d[None, :]
    streamed = tl.arange(0, BLOCK_I)[:, None] * D + d[None, :]
    q = tl.load(
        queries + block.to(tl.int64) * BLOCK_T * D + held, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
    )
    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    mean = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    first = split * tiles_per_split
    stretch = table + first.to(tl.int64) * BLOCK_I * D
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(I, BLOCK_I))):
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = i < I
        e = tl.load(stretch + streamed, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        stretch += BLOCK_I * D
        factor, offset, length = _column_terms(i, inside, inverse, bias, scale2)
        y = tl.dot(q, tl.trans(e), input_precision=PRECISION)
        if inverse is not None:
            y = y * factor[None, :] + offset[None, :]
        else:
            y = y * scale2 + offset[None, :]
        if excluded is not None:
            name = i
            if names is not None:
                name = tl.load(names + i, mask=inside, other=0)
            for x in tl.static_range(X):
                hidden = tl.load(excluded + t * X + x, mask=t < T, other=-1)
                y = tl.where(name[None, :] == hidden[:, None], float("-inf"), y)
        higher = tl.maximum(peak, tl.max(y, 1))
        # where nothing is seen yet, exp2(-inf - 0) = 0, not a NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(y - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
        if means is not None:
            if inverse is not None:
                p = p * length[None, :]
            mean = tl.dot(p.to(e.dtype), e, mean * shrink[:, None], input_precision=PRECISION)
    out = split.to(tl.int64) * T + block * BLOCK_T
    tl.store(peaks + out + tl.arange(0, BLOCK_T), peak, mask=t < T)
    tl.store(sums + out + tl.arange(0, BLOCK_T), total, mask=t < T)
    if means is not None:
        tl.store(means + out * D + held, mean, mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T", "I"])
def table_gradient(
    queries,  # (T, D)
    table,  # (I, D)
    inverse,  # as above, and so are the next three
    bias,
    names,
    excluded,
    targets,  # (T,) int32 or None: table rows
    peaks,  # (T,) float32: largest logit of the query, base 2
    factors,  # (T,) float32: upstream gradient of the query's value / sum of exp2(logit - peak)
    upstream,  # (T,) float32: that gradient; read with targets
    grad_table,  # (I, D) out, or None
    grad_bias,  # (I,) float32 out, or None
    T,
    I,
    scale2,
    scale,
    D: tl.constexpr,
    X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    inside = i < I
    there = inside[:, None] & (d < D)[None, :]
    first = tl.program_id(0).to(tl.int64) * BLOCK_I * D  # in 64 bits; distances from it in 32
    held = tl.arange(0, BLOCK_I)[:, None] * D + d[None, :]
    streamed = tl.arange(0, BLOCK_T)[:, None] * D + d[None, :]
    e = tl.load(table + first + held, mask=there, other=0.0)
    factor, offset, length = _column_terms(i, inside, inverse, bias, scale2)
    name = i
    if names is not None:
        name = tl.load(names + i, mask=inside, other=0)
    grad = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    grad_offset = tl.zeros([BLOCK_I], tl.float32)
    stretch = queries
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        q = tl.load(stretch + streamed, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        stretch += BLOCK_T * D
        peak = tl.load(peaks + t, mask=t < T, other=float("inf"))  # beyond the last query: exp2(-inf) = 0
        y = tl.dot(e, tl.trans(q), input_precision=PRECISION)
        if inverse is not None:
            y = y * factor[:, None] + offset[:, None]
        else:
            y = y * scale2 + offset[:, None]
        if excluded is not None:
            for x in tl.static_range(X):
                hidden = tl.load(excluded + t * X + x, mask=t < T, other=-1)
                y = tl.where(name[:, None] == hidden[None, :], float("-inf"), y)
        p = tl.exp2(y - peak[None, :]) * tl.load(factors + t, mask=t < T, other=0.0)[None, :]
        if targets is not None:
            target = tl.load(targets + t, mask=t < T, other=-1)
            weight = tl.load(upstream + t, mask=t < T, other=0.0)
            p = tl.where(i[:, None] == target[None, :], p - weight[None, :], p)
        if grad_bias is not None:
            grad_offset += tl.sum(p, 1)
        if grad_table is not None:
            grad = tl.dot(p.to(q.dtype), q, grad, input_precision=PRECISION)
    if grad_bias is not None:
        tl.store(grad_bias + i, grad_offset, mask=inside)
    if grad_table is not None:
        grad *= scale
        if inverse is not None:
            # d(q.e/|e|)/de = (q - (q.ê) ê) / |e|; where the divisor is the constant eps, the first part alone
            e32 = tl.load(table + first + held, mask=there, other=0.0).to(tl.float32)
            along = tl.sum(grad * e32, 1) * length * length
            along = tl.where(tl.load(inverse + i, mask=inside, other=-1.0) > 0, along, 0.0)
            grad = (grad - along[:, None] * e32) * length[:, None]
        tl.store(grad_table + first + held, grad.to(grad_table.dtype.element_ty), mask=there)
