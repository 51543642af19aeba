"""The attention in parts: some stretches of the queries of every sequence against some stretches of its keys.

Rows attend to all keys of their sequence when they have met every part of them, wherever those were. SiLU's outputs
add up; softmax's are means, weighted by their sums of exponentials: with lse = log sum_p exp(lse_p),

    out = sum_p exp(lse_p - lse) out_p

(`add_part`). Mask, bias and dropout are those of the whole sequence. Both functions compute and no more: who calls
them keeps what the backward pass wants, q, k, v and for softmax the whole rows' out and lse.

B sequences, T query and S key rows in the call, H heads, Q query/key width, V value width.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from gr_kernels.dispatch import Implementation, choose, takes_all
from gr_kernels.hstu_attention import blocked, reference, triton_op
from gr_kernels.hstu_attention.checks import check
from gr_kernels.hstu_attention.problem import Gradients, Problem
from gr_kernels.hstu_attention.schema import Backward, Forward
from gr_kernels.operators import define
from gr_kernels.tracing import on_paper_now, once, with_numbers


class _Both:
    """The two passes of an implementation."""

    def __init__(self, forward: Forward, backward: Backward) -> None:
        self.forward, self.backward = forward, backward


def pairs(problem: Problem) -> int:
    """How many pairs of a row and a key that it sees there are in a call, causal or full."""
    assert problem.part is not None and problem.query_offsets is not None
    n_B, m_B = problem.offsets.diff(), problem.query_offsets.diff()
    if not problem.mask.causal:
        return int((n_B * m_B).sum())
    first_B = problem.part.query_starts - problem.part.key_starts + 1  # keys that the first row sees
    fewer_B = (n_B - first_B).clamp_min(0).minimum(m_B)  # rows that don't see all of them
    return int((fewer_B * first_B + fewer_B * (fewer_B - 1) // 2 + (m_B - fewer_B) * n_B).sum())


def _forward_on_paper(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    _define_on_paper()
    with with_numbers():
        count = pairs(problem)
    out, lse = torch.ops.gr_kernels.hstu_attention_part(q, k, v, count)
    return out, lse if problem.activation == "softmax" else None


def _backward_on_paper(
    d_out: Tensor, out: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, problem: Problem
) -> Gradients:
    _define_on_paper()
    with with_numbers():
        count = pairs(problem)
    d_q, d_k, d_v = torch.ops.gr_kernels.hstu_attention_part_backward(d_out, q, k, v, count)
    d_tables = (
        None if x is None else torch.empty_like(x) for x in (problem.bias.position, problem.bias.time)
    )
    return d_q, d_k, d_v, *d_tables  # type: ignore[return-value]


def _only_on_paper(*arguments: object) -> NoReturn:
    raise TypeError("gr_kernels::hstu_attention_part is for plans: attend_part computes")


@once
def _define_on_paper() -> None:
    """What a plan sees in the place of a kernel that no tensor without numbers can be given to."""

    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(
            (q.shape[1], q.shape[0]), dtype=torch.float32
        )

    def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in (q, k, v))

    rows = "Tensor q, Tensor k, Tensor v, int pairs"
    define("hstu_attention_part", f"({rows}) -> (Tensor, Tensor)", _only_on_paper, forward)
    outputs = "(Tensor, Tensor, Tensor)"
    define("hstu_attention_part_backward", f"(Tensor d_out, {rows}) -> {outputs}", _only_on_paper, backward)


_ON_PAPER = _Both(_forward_on_paper, _backward_on_paper)

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        triton_op.obstacle,
        _Both(triton_op.forward, triton_op.backward),
        "tiles on the GPU's tensor cores",
        device="cuda",
    ),
    Implementation(
        "blocked",
        takes_all,
        _Both(blocked.forward, blocked.backward),
        "plain PyTorch in blocks, any device and precision",
    ),
    Implementation(
        "reference",
        takes_all,
        _Both(reference.part_forward, reference.part_backward),
        "the definition, every score of a sequence at once",
    ),
)


def attend_part(
    q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: Problem, implementation: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """What rows get from the keys of this call: (out, lse).

    out: (T, H, V) in q's dtype, zero for a row whose sequence has no key here. lse: for softmax (H, T), float32
    (float64 for that), the log of each row's sum of exponentials over these keys, -inf over none; for silu None.

    problem: with `part` and `query_offsets`, under the causal or the full mask. Its max_length is the whole sequences',
    and its `offsets` the keys' of this call. Under the causal mask no sequence's queries begin before its keys.
    implementation: "auto", "triton", "blocked" or "reference". Raises ValueError, one sentence.
    """
    return _both(q_THQ, k_SHQ, v_SHV, problem, implementation).forward(q_THQ, k_SHQ, v_SHV, problem)


def attend_part_backward(
    d_out_THV: Tensor,
    out_THV: Tensor | None,
    lse_HT: Tensor | None,
    q_THQ: Tensor,
    k_SHQ: Tensor,
    v_SHV: Tensor,
    problem: Problem,
    implementation: str = "auto",
) -> Gradients:
    """What the pairs of rows and keys of this call add to the gradients of q, k, v and the bias tables (None: absent).

    d_out: of the whole rows. out, lse: softmax's of the whole rows, all their keys; with silu None.
    """
    both = _both(q_THQ, k_SHQ, v_SHV, problem, implementation)
    return both.backward(d_out_THV.contiguous(), out_THV, lse_HT, q_THQ, k_SHQ, v_SHV, problem)


def add_part(
    sums: tuple[Tensor, Tensor | None], part: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of rows over the keys so far and over one part more, as attend_part returns them; in sums' dtype."""
    (out, lse), (more, more_lse) = sums, part
    if lse is None or more_lse is None:
        return out + more, None
    both = torch.logaddexp(lse, more_lse)
    least = both.clamp_min(torch.finfo(both.dtype).min)  # nothing seen so far: no -inf - -inf
    shares = ((x - least).exp().transpose(0, 1)[..., None].to(out.dtype) for x in (lse, more_lse))
    return out * next(shares) + more * next(shares), both


def _both(q: Tensor, k: Tensor, v: Tensor, problem: Problem, implementation: str) -> _Both:
    if problem.part is None or problem.query_offsets is None:
        raise ValueError("attend_part: the problem needs part and query_offsets.")
    check(q, k, v, problem)
    choice = choose("attend_part", IMPLEMENTATIONS, q.device, (q, k, v, problem), implementation)
    if on_paper_now() and choice.implementation.device:  # plain PyTorch runs there, too
        return _ON_PAPER
    return choice.implementation.run  # type: ignore[no-any-return]
