"""Keys and values of a history, kept, so that many candidates are scored against it (M-FALCON's arithmetic: Zhai et
al., arXiv 2402.17152, section 3.4 and appendix H).

An encoder whose rows meet in attention alone computes a history once; a :class:`Memory` keeps what each of its
attentions was given.  Then come the candidates, some at a time: each stands where the next row of its sequence would,
sees the history (or as much of it as there was at its request: a sequence has any number of those) and itself, and no
other candidate.  That is the attention's cross form under its mask of targets, where it has no bias by position: that
would tell candidates apart by the places that they have beside each other.  All of a sequence's candidates have one
place, so their bias is a number for each key, which goes into the product as one more coordinate:
scale (q . k) + b = scale ([q, 1] . [k, b / scale]).  All of it is differentiable.

Nothing else of the encoder knows of it: a layout with a memory is a layout.

Shapes: B sequences, R requests, T rows of the history, C candidates, H heads, Q query/key width per head, V value width
per head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.models.layout import JaggedLayout, sequence_of_rows
from gr_kernels.hstu_attention import AttentionMask, RelativeBias, TimeBuckets, hstu_attention
from gr_kernels.hstu_attention.problem import Activation


@dataclass
class Memory:
    """What the attentions of an encoder were given for a history, in the order in which they were called.

    offsets_B1, lengths, times_T: of the history's rows.  ``asked``: None while it is computed; then the next call of an
    attention finds what the same one was given."""

    offsets_B1: Tensor
    lengths: tuple[int, ...]
    times_T: Tensor | None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    asked: Asked | None = None

    def layout_of(
        self, counts: tuple[int, ...], times_C: Tensor | None, seen: Seen | None = None, dropout_key: int = 0
    ) -> JaggedLayout:
        """A layout of ``counts`` candidates of each request, at ``times_C``, with which the encoder may be called.
        seen: of the histories, by each request; without it there is one a sequence, which sees all of its."""
        device = self.offsets_B1.device
        if seen is None:
            seen = Seen(torch.arange(len(counts), device=device), self.offsets_B1.diff(), self.lengths)
        offsets_R1 = torch.tensor([0, *counts], device=device).cumsum(0)
        asking = replace(self, kept=list(self.kept), asked=Asked.of(self, seen, offsets_R1, counts))
        longest = max(counts, default=0)
        return JaggedLayout(offsets_R1, counts, longest, times_C, times_C, dropout_key, memory=asking)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        *,
        scale: float,
        divisor: float,
        activation: Activation,
        position: Tensor | None,
        time: Tensor | None,
        buckets: TimeBuckets | None,
    ) -> Tensor:
        """As gr.models.attention.attention, causal and without dropout: of the history, whose keys and values are kept,
        or of candidates."""
        settings = {"scale": scale, "divisor": divisor, "activation": activation}
        if self.asked is None:
            self.kept.append((k, v))
            bias = RelativeBias(position, time, layout.query_times_T, layout.key_times_T, buckets)  # type: ignore[arg-type]
            return hstu_attention(
                q,
                k,
                v,
                layout.offsets_B1,
                max_length=layout.max_length,
                bias=bias,
                **settings,  # type: ignore[arg-type]
            )
        asked = self.asked
        k_kept, v_kept = self.kept.pop(0)
        keys, values = (
            torch.cat([old, new]).index_select(0, asked.order_K) for old, new in ((k_kept, k), (v_kept, v))
        )
        if position is not None:
            b = (position[asked.ahead_K] / scale).to(keys.dtype)
            keys = torch.cat([keys, b[:, None, None].expand(-1, keys.shape[1], 1)], dim=2)
            q = torch.cat([q, torch.ones_like(q[:, :, :1])], dim=2)
        key_times = None
        if time is not None:
            assert self.times_T is not None and layout.key_times_T is not None
            key_times = torch.cat([self.times_T, layout.key_times_T])[asked.order_K]
        return hstu_attention(
            q,
            keys,
            values,
            asked.key_offsets_R1,
            max_length=asked.longest,
            mask=AttentionMask(targets=asked.counts_R),
            bias=RelativeBias(None, time, layout.query_times_T, key_times, buckets),  # type: ignore[arg-type]
            query_offsets=layout.offsets_B1,
            **settings,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Seen:
    """What requests see: of the sequence ``owners_R`` the first ``rows_R`` rows (int64), ``lengths`` as Python
    integers."""

    owners_R: Tensor
    rows_R: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """How rows of history and candidates are put together: of each request what it sees, then its candidates.  K rows.

    order_K: int64, where each comes from among all of history, then all candidates.  ahead_K: int64, how far before the
    candidates' place a key stands, 0 for theirs."""

    order_K: Tensor
    key_offsets_R1: Tensor
    counts_R: Tensor
    ahead_K: Tensor
    longest: int

    @staticmethod
    def of(memory: Memory, seen: Seen, offsets_R1: Tensor, counts: tuple[int, ...]) -> Asked:
        key_offsets_R1 = F.pad(seen.rows_R.cumsum(0), (1, 0)) + offsets_R1
        request_K = sequence_of_rows(key_offsets_R1, sum(seen.lengths) + sum(counts))
        local_K = torch.arange(len(request_K), device=request_K.device) - key_offsets_R1[request_K]
        seen_K = seen.rows_R[request_K]
        old_K = memory.offsets_B1[seen.owners_R[request_K]] + local_K
        new_K = sum(memory.lengths) + offsets_R1[request_K] + local_K - seen_K
        return Asked(
            order_K=torch.where(local_K < seen_K, old_K, new_K),
            key_offsets_R1=key_offsets_R1,
            counts_R=offsets_R1.diff(),
            ahead_K=(seen_K - local_K).clamp_min(0),
            longest=max((n + c for n, c in zip(seen.lengths, counts, strict=True)), default=0),
        )
