"""The attention operator: checks a call, picks an implementation, runs it.

B sequences, T rows in the batch (sum of lengths), H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gr_kernels.hstu_attention import cpp, reference
from gr_kernels.hstu_attention.checks import check
from gr_kernels.hstu_attention.problem import (
    Activation,
    AttentionMask,
    AttentionProblem,
    RelativeBias,
)


@dataclass(frozen=True)
class Implementation:
    """One way to compute the attention. `obstacle` says in a few words why it can't take a call, "" when it can."""

    name: str
    obstacle: Callable[[Tensor, Tensor, Tensor, AttentionProblem], str]
    run: Callable[[Tensor, Tensor, Tensor, AttentionProblem], Tensor]
    merit: str


# In order of preference; "auto" takes the first without an obstacle. A new kernel is one line here.
IMPLEMENTATIONS = (
    Implementation("cpp", cpp.obstacle, cpp.attention, "compiled, float32 on CPU"),
    Implementation(
        "reference", reference.obstacle, reference.attention, "plain PyTorch, any device and precision"
    ),
)


def hstu_attention(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    offsets_B1: Tensor,
    *,
    max_length: int,
    scale: float = 1.0,
    divisor: float,
    activation: Activation = "silu",
    mask: AttentionMask = AttentionMask(),
    bias: RelativeBias | None = None,
    dropout: float = 0.0,
    dropout_key: int = 0,
    implementation: str = "auto",
) -> Tensor:
    """Attention of every row over the keys of its own sequence, for sequences stored end to end.

    For head h, row i and key j of one sequence, s_ij = scale q_i · k_j + bias_ij, and
        silu:    A_ij = SiLU(s_ij) / divisor  (pointwise; HSTU, Zhai et al., ICML 2024, eq. 2)
        softmax: A_ij = exp(s_ij) / sum_j exp(s_ij)
    over the keys the mask allows; the output is sum_j A_ij v_j.

    Args:
        q_THQ, k_THQ: queries and keys, floating, any row and head stride (slices of one projection aren't copied).
        v_THV: values; V may differ from Q.
        offsets_B1: (B + 1,) int64, ascending: sequence b is rows offsets[b] to offsets[b + 1]. Rows outside every
            sequence are not read, and their outputs and gradients are zero.
        max_length: no sequence is longer than this.
        scale: multiplies q · k.
        divisor: divides SiLU's weights (HSTU: the longest length of the model); ignored by softmax.
        activation: "silu" or "softmax".
        mask: which keys a row sees.
        bias: relative position and time bias; its tables get gradients.
        dropout: probability with which a weight A_ij is zeroed (the others are divided by 1 - dropout), as a pure
            function of (dropout_key, row of the batch, head, j): pass another key at every step and layer.
        dropout_key: 64-bit.
        implementation: "auto", or the name of one ("cpp", "reference").

    Returns:
        (T, H, V) in q's dtype, contiguous. Nothing of the size of the scores is kept for the backward pass.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run.
    """
    problem = AttentionProblem(
        offsets=offsets_B1,
        max_length=max_length,
        divisor=divisor,
        scale=scale,
        activation=activation,
        mask=mask,
        bias=bias or RelativeBias(),
        dropout=dropout,
        dropout_key=dropout_key,
    )
    check(q_THQ, k_THQ, v_THV, problem)
    chosen, _ = _choose(q_THQ, k_THQ, v_THV, problem, implementation)
    return chosen.run(q_THQ, k_THQ, v_THV, problem)


def explain(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    offsets_B1: Tensor,
    *,
    implementation: str = "auto",
    bias: RelativeBias | None = None,
    **settings: Any,
) -> str:
    """Which implementation hstu_attention() would run for the same arguments, and why: one line."""
    problem = AttentionProblem(offsets=offsets_B1, bias=bias or RelativeBias(), **settings)
    check(q_THQ, k_THQ, v_THV, problem)
    chosen, passed_over = _choose(q_THQ, k_THQ, v_THV, problem, implementation)
    reasons = [f"{name} can't: {obstacle}" for name, obstacle in passed_over]
    return "; ".join([f"{chosen.name} ({chosen.merit})", *reasons])


def _choose(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, name: str
) -> tuple[Implementation, list[tuple[str, str]]]:
    """The implementation to run, and those preferred to it with their obstacles."""
    passed_over: list[tuple[str, str]] = []
    for candidate in IMPLEMENTATIONS:
        if name not in ("auto", candidate.name):
            continue
        obstacle = candidate.obstacle(q, k, v, problem)
        if not obstacle:
            return candidate, passed_over
        if name == candidate.name:
            raise ValueError(f"hstu_attention: implementation {name!r} can't run here: {obstacle}.")
        passed_over.append((candidate.name, obstacle))
    names = ", ".join(repr(candidate.name) for candidate in IMPLEMENTATIONS)
    raise ValueError(f"hstu_attention: implementation must be 'auto' or one of {names}, not {name!r}.")
