"""Attention over sequences whose rows are shared by the processes of the context axis (gr/models/cut.py).

Each process attends with its own rows.  The keys and values of the others come by, one process's at a time, and are
not kept: the backward pass fetches them once more, and what it finds of their gradients goes home at once.  So a
process holds 1/C of everything that is as wide as the model, and never more than two others' keys and values.
What a row gets from each part adds up, for softmax by the log-sums (gr_kernels/hstu_attention/parts.py); places, times
and dropout are those of whole sequences, and so is the result, to rounding.

In step s of C process r deals with the rows of r - s, and r + s with those of r: nothing is handed on, and under the
causal mask a process gets only what its rows can see.  Everybody goes through the same steps, whatever it holds.

Gradients of the bias tables are those of this process's rows: a part of a sum, as those of all parameters are.

Shapes: T rows of this process, S rows of one stretch, P rows of another process, H heads, Q query/key width per head,
V value width per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.models.cut import Cut, Stretch
from gr.models.layout import JaggedLayout
from gr.processes import Axis
from gr_kernels.dispatch import preferred, preferring
from gr_kernels.hstu_attention import (
    AttentionMask,
    AttentionPart,
    AttentionProblem,
    RelativeBias,
    TimeBuckets,
    add_part,
    attend_part,
    attend_part_backward,
)
from gr_kernels.hstu_attention.problem import Activation


def shared_attention(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    layout: JaggedLayout,
    *,
    scale: float,
    divisor: float,
    activation: Activation,
    mask: AttentionMask,
    position: Tensor | None,
    time: Tensor | None,
    buckets: TimeBuckets | None,
    dropout: float,
    dropout_key: int,
) -> Tensor:
    """hstu_attention() of the whole sequences, this process's rows of it: (T, H, V).

    Every process of the axis calls this together.  mask: causal or full.
    """
    cut = layout.cut
    assert cut is not None
    whole = cut.whole
    problem = AttentionProblem(
        offsets=whole.offsets_B1,
        max_length=whole.max_length,
        divisor=divisor,
        scale=scale,
        activation=activation,
        mask=mask,
        bias=RelativeBias(buckets=buckets),  # type: ignore[arg-type]
        dropout=dropout,
        dropout_key=dropout_key,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    times_T = None if time is None else layout.query_times_T
    return _Attention.apply(q_THQ, k_THQ, v_THV, position, time, _Work(cut, problem, times_T))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Work:
    """What there is to do beside the numbers.  problem: of the whole sequences, without tables and times."""

    cut: Cut
    problem: AttentionProblem
    query_times_T: Tensor | None

    def wanted(self, rank: int, by: int) -> int:
        """Rows of process ``rank`` that process ``by`` can see something of: the first so many, all or one stretch."""
        first, second = self.cut.held_by(rank)
        return first.rows + (second.rows if self._sees(by, rank, 1) else 0)

    def _sees(self, rank: int, other: int, half: int) -> bool:
        """Whether any row of process ``rank`` may see keys of a stretch of ``other``."""
        return (
            not self.problem.mask.causal or self.cut.numbers_of(rank)[1] >= self.cut.numbers_of(other)[half]
        )

    def pairs(
        self, other: int, position: Tensor | None, time: Tensor | None
    ) -> Iterator[tuple[slice, slice, AttentionProblem]]:
        """Stretches of this process and of ``other`` that see something of each other: which rows of this process's,
        which of the other's, and the call."""
        for queries, number, rows_T in self._stretches(self.cut.axis.rank):
            for keys, key_number, rows_P in self._stretches(other):
                seen = not self.problem.mask.causal or number >= key_number
                if seen and queries.rows and keys.rows:
                    times_S = None if self.query_times_T is None else self.query_times_T[rows_T]
                    key_times_S = None if times_S is None else self.cut.key_times[key_number]
                    bias = RelativeBias(position, time, times_S, key_times_S, self.problem.bias.buckets)
                    yield rows_T, rows_P, self._call(queries, keys, bias)

    def _stretches(self, rank: int) -> Iterator[tuple[Stretch, int, slice]]:
        begin = 0
        for number in self.cut.numbers_of(rank):
            stretch = self.cut.stretches[number]
            yield stretch, number, slice(begin, begin + stretch.rows)
            begin += stretch.rows

    def _call(self, queries: Stretch, keys: Stretch, bias: RelativeBias) -> AttentionProblem:
        return replace(
            self.problem,
            offsets=keys.offsets_B1,
            query_offsets=queries.offsets_B1,
            bias=bias,
            part=AttentionPart(queries.starts_B, keys.starts_B, self.cut.whole.offsets_B1[:-1]),
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        work: _Work,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        softmax = work.problem.activation == "softmax"
        out_THV = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=wide)
        lse_HT = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide) if softmax else None
        with _plain(q):
            for other, k_PHQ, v_PHV in _passing(k, v, work):
                for rows, keys, problem in work.pairs(other, position, time):
                    part = attend_part(q[rows], k_PHQ[keys], v_PHV[keys], problem)
                    so_far = (out_THV[rows], None if lse_HT is None else lse_HT[:, rows])
                    out_rows, lse_rows = add_part(so_far, part)
                    out_THV[rows] = out_rows
                    if lse_HT is not None and lse_rows is not None:
                        lse_HT[:, rows] = lse_rows
        out = out_THV.to(q.dtype)
        ctx.save_for_backward(q, k, v, position, time, *((out, lse_HT) if softmax else (None, None)))
        ctx.work, ctx.kernels = work, preferred()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, position, time, out, lse = ctx.saved_tensors
        work: _Work = ctx.work
        wide = torch.promote_types(q.dtype, torch.float32)
        d_out = d_out.contiguous()
        d_q = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
        d_kv = q.new_zeros((k.shape[0], k.shape[1] * (k.shape[2] + v.shape[2])), dtype=wide)
        d_tables = [None if table is None else torch.zeros_like(table) for table in (position, time)]
        homecoming: Callable[[], None] = _nothing
        with _plain(q), preferring(ctx.kernels):
            for other, k_PHQ, v_PHV in _passing(k, v, work):
                own = other == work.cut.axis.rank
                d_kv_P = d_kv if own else d_kv.new_zeros((k_PHQ.shape[0], d_kv.shape[1]))
                d_k_PHQ, d_v_PHV = _apart(d_kv_P, k, v)
                for rows, keys, problem in work.pairs(other, position, time):
                    out_rows = None if out is None else out[rows]
                    lse_rows = None if lse is None else lse[:, rows].contiguous()
                    found = attend_part_backward(
                        d_out[rows], out_rows, lse_rows, q[rows], k_PHQ[keys], v_PHV[keys], problem
                    )
                    d_q[rows] += found[0]
                    d_k_PHQ[keys] += found[1]
                    d_v_PHV[keys] += found[2]
                    for sums, gradient in zip(d_tables, found[3:], strict=True):
                        if sums is not None and gradient is not None:
                            sums += gradient
                homecoming()
                homecoming = _nothing if own else _send_home(d_kv_P, d_kv, other, work)
            homecoming()
        d_k, d_v = _apart(d_kv, k, v)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *d_tables, None


def _passing(k_THQ: Tensor, v_THV: Tensor, work: _Work) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(process, its keys, its values), this one's first; of the others what this one's rows can see.  The next ones
    travel while the caller computes."""
    axis = work.cut.axis
    kv = _beside(k_THQ, v_THV)
    coming = _fetch(kv, 1, work)
    yield axis.rank, k_THQ, v_THV
    for step in range(1, axis.size):
        other, kv_P, arrived = coming
        arrived()
        if step + 1 < axis.size:
            coming = _fetch(kv, step + 1, work)
        yield other, *_apart(kv_P, k_THQ, v_THV)


def _fetch(kv: Tensor, step: int, work: _Work) -> tuple[int, Tensor, Callable[[], None]]:
    """Begin to exchange this process's keys and values with those of ``step`` before it, for the one as far behind it:
    (process, its rows, what waits for them)."""
    axis = work.cut.axis
    source, reader = (axis.rank - step) % axis.size, (axis.rank + step) % axis.size
    kv_P = kv.new_empty((work.wanted(source, axis.rank), kv.shape[1]))
    return source, kv_P, _exchange(axis, kv[: work.wanted(axis.rank, reader)], reader, kv_P, source)


def _send_home(d_kv_P: Tensor, d_kv: Tensor, other: int, work: _Work) -> Callable[[], None]:
    """Begin to send the gradients of ``other``'s keys and values, and to receive those that somebody found for this
    process's; what waits for these, and adds them up."""
    axis = work.cut.axis
    finder = (2 * axis.rank - other) % axis.size  # as far behind this process as ``other`` is before it
    found = d_kv.new_empty((work.wanted(axis.rank, finder), d_kv.shape[1]))
    arrived = _exchange(axis, d_kv_P, other, found, finder)

    def add_up() -> None:
        arrived()
        d_kv[: found.shape[0]] += found

    return add_up


def _exchange(axis: Axis, sent: Tensor, to: int, received: Tensor, source: int) -> Callable[[], None]:
    """Begin to send and to receive rows, contiguous; what waits for both.  Both sides know how many there are, and
    nothing is sent where there are none."""
    operations = []
    if sent.numel():
        operations.append(dist.P2POp(dist.isend, sent, group=axis.group, group_peer=to))
    if received.numel():
        operations.append(dist.P2POp(dist.irecv, received, group=axis.group, group_peer=source))
    works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> None:
        for work in works:
            work.wait()
        operations.clear()  # which kept the rows until now

    return wait


def _nothing() -> None:
    """Nobody to wait for."""


def _beside(k_THQ: Tensor, v_THV: Tensor) -> Tensor:
    """(T, H (Q + V)): each row's keys, then its values, contiguous."""
    return torch.cat([k_THQ.flatten(1), v_THV.flatten(1)], dim=1)


def _apart(kv: Tensor, k_THQ: Tensor, v_THV: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and the values in what ``_beside`` made, as views."""
    keys = k_THQ.shape[1] * k_THQ.shape[2]
    return kv[:, :keys].unflatten(1, k_THQ.shape[1:]), kv[:, keys:].unflatten(1, v_THV.shape[1:])


def _plain(x: Tensor) -> torch.autocast:
    """The numbers' own precision: those of autocast were chosen where they were made."""
    return torch.autocast(x.device.type, enabled=False)
