"""What a call must satisfy before an implementation sees it: one sentence says what is wrong.

Numbers that lie on a device (offsets, targets, order) are trusted, since reading them would wait for it; so are those
of a graph being traced. (Sentences are only put together when they are needed: formatting a length that a traced
graph leaves open would fix it.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.hstu_attention.problem import AttentionMask, Problem, RelativeBias
from gr_kernels.tracing import values_are_at_hand


def check(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: Problem) -> None:
    """Raises ValueError with one sentence if the call makes no sense."""
    _check_tensors(q_THQ, k_SHQ, v_SHV, cross=problem.query_offsets is not None)
    _check_settings(problem)
    _check_offsets(problem, q_THQ.device)
    _check_targets(problem.mask, problem.offsets.shape[0] - 1, q_THQ.device)
    _check_part(problem, q_THQ)
    _check_order(problem.order, problem.offsets.shape[0] - 1, q_THQ.device)
    if values_are_at_hand(q_THQ):
        _check_rows(problem, q_THQ.shape[0], k_SHQ.shape[0])
    _check_bias(problem.bias, q_THQ, k_SHQ, problem.max_length, problem.mask)


def _wrong(sentence: str) -> ValueError:
    return ValueError(f"hstu_attention: {sentence}.")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, cross: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise _wrong(f"{name} must have 3 dimensions (rows, heads, width), not {x.dim()}")
        if not x.is_floating_point():
            raise _wrong(f"{name} must be floating point, not {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise _wrong(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
    if cross and k.shape[1:] != q.shape[1:]:
        raise _wrong(f"k must have q's heads and width {tuple(q.shape[1:])}, not {tuple(k.shape[1:])}")
    if not cross and k.shape != q.shape:
        raise _wrong(f"k must have q's shape {tuple(q.shape)}, not {tuple(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        whose = "k" if cross else "q"
        raise _wrong(f"v must have {whose}'s rows and heads {tuple(k.shape[:2])}, not {tuple(v.shape)}")


def _check_settings(problem: Problem) -> None:
    activation, divisor, dropout = problem.activation, problem.divisor, problem.dropout
    if activation not in ("silu", "softmax"):
        raise _wrong(f"activation is 'silu' or 'softmax', not {activation!r}")
    if activation == "silu" and not divisor > 0:
        raise _wrong(f"divisor must be positive, not {divisor}")
    if not 0.0 <= dropout < 1.0:
        raise _wrong(f"dropout must be at least 0 and below 1, not {dropout}")
    if not 0 <= problem.dropout_key < 2**64:
        raise _wrong(f"dropout_key must be a 64-bit number of at least 0, not {problem.dropout_key}")


def _check_offsets(problem: Problem, device: torch.device) -> None:
    for name, offsets in (("offsets", problem.offsets), ("query_offsets", problem.query_offsets)):
        if offsets is None:
            continue
        if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
            raise _wrong(f"{name} must be (B + 1,) int64, not {tuple(offsets.shape)} {offsets.dtype}")
        _check_device(name, offsets, device)
        if offsets.shape != problem.offsets.shape:
            count = problem.offsets.shape[0]
            raise _wrong(f"{name} must have offsets' {count} entries, not {offsets.shape[0]}")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise _wrong(f"{name} is on {x.device}, but q is on {device}")


def _check_targets(mask: AttentionMask, sequences: int, device: torch.device) -> None:
    targets = mask.targets
    if targets is None:
        return
    if targets.dim() != 1 or targets.shape[0] != sequences or targets.dtype not in (torch.int64, torch.int32):
        raise _wrong(
            f"mask.targets must be ({sequences},) int64 or int32, one number a sequence, "
            f"not {tuple(targets.shape)} {targets.dtype}"
        )
    _check_device("mask.targets", targets, device)


def _check_order(order: Tensor | None, sequences: int, device: torch.device) -> None:
    if order is None:
        return
    if order.dim() != 1 or order.shape[0] != sequences or order.dtype != torch.int64:
        raise _wrong(f"order must be ({sequences},) int64, not {tuple(order.shape)} {order.dtype}")
    _check_device("order", order, device)


def _check_rows(problem: Problem, queries: int, keys: int) -> None:
    cross = problem.query_offsets
    lengths = _lengths("offsets", problem.offsets, keys, "q" if cross is None else "k")
    for sequence, length in enumerate(lengths):
        if length > problem.max_length:
            raise _wrong(f"sequence {sequence} has {length} rows, more than max_length {problem.max_length}")
    if cross is not None and problem.part is None:
        for sequence, (m, n) in enumerate(zip(_lengths("query_offsets", cross, queries, "q"), lengths)):
            if m > n:
                raise _wrong(f"sequence {sequence} has {m} query rows, but they are the last of its {n} rows")
    if problem.mask.targets is not None:
        for sequence, (t, n) in enumerate(zip(problem.mask.targets.tolist(), lengths)):
            if not 0 <= t <= n:
                raise _wrong(f"sequence {sequence} has {n} rows, of which {t} can't be targets")
    if problem.order is not None and sorted(problem.order.tolist()) != list(range(len(lengths))):
        raise _wrong(f"order must name each of the {len(lengths)} sequences once")


def _check_part(problem: Problem, q: Tensor) -> None:
    part, sequences = problem.part, problem.offsets.shape[0] - 1
    if part is None:
        return
    if not problem.mask.plain:
        raise _wrong("parts are for the causal and the full mask, without a window, contexts or targets")
    for name in ("query_starts", "key_starts", "first_rows"):
        x = getattr(part, name)
        if x.shape != (sequences,) or x.dtype != torch.int64:
            raise _wrong(
                f"part.{name} must be ({sequences},) int64, one number a sequence, not {tuple(x.shape)} {x.dtype}"
            )
        _check_device(f"part.{name}", x, q.device)
    if not values_are_at_hand(q):
        return
    for sequence, (query, key) in enumerate(zip(part.query_starts.tolist(), part.key_starts.tolist())):
        if key % 4:
            raise _wrong(f"sequence {sequence}'s keys begin at its row {key}, which 4 doesn't divide")
        if problem.mask.causal and query < key:
            raise _wrong(
                f"sequence {sequence}'s queries begin at its row {query}, before its keys at {key}: causal rows "
                "would see none"
            )


def _lengths(name: str, offsets: Tensor, rows: int, of: str) -> list[int]:
    edges = offsets.tolist()
    if edges[0] < 0 or edges[-1] > rows:
        raise _wrong(f"{name} go from {edges[0]} to {edges[-1]}, outside the {rows} rows of {of}")
    for sequence, (begin, end) in enumerate(zip(edges, edges[1:])):
        if end < begin:
            raise _wrong(f"{name} must not fall, but sequence {sequence} goes from row {begin} to {end}")
    return [end - begin for begin, end in zip(edges, edges[1:])]


def _check_bias(bias: RelativeBias, q: Tensor, k: Tensor, max_length: int, mask: AttentionMask) -> None:
    for name, table in (("bias.position", bias.position), ("bias.time", bias.time)):
        if table is None:
            continue
        if table.dim() != 1 or not table.is_floating_point():
            raise _wrong(f"{name} must be a floating vector, not {tuple(table.shape)} {table.dtype}")
        _check_device(name, table, q.device)
    if bias.position is not None:
        if not mask.causal:
            raise _wrong("bias.position is defined for causal attention only")
        if bias.position.shape[0] < max_length:
            entries = bias.position.shape[0]
            raise _wrong(f"bias.position has {entries} entries, fewer than max_length {max_length}")
    if bias.time is None:
        return
    if bias.time.shape[0] != bias.buckets.count:
        count = bias.buckets.count
        raise _wrong(f"bias.time must have {count} entries, one a bucket, not {bias.time.shape[0]}")
    sides = (("bias.query_times", bias.query_times, q), ("bias.key_times", bias.key_times, k))
    for name, times, x in sides:
        if times is None:
            raise _wrong(f"bias.time needs {name}")
        rows = x.shape[0]
        if times.dim() != 1 or times.shape[0] != rows or times.dtype != torch.int64:
            raise _wrong(f"{name} must be ({rows},) int64, not {tuple(times.shape)} {times.dtype}")
        _check_device(name, times, q.device)
