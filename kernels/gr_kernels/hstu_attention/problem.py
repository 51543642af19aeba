"""What one call of the attention is asked to compute, apart from q, k and v.

B sequences, T query rows and S key rows in the batch (the same rows but in the cross form), H heads, P entries of the
position table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gr_kernels.hstu_attention.buckets import TimeBuckets as TimeBuckets
from gr_kernels.hstu_attention.mask import AttentionMask as AttentionMask

Activation = Literal["silu", "softmax"]
# of q, k, v, bias.position and bias.time; None for an absent table
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
_PAPERS_BUCKETS = TimeBuckets()
_CAUSAL = AttentionMask()


@dataclass(frozen=True)
class RelativeBias:
    """The bias added to the scaled score of query row i and key j of a sequence, the same for every head.

    position:    (P,) floating; entry max(i - j, 0) is added (causal attention only); P must reach the longest
                 sequence.
    time:        (buckets.count,) floating; the entry of the bucket of |query_times[i] - key_times[j]| is added.
    query_times: (T,) int64; HSTU uses the time of the action to be predicted, t_{i+1}, for row i.
    key_times:   (S,) int64.
    Either table may be None; a time table comes with both times.
    """

    position: Tensor | None = None
    time: Tensor | None = None
    query_times: Tensor | None = None
    key_times: Tensor | None = None
    buckets: TimeBuckets = None  # type: ignore[assignment]  # TimeBuckets(), the paper's

    def __post_init__(self) -> None:
        if self.buckets is None:  # torch.compile traces this, and neither a factory nor an object as default
            object.__setattr__(self, "buckets", _PAPERS_BUCKETS)


_NO_BIAS = RelativeBias()


@dataclass(frozen=True, eq=False)
class AttentionPart:
    """Which stretch of its sequence a call has of each: parts.py.

    query_starts: (B,) int64, the place in its sequence of the first of a call's queries.
    key_starts:   (B,) int64, that of its first key, a multiple of 4 (dropout draws four keys at a time).
    first_rows:   (B,) int64, the number in the batch of the sequence's own first row, by which dropout counts.
    """

    query_starts: Tensor
    key_starts: Tensor
    first_rows: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an implementation needs beside q, k and v; the fields are hstu_attention()'s arguments."""

    offsets: Tensor  # (B + 1,) int64: the key rows of each sequence
    max_length: int
    divisor: float
    scale: float = 1.0
    activation: Activation = "silu"
    mask: AttentionMask = _CAUSAL
    bias: RelativeBias = _NO_BIAS
    dropout: float = 0.0
    dropout_key: int = 0
    # (B + 1,) int64: the query rows of each sequence, its last ones; None: all of them, the same rows as the keys
    query_offsets: Tensor | None = None
    # (B,) int64: the sequences as their work should start, e.g. longest first; any permutation gives the same results
    order: Tensor | None = None
    deterministic: bool = False  # equal calls give equal bits, gradients included
    # stretches of longer sequences, of queries and of keys; with query_offsets, and only in parts.py's two functions
    part: AttentionPart | None = None

    @property
    def drop_below(self) -> int:
        """A weight is kept when its 32-bit random word is at least this."""
        return math.ceil(self.dropout * 2**32)

    @property
    def keep_scale(self) -> float:
        """What a kept weight is multiplied by."""
        return 1.0 / (1.0 - self.dropout)
