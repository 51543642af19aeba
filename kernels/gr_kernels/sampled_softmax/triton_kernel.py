"""The Triton kernels of the softmax among a target and the query's own negatives.

``own_negatives`` has one program a query, which gathers its rows once, for the loss and the queries' gradient alike.
``row_gradient`` has one program a table row, which goes over the (query, candidate) pairs that drew it, in their
order: no atomics, the same bits in every run.  Logits are in base 2: y = z log2(e).  Sums are float32.

Shapes: T queries, K negatives, C = 1 + K candidates (the target first), I table rows, D width, P pairs of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_negatives(
    queries,  # (T, D)
    table,  # (I, D)
    bias,  # (I,) float32 or None
    targets,  # (T,) integers
    negatives,  # (T, K) integers
    losses,  # (T,) float32 out
    peaks,  # (T,) float32 out: largest logit, base 2
    sums,  # (T,) float32 out: sum of exp2(logit - peak)
    directions,  # (T, D) float32 out, or None: mean row by the shares, less the target's
    K,
    scale2,  # scale * log2(e)
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D up to a power of two
    BLOCK_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(queries + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    target = tl.load(targets + t).to(tl.int64)
    label = tl.load(table + target * D + d, mask=d < D, other=0.0).to(tl.float32)
    if NORMALIZE:
        label = label / tl.maximum(tl.sqrt_rn(tl.sum(label * label, 0)), eps)
    logit = tl.sum(q * label, 0) * scale2
    if bias is not None:
        logit += tl.load(bias + target).to(tl.float32) * 1.4426950408889634
    # finite, so that a target whose bias is -inf has no share rather than a NaN; its loss is +inf
    peak = tl.maximum(logit, -1e38)
    total = tl.exp2(logit - peak)  # NaN where the logit is NaN or +inf
    mean = label * total
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = tl.load(negatives + t * K + k, mask=k < K, other=0).to(tl.int64)
        e = tl.load(
            table + row[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0
        ).to(tl.float32)
        y = tl.sum(e * q[None, :], 1) * scale2
        if NORMALIZE:
            length = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(e * e, 1)), eps)
            y *= length
        if bias is not None:
            y += tl.load(bias + row, mask=k < K, other=0.0).to(tl.float32) * 1.4426950408889634
        y = tl.where((k < K) & (row != target), y, float("-inf"))
        higher = tl.maximum(peak, tl.max(y, 0))
        p = tl.exp2(y - higher)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 0)
        peak = higher
        if directions is not None:
            if NORMALIZE:
                p *= length
            mean = mean * shrink + tl.sum(p[:, None] * e, 0)
    tl.store(losses + t, (peak - logit) * 0.6931471805599453 + tl.log(total))
    tl.store(peaks + t, peak)
    tl.store(sums + t, total)
    if directions is not None:
        tl.store(directions + t * D + d, mean / total - label, mask=d < D)


@triton.jit
def row_gradient(
    queries,  # (T, D)
    table,  # (I, D)
    bias,  # (I,) float32 or None
    targets,  # (T,) integers
    pairs,  # (T * C,) int64: t * C + c, sorted by the row that they are of
    starts,  # (I + 1,) int64: where a row's pairs begin
    peaks,  # (T,) float32
    sums,  # (T,) float32
    upstream,  # (T,) float32: gradient of the query's loss
    grad_table,  # (I, D) out, or None
    grad_bias,  # (I,) float32 out, or None
    C,
    scale2,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.load(table + i * D + d, mask=d < D, other=0.0).to(tl.float32)
    length = 1.0
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(e * e, 0))
        length = 1.0 / tl.maximum(norm, eps)
    offset = 0.0
    if bias is not None:
        offset = tl.load(bias + i).to(tl.float32) * 1.4426950408889634
    grad = tl.zeros([BLOCK_D], tl.float32)
    grad_offset = tl.zeros([BLOCK_P], tl.float32)
    last = tl.load(starts + i + 1)
    for start in range(tl.load(starts + i), last, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        there = place < last
        pair = tl.load(pairs + place, mask=there, other=0)
        t = pair // C
        q = tl.load(
            queries + t[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
        ).to(tl.float32)
        weight = tl.load(upstream + t, mask=there, other=0.0)
        y = tl.sum(q * e[None, :], 1) * (scale2 * length) + offset
        p = tl.exp2(y - tl.load(peaks + t, mask=there, other=0.0)) * (
            weight / tl.load(sums + t, mask=there, other=1.0)
        )
        # the target's own pair is the first of its query; a negative that is the target counts nothing
        collides = tl.load(targets + t, mask=there, other=-1) == i
        p = tl.where(pair - t * C == 0, p - weight, tl.where(collides, 0.0, p))
        p = tl.where(there, p, 0.0)
        grad_offset += p
        if grad_table is not None:
            grad += tl.sum(p[:, None] * q, 0)
    if grad_bias is not None:
        tl.store(grad_bias + i, tl.sum(grad_offset, 0))
    if grad_table is not None:
        grad *= scale
        if NORMALIZE:
            # d(q.e/|e|)/de = (q - (q.ê) ê) / |e|; where the divisor is the constant eps, the first part alone
            along = tl.where(norm < eps, 0.0, tl.sum(grad * e, 0) * length * length)
            grad = (grad - along * e) * length
        tl.store(grad_table + i * D + d, grad.to(grad_table.dtype.element_ty), mask=d < D)
