"""Attention over sequences whose rows are shared by the processes of the context axis (gr/models/cut.py).

Each process attends with its own rows.  The keys and values of the others come by, a piece of a stretch at a time, and
are not kept: the backward pass fetches them once more, and what it finds of their gradients goes home at once.  So a
process holds 1/C of everything that is as wide as the model, and a few pieces.
What a row gets from each part adds up, for softmax by the log-sums (gr_kernels/hstu_attention/parts.py); places, times
and dropout are those of whole sequences, and so is the result, to rounding.

In step s of C process r deals with the rows of r - s, and r + s with those of r: nothing is handed on, and under the
causal mask a process gets only what its rows can see.  Everybody goes through the same steps, as many pieces in each,
whatever it holds: so both ends of a pair know which rows come next.

Gradients of the bias tables are those of this process's rows: a part of a sum, as those of all parameters are.

Shapes: T rows of this process, S rows of one stretch, P rows of a piece, H heads, Q query/key width per head, V value
width per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gr.config import RunConfig
from gr.errors import UserError
from gr.models.cut import QUAD, Cut, Stretch
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
from gr_kernels.tracing import with_numbers

if TYPE_CHECKING:
    from gr.models.model import Model

PIECE = 1024  # rows that travel at a time, of which a process holds a handful of copies


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


def check_shareable(model: Model, config: RunConfig) -> None:
    """Refuse to share sequences that can't be (UserError)."""
    context, rows = config.train.context, config.data.max_length
    if context == 1:
        return
    objective = config.objective
    if objective is not None and objective.component().reads_sequences(objective):  # type: ignore[attr-defined]
        raise UserError(
            f"train.context is {context}, and objective {objective.name} with outside=sequence looks at whole "
            "sequences: use train.context=1, or outside=target",
            everywhere=True,
        )
    if not model.cuttable:
        encoder = getattr(config.model, "encoder", None)
        if encoder is None:
            raise UserError(
                f"train.context is {context}, and model {config.model.name} reads no sequence that processes could "
                "share: use train.context=1",
                everywhere=True,
            )
        raise UserError(
            f"train.context is {context}, and model.encoder {encoder.name} reads a sequence row after "
            "row, which no two processes can share: use train.context=1, or an encoder with attention",
            everywhere=True,
        )
    if context > rows:
        raise UserError(
            f"train.context is {context}, and a sequence has {rows} rows at most (data.max_length): some of the "
            "processes that share one would have none, so lower train.context",
            everywhere=True,
        )
    if model.vocabularies:
        raise UserError(
            f"train.context is {context}, and model.input.features has an open vocabulary, which would count the ids "
            "of a shared sequence once a process: use train.context=1, or columns whose values are rows",
            everywhere=True,
        )
    engine = config.train.engine.component()
    if not engine.shares_sequences:
        raise UserError(
            f"train.context is {context}, and train.engine {config.train.engine.name} has only been tried with whole "
            "sequences: use train.engine=ddp (or all_reduce), or train.context=1",
            everywhere=True,
        )


@dataclass(frozen=True)
class _Piece:
    """Some rows of process ``rank``: ``within`` one of its two stretches, which ``half`` counts, and as it ``holds``
    them among all of its rows."""

    rank: int
    half: int
    within: slice
    holds: slice

    @property
    def rows(self) -> int:
        """P."""
        return self.within.stop - self.within.start


_Exchanged = tuple[int, _Piece | None, int, _Piece | None]
"""(reader, the piece that it gets of this process's, source, the piece that comes from it)."""


@dataclass(frozen=True)
class _Work:
    """What there is to do beside the numbers.  problem: of the whole sequences, without tables and times."""

    cut: Cut
    problem: AttentionProblem
    query_times_T: Tensor | None

    def own(self) -> list[_Piece]:
        """This process's rows, for itself: each stretch is one piece."""
        return list(self._pieces(self.cut.axis.rank, whole=True))

    def wanted(self, rank: int, by: int) -> list[_Piece]:
        """The pieces of process ``rank`` that process ``by`` can see something of."""
        last = self.cut.numbers_of(by)[1]
        return [
            piece
            for piece in self._pieces(rank)
            if not self.problem.mask.causal or last >= self.cut.numbers_of(rank)[piece.half]
        ]

    def exchanges(self) -> list[_Exchanged]:
        """What there is to exchange, in order."""
        rank, size = self.cut.axis.rank, self.cut.axis.size
        found = []
        for step in range(1, size):
            most = max(len(self.wanted(other, (other + step) % size)) for other in range(size))
            reader, source = (rank + step) % size, (rank - step) % size
            sent, received = self.wanted(rank, reader), self.wanted(source, rank)
            for number in range(most):
                out, back = (some[number] if number < len(some) else None for some in (sent, received))
                found.append((reader, out, source, back))
        return found

    def calls(
        self, piece: _Piece, position: Tensor | None, time: Tensor | None
    ) -> Iterator[tuple[slice, AttentionProblem]]:
        """Which rows of this process's see something of a piece, a stretch at a time, and the attention's call."""
        key_number = self.cut.numbers_of(piece.rank)[piece.half]
        keys = self.cut.stretches[key_number]
        for queries, number, rows_T in self._stretches(self.cut.axis.rank):
            seen = not self.problem.mask.causal or number >= key_number
            if not seen or not queries.rows:
                continue
            with with_numbers():
                times_S = None if self.query_times_T is None else self.query_times_T[rows_T]
                key_times_S = None if times_S is None else self.cut.key_times[key_number]
                key_times_P = None if key_times_S is None else key_times_S[piece.within]
                bias = RelativeBias(position, time, times_S, key_times_P, self.problem.bias.buckets)
                problem = self._call(queries, keys, piece.within, bias)
            yield rows_T, problem

    def _pieces(self, rank: int, whole: bool = False) -> Iterator[_Piece]:
        for half, (stretch, _, rows) in enumerate(self._stretches(rank)):
            edges = [0, stretch.rows] if whole else _edges(stretch.lengths, PIECE)
            for begin, end in pairwise(edges):
                if begin < end:
                    held = slice(rows.start + begin, rows.start + end)
                    yield _Piece(rank, half, slice(begin, end), held)

    def _stretches(self, rank: int) -> Iterator[tuple[Stretch, int, slice]]:
        begin = 0
        for number in self.cut.numbers_of(rank):
            stretch = self.cut.stretches[number]
            yield stretch, number, slice(begin, begin + stretch.rows)
            begin += stretch.rows

    def _call(self, queries: Stretch, keys: Stretch, within: slice, bias: RelativeBias) -> AttentionProblem:
        """within: which rows of the stretch of keys there are."""
        offsets_B1 = keys.offsets_B1.clamp(within.start, within.stop)
        starts_B = keys.starts_B + (offsets_B1[:-1] - keys.offsets_B1[:-1]).clamp_min(0)
        # a sequence that ended before is empty here, wherever it is said to begin
        starts_B = torch.where(offsets_B1.diff() > 0, starts_B, keys.starts_B)
        return replace(
            self.problem,
            offsets=offsets_B1 - within.start,
            query_offsets=queries.offsets_B1,
            bias=bias,
            part=AttentionPart(queries.starts_B, starts_B, self.cut.whole.offsets_B1[:-1]),
        )


@lru_cache(maxsize=256)
def _edges(lengths: tuple[int, ...], most: int) -> list[int]:
    """Where to cut a stretch of sequences into pieces of at most so many rows: a multiple of four rows behind where a
    sequence begins."""
    edges, begin = [0], 0
    for length in lengths:
        while begin + length - edges[-1] > most:
            edges.append(begin + (edges[-1] + most - begin) // QUAD * QUAD)
        begin += length
    return [*edges, begin]


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
            for piece, k_PHQ, v_PHV, _ in _passing(k, v, work):
                for rows, problem in work.calls(piece, position, time) if piece else ():
                    part = attend_part(q[rows], k_PHQ, v_PHV, problem)
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
            for piece, k_PHQ, v_PHV, exchanged in _passing(k, v, work):
                if piece is not None and exchanged is None:
                    d_kv_P = d_kv[piece.holds]
                else:
                    d_kv_P = d_kv.new_zeros((0 if piece is None else piece.rows, d_kv.shape[1]))
                d_k_PHQ, d_v_PHV = _apart(d_kv_P, k, v)
                for rows, problem in work.calls(piece, position, time) if piece else ():
                    out_rows = None if out is None else out[rows]
                    lse_rows = None if lse is None else lse[:, rows].contiguous()
                    found = attend_part_backward(
                        d_out[rows], out_rows, lse_rows, q[rows], k_PHQ, v_PHV, problem
                    )
                    d_q[rows] += found[0]
                    d_k_PHQ += found[1]
                    d_v_PHV += found[2]
                    for sums, gradient in zip(d_tables, found[3:], strict=True):
                        if sums is not None and gradient is not None:
                            sums += gradient
                homecoming()
                homecoming = _nothing
                if exchanged is not None:
                    homecoming = _send_home(d_kv_P, d_kv, exchanged, work.cut.axis)
            homecoming()
        d_k, d_v = _apart(d_kv, k, v)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *d_tables, None


def _passing(
    k_THQ: Tensor, v_THV: Tensor, work: _Work
) -> Iterator[tuple[_Piece | None, Tensor, Tensor, _Exchanged | None]]:
    """(piece, its keys, its values, what was exchanged): first this process's own, which nobody exchanged, then those
    of the others, None where nothing is left to come.  The next one travels while the caller computes."""
    exchanges = work.exchanges()
    coming = _fetch(k_THQ, v_THV, exchanges[0], work.cut.axis) if exchanges else None
    for piece in work.own():
        yield piece, k_THQ[piece.holds], v_THV[piece.holds], None
    for number, exchanged in enumerate(exchanges):
        assert coming is not None
        kv_P, arrived = coming
        arrived()
        if number + 1 < len(exchanges):
            coming = _fetch(k_THQ, v_THV, exchanges[number + 1], work.cut.axis)
        yield exchanged[3], *_apart(kv_P, k_THQ, v_THV), exchanged


def _fetch(
    k_THQ: Tensor, v_THV: Tensor, exchanged: _Exchanged, axis: Axis
) -> tuple[Tensor, Callable[[], None]]:
    """Begin an exchange of keys and values: (those that come, what waits for them)."""
    reader, out, source, back = exchanged
    rows = slice(0, 0) if out is None else out.holds
    kv = torch.cat([k_THQ[rows].flatten(1), v_THV[rows].flatten(1)], dim=1)
    kv_P = kv.new_empty((0 if back is None else back.rows, kv.shape[1]))
    return kv_P, axis.swap(kv, reader, kv_P, source)


def _send_home(d_kv_P: Tensor, d_kv: Tensor, exchanged: _Exchanged, axis: Axis) -> Callable[[], None]:
    """Begin to send the gradients of the piece that came, and to receive those of the one that was sent; what waits
    for these, and adds them up."""
    reader, out, source, _ = exchanged
    found = d_kv.new_empty((0 if out is None else out.rows, d_kv.shape[1]))
    arrived = axis.swap(d_kv_P, source, found, reader)

    def add_up() -> None:
        arrived()
        if out is not None:
            d_kv[out.holds] += found

    return add_up


def _nothing() -> None:
    """Nobody to wait for."""


def _apart(kv: Tensor, k_THQ: Tensor, v_THV: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and the values in rows that have both side by side, as views."""
    keys = k_THQ.shape[1] * k_THQ.shape[2]
    return kv[:, :keys].unflatten(1, k_THQ.shape[1:]), kv[:, keys:].unflatten(1, v_THV.shape[1:])


def _plain(x: Tensor) -> torch.autocast:
    """The numbers' own precision: those of autocast were chosen where they were made."""
    return torch.autocast(x.device.type, enabled=False)
