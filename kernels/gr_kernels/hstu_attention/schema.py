"""The attention as operators of torch.library, whose arguments are tensors and numbers: what torch.compile and
torch.export see. A problem is flattened at this border and put together again behind it.

B sequences, T query and S key rows, H heads, Q query/key width, V value width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gr_kernels.hstu_attention.problem import (
    AttentionMask,
    AttentionProblem,
    Gradients,
    RelativeBias,
    TimeBuckets,
)

# max_length and dropout_key change from batch to batch and step to step: as SymInt they need no new graph.
INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? query_offsets, Tensor? targets, Tensor? position, "
    "Tensor? time, Tensor? query_times, Tensor? key_times, Tensor? order, str bucket_kind, float bucket_width, "
    "SymInt max_length, float scale, float divisor, bool softmax, bool causal, int window, int full_rows, "
    "int contexts, float dropout, SymInt dropout_key, bool deterministic"
)
FORWARD = f"({INPUTS}) -> (Tensor out, Tensor lse)"
BACKWARD = (
    f"(Tensor d_out, Tensor? out, Tensor? lse, {INPUTS}) "
    "-> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_position, Tensor d_time)"
)
TENSORS = 11  # how many of the inputs are tensors; they come first
POSITION, TIME = 6, 7  # which of them are the tables
SOFTMAX = 16  # which of the inputs is `softmax`
_AFTER_QKV = 3  # the inputs that `flatten` gives come after q, k and v

# (q, k, v, problem) -> (out, lse): (T, H, V), and (H, T) float32, the log of each row's sum of exponentials, where
# softmax's backward wants it; else None
Forward = Callable[[Tensor, Tensor, Tensor, AttentionProblem], tuple[Tensor, Tensor | None]]
# (d_out, out, lse, q, k, v, problem) -> gradients; out and lse are None where the forward gave no lse
Backward = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, AttentionProblem], Gradients
]


def flatten(problem: AttentionProblem) -> tuple[Any, ...]:
    """The operators' arguments after q, k and v."""
    bias, mask, key = problem.bias, problem.mask, problem.dropout_key
    timed = bias.time is not None
    return (
        problem.offsets,
        problem.query_offsets,
        mask.targets,
        bias.position,
        bias.time,
        bias.query_times if timed else None,
        bias.key_times if timed else None,
        problem.order,
        bias.buckets.kind,
        bias.buckets.width,
        problem.max_length,
        float(problem.scale),
        float(problem.divisor),
        problem.activation == "softmax",
        mask.causal,
        mask.window,
        mask.full_rows,
        mask.contexts,
        float(problem.dropout),
        key - 2**64 if key >= 2**63 else key,  # the same 64 bits, signed
        problem.deterministic,
    )


def unflatten(
    offsets: Tensor,
    query_offsets: Tensor | None,
    targets: Tensor | None,
    position: Tensor | None,
    time: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
    order: Tensor | None,
    bucket_kind: Any,
    bucket_width: float,
    max_length: int,
    scale: float,
    divisor: float,
    softmax: bool,
    causal: bool,
    window: int,
    full_rows: int,
    contexts: int,
    dropout: float,
    dropout_key: int,
    deterministic: bool,
) -> AttentionProblem:
    """The problem that `flatten` took apart (its key as 64 unsigned bits again)."""
    buckets = TimeBuckets() if time is None else TimeBuckets(bucket_kind, time.shape[0], bucket_width)
    return AttentionProblem(
        offsets=offsets,
        query_offsets=query_offsets,
        max_length=max_length,
        divisor=divisor,
        scale=scale,
        activation="softmax" if softmax else "silu",
        mask=AttentionMask(causal, window, full_rows, contexts, targets),
        bias=RelativeBias(position, time, query_times, key_times, buckets),
        dropout=dropout,
        dropout_key=dropout_key + 2**64 if dropout_key < 0 else dropout_key,
        order=order,
        deterministic=deterministic,
    )


@functools.cache
def register(name: str, forward: Forward, backward: Backward, softmax_gives_lse: bool) -> None:
    """Defines the operators gr_kernels::<name> and gr_kernels::<name>_backward from two functions of a problem; once.

    They trace (shapes without computing) and differentiate once. Neither function may return an input or a view of
    one. softmax_gives_lse: whether `forward` returns lse for softmax; autograd then keeps out and lse.

    Call it when an implementation first runs, and where torch.compile may trace, from a function that is
    constant_when_traced (a function that is cached is traced into).
    """
    forward_name, backward_name = f"gr_kernels::{name}", f"gr_kernels::{name}_backward"

    def run_forward(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, unflatten(*flat))
        return out, q.new_empty((0,), dtype=torch.float32) if lse is None else lse

    def fake_forward(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        kept = softmax_gives_lse and flat[SOFTMAX - _AFTER_QKV]
        shape = (q.shape[1], q.shape[0]) if kept else (0,)
        return v.new_empty((q.shape[0], *v.shape[1:])), q.new_empty(shape, dtype=torch.float32)

    def run_backward(
        d_out: Tensor, out: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *flat: Any
    ) -> tuple[Tensor, ...]:
        *gradients, d_position, d_time = backward(d_out, out, lse, q, k, v, unflatten(*flat))
        return (*gradients, *(q.new_empty((0,)) if x is None else x for x in (d_position, d_time)))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        kept = output if softmax_gives_lse and inputs[SOFTMAX] else (None, None)
        ctx.save_for_backward(*inputs[:TENSORS], *kept)
        ctx.settings = inputs[TENSORS:]

    def differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        operator = getattr(torch.ops.gr_kernels, f"{name}_backward")
        found = operator(d_out.contiguous(), out, lse, *tensors, *ctx.settings)
        d_q, d_k, d_v, d_position, d_time = found
        gradients: list[Tensor | None] = [None] * (TENSORS + len(ctx.settings))
        gradients[:3] = d_q, d_k, d_v
        if tensors[POSITION] is not None:
            gradients[POSITION] = d_position
        if tensors[TIME] is not None:
            gradients[TIME] = d_time
        return tuple(gradients)

    def refuse(ctx: Any, *d_gradients: Tensor) -> None:
        raise RuntimeError(f"{forward_name} is differentiable once, and its gradient was differentiated.")

    torch.library.define(forward_name, FORWARD)
    torch.library.define(backward_name, BACKWARD)
    torch.library.impl(forward_name, "default", run_forward)
    torch.library.impl(backward_name, "default", run_backward)
    torch.library.register_fake(forward_name, fake_forward)
    torch.library.register_fake(backward_name, _fake_backward)
    torch.library.register_autograd(forward_name, differentiate, setup_context=keep)
    torch.library.register_autograd(backward_name, refuse)


def _fake_backward(
    d_out: Tensor, out: Any, lse: Any, q: Tensor, k: Tensor, v: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    tables = flat[POSITION - _AFTER_QKV : TIME + 1 - _AFTER_QKV]
    absent_or_like = (q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in tables)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *absent_or_like)
