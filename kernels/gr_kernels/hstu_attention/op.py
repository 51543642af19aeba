"""The attention operator: checks a call, picks an implementation, runs it.

B sequences, T rows in the batch (sum of lengths), H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gr_kernels.hstu_attention import cpp, reference
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
    Implementation("reference", reference.obstacle, reference.attention, "plain PyTorch, any device and precision"),
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
    problem = _checked(
        q_THQ, k_THQ, v_THV, offsets_B1, max_length, scale, divisor, activation, mask, bias, dropout, dropout_key
    )
    chosen, _ = _choose(q_THQ, k_THQ, v_THV, problem, implementation)
    return chosen.run(q_THQ, k_THQ, v_THV, problem)


def explain(
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
) -> str:
    """Which implementation hstu_attention() would run for these arguments, and why: one line."""
    problem = _checked(
        q_THQ, k_THQ, v_THV, offsets_B1, max_length, scale, divisor, activation, mask, bias, dropout, dropout_key
    )
    chosen, passed_over = _choose(q_THQ, k_THQ, v_THV, problem, implementation)
    reasons = [f"{name} can't: {obstacle}" for name, obstacle in passed_over]
    return "; ".join([f"{chosen.name} ({chosen.merit})", *reasons])


def _choose(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, name: str
) -> tuple[Implementation, list[tuple[str, str]]]:
    """The implementation to run, and those preferred to it with their obstacles."""
    passed_over = []
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


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(f"hstu_attention: {sentence}.")


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    scale: float,
    divisor: float,
    activation: Activation,
    mask: AttentionMask,
    bias: RelativeBias | None,
    dropout: float,
    dropout_key: int,
) -> AttentionProblem:
    """The call as a problem, or a ValueError that says what is wrong with it."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _require(tensor.dim() == 3, f"{name} must have 3 dimensions (rows, heads, width), not {tensor.dim()}")
        _require(tensor.is_floating_point(), f"{name} must be floating point, not {tensor.dtype}")
        _require(
            tensor.dtype == q.dtype and tensor.device == q.device,
            f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}",
        )
    rows = q.shape[0]
    _require(k.shape == q.shape, f"k must have q's shape {tuple(q.shape)}, not {tuple(k.shape)}")
    _require(v.shape[:2] == q.shape[:2], f"v must have q's rows and heads {tuple(q.shape[:2])}, not {tuple(v.shape)}")
    _require(activation in ("silu", "softmax"), f"activation is 'silu' or 'softmax', not {activation!r}")
    _require(activation == "softmax" or divisor > 0, f"divisor must be positive, not {divisor}")
    _require(0.0 <= dropout < 1.0, f"dropout must be at least 0 and below 1, not {dropout}")
    _require(0 <= dropout_key < 2**64, f"dropout_key must be a 64-bit number of at least 0, not {dropout_key}")
    _require(
        offsets.dim() == 1 and offsets.dtype == torch.int64 and offsets.shape[0] >= 1,
        f"offsets must be (B + 1,) int64, not {tuple(offsets.shape)} {offsets.dtype}",
    )
    _check_offsets(offsets, rows, max_length)
    bias = bias or RelativeBias()
    _check_bias(bias, rows, max_length, mask)
    return AttentionProblem(
        offsets, max_length, scale, divisor, activation, mask, bias, dropout, dropout_key
    )


def _check_offsets(offsets: Tensor, rows: int, max_length: int) -> None:
    """Offsets on a device are trusted (reading them would wait for it), as are those of a graph being traced."""
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    edges = offsets.tolist()
    _require(
        edges[0] >= 0 and edges[-1] <= rows,
        f"offsets go from {edges[0]} to {edges[-1]}, outside the {rows} rows of q",
    )
    for sequence, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        _require(end >= begin, f"offsets must not fall, but sequence {sequence} goes from row {begin} to {end}")
        _require(
            end - begin <= max_length, f"sequence {sequence} has {end - begin} rows, more than max_length {max_length}"
        )


def _check_bias(bias: RelativeBias, rows: int, max_length: int, mask: AttentionMask) -> None:
    for name, table in (("position", bias.position), ("time", bias.time)):
        if table is not None:
            _require(
                table.dim() == 1 and table.is_floating_point(),
                f"bias.{name} must be a floating vector, not {tuple(table.shape)} {table.dtype}",
            )
    if bias.position is not None:
        _require(mask.causal, "bias.position is defined for causal attention only")
        _require(
            bias.position.shape[0] >= max_length,
            f"bias.position has {bias.position.shape[0]} entries, fewer than max_length {max_length}",
        )
    if bias.time is None:
        return
    _require(
        bias.time.shape[0] == bias.buckets.count,
        f"bias.time must have {bias.buckets.count} entries, one a bucket, not {bias.time.shape[0]}",
    )
    for name, times in (("query_times", bias.query_times), ("key_times", bias.key_times)):
        _require(times is not None, f"bias.time needs bias.{name}")
        assert times is not None
        _require(
            times.shape == (rows,) and times.dtype == torch.int64,
            f"bias.{name} must be ({rows},) int64, not {tuple(times.shape)} {times.dtype}",
        )
