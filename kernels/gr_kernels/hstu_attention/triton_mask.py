"""The mask inside the Triton kernels: which keys a row sees, and which blocks of keys (or rows) a block needs at all.

mask.py's `allowed` is the specification. A kernel walks two runs of blocks: those that every row of its block sees
whole, without looking at the mask, then the others one score at a time. Blocks that nobody sees are in neither: those
behind the window, those ahead of the rows, and those between the end of history and a target's own key.

A sequence is the tuple (n, o, history, ahead, highest, last) of int32 scalars: n keys; o, the row that its first query
is (0 but in the cross form), counted from the first key; history, the rows that aren't targets; ahead and highest as in
`allowed`; last, the row behind the last query (n, but for parts of sequences, whose queries may all stand behind all
keys). A mask's numbers are the tuple (window, full_rows, contexts). Which features a mask has is known at compile time,
so that a causal mask costs nothing of the others.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_id(i, ahead, highest):
    """The order id of rows: 0 for contexts, `highest` for targets."""
    return tl.minimum(tl.maximum(i - ahead, 0), highest)


@triton.jit
def free_from(highest, full_rows):
    """The order id from which on rows are free of the window: none without full rows."""
    return tl.where(full_rows > 0, highest - full_rows, highest + 1)


@triton.jit
def allowed(i, j, sequence, numbers, S: tl.constexpr):
    """Whether row i sees key j, for int32 tensors that broadcast; False where either is past the sequence's end."""
    n, _, _, ahead, highest, last = sequence
    window, full_rows, _ = numbers
    exists = (i < last) & (j < n)
    if not S.CAUSAL:
        seen = exists
    elif not (S.TARGETS or S.WINDOW or S.CONTEXTS):
        seen = exists & (j <= i)
    else:
        id_i, id_j = order_id(i, ahead, highest), order_id(j, ahead, highest)
        earlier = id_i > id_j
        if S.WINDOW:
            earlier = earlier & ((id_i - id_j <= window) | (id_i >= free_from(highest, full_rows)))
        seen = earlier | (i == j)
        if S.CONTEXTS:
            seen = seen | ((id_i == 0) & (id_j < highest))
        seen = seen & exists
    return seen


@triton.jit
def key_blocks(first, end, sequence, numbers, S: tl.constexpr):
    """The blocks of KEYS keys that rows [first, end) of a sequence need.

    Returns (a, b, runs): blocks [a, b) are seen whole by every row; `runs` are the others needed, as `nth_block` takes
    them: from the first block to a, from b on, and the rows' own keys.
    """
    n, _, history, ahead, highest, _ = sequence
    window, full_rows, contexts = numbers
    if not S.CAUSAL:
        a, b = n * 0, n // S.KEYS
        runs = (a, n * 0, b, tl.cdiv(n, S.KEYS) - b, b, n * 0, b, n * 0)
    else:
        # Keys below `seen_end` may be seen by several rows of the block; from there on by row i == j alone.
        seen_from, whole_from, seen_end, whole_end = n * 0, n * 0, end, first
        if S.PART:
            seen_end, whole_end = tl.minimum(end, n), tl.minimum(first, n)
        if S.TARGETS or S.CONTEXTS:
            seen_end, whole_end = tl.minimum(end, history), tl.minimum(first, history)
            if S.CONTEXTS:  # the first rows see all of the history
                seen_end = tl.where(first < contexts, history, seen_end)
                whole_end = tl.where(first < contexts, 0, whole_end)
            seen_end, whole_end = tl.where(highest > 0, seen_end, 0), tl.where(highest > 0, whole_end, 0)
        if S.WINDOW:
            exempt_from = free_from(highest, full_rows)
            lowest = order_id(first, ahead, highest) - window
            free = order_id(end - 1, ahead, highest) >= exempt_from
            if S.CONTEXTS:
                free = free | (first < contexts)
            seen_from = tl.where(free | (lowest <= 0), 0, lowest + ahead)
            all_free = order_id(first, ahead, highest) >= exempt_from
            whole_from = tl.where(all_free, 0, tl.maximum(tl.minimum(end - 1, history) - window, 0))
        stop = tl.cdiv(seen_end, S.KEYS)
        start = tl.minimum(seen_from // S.KEYS, stop)
        a = tl.minimum(tl.maximum(tl.cdiv(whole_from, S.KEYS), start), stop)
        b = tl.maximum(tl.minimum(whole_end // S.KEYS, stop), a)
        own = n * 0
        own_start = stop
        if S.TARGETS or S.CONTEXTS:
            own_start = tl.maximum(stop, tl.maximum(first, seen_end) // S.KEYS)
            own = tl.maximum(tl.cdiv(end, S.KEYS) - own_start, 0)
        runs = (start, a - start, b, stop - b, own_start, own, own_start, n * 0)
    return a, b, runs


@triton.jit
def row_blocks(first, end, sequence, numbers, S: tl.constexpr):
    """The blocks of ROWS query rows that need keys [first, end) of a sequence, the keys of one block of KEYS.

    Blocks are counted from the first query. Returns (a, b, runs) as `key_blocks` does; blocks [a, b) lie whole in
    the sequence, too.
    """
    n, o, history, ahead, highest, last_row = sequence
    window, full_rows, contexts = numbers
    m = last_row - o
    zero = n * 0
    last = tl.cdiv(m, S.ROWS)
    if not S.CAUSAL:
        a, b = zero, tl.where(end - first == S.KEYS, m // S.ROWS, 0)
        runs = (b, last - b, b, zero, b, zero, b, zero)
    else:
        # Rows [first, seen_end) see something; rows [whole_from, whole_end) everything.
        seen_end, whole_from, whole_end = last_row, end, last_row
        some = zero == 0  # whether any row sees another's key in this block
        if S.TARGETS or S.CONTEXTS:
            some = (first < history) & (highest > 0)
            seen_end = tl.where(some, seen_end, end)
            whole_end = tl.where(some & (end <= history), whole_end, 0)
        if S.CONTEXTS:
            whole_from = tl.maximum(whole_from, contexts)
        if S.WINDOW:
            # All targets are where history ends: a window that reaches from there reaches from each of them.
            reach = tl.maximum(end - 1, ahead) + window + 1
            seen_end = tl.where(some & (reach <= history), tl.minimum(seen_end, reach), seen_end)
            whole_end = tl.where(
                first + window < history, tl.minimum(whole_end, first + window + 1), whole_end
            )
        start = tl.maximum(first - o, 0) // S.ROWS
        stop = tl.maximum(tl.cdiv(tl.maximum(seen_end - o, 0), S.ROWS), start)
        stop = tl.minimum(stop, tl.maximum(last, start))
        a = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(whole_from - o, 0), S.ROWS), start), stop)
        b = tl.minimum(tl.maximum(tl.maximum(whole_end - o, 0) // S.ROWS, a), stop)
        free_start, free, context = stop, zero, zero
        if S.WINDOW:  # rows that the window doesn't bind
            free_start = tl.maximum(stop, tl.maximum(history - full_rows - o, 0) // S.ROWS)
            free = tl.where(some & (full_rows > 0), tl.maximum(last - free_start, 0), 0)
        if S.CONTEXTS:
            context = tl.minimum(tl.cdiv(tl.maximum(contexts - o, 0), S.ROWS), tl.minimum(start, last))
            context = tl.where(some, context, 0)
        runs = (start, a - start, b, stop - b, free_start, free, zero, context)
    return a, b, runs


@triton.jit
def count_blocks(runs):
    """How many blocks four runs (start, length, start, length, ...) hold."""
    return runs[1] + runs[3] + runs[5] + runs[7]


@triton.jit
def nth_block(index, runs):
    """The block at `index` of four runs laid end to end."""
    s0, l0, s1, l1, s2, l2, s3, _ = runs
    after = index - l0
    late = tl.where(after - l1 < l2, s2 + after - l1, s3 + after - l1 - l2)
    return tl.where(index < l0, s0 + index, tl.where(after < l1, s1 + after, late))
