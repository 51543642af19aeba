"""The compiled CPU attention (csrc/hstu_attention_cpu.cpp): which calls it takes, and what makes its operators trace
and differentiate. The compiled code is loaded on first use.

T query and S key rows in the batch, H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gr_kernels import native, operators
from gr_kernels.hstu_attention.problem import Problem, TimeBuckets
from gr_kernels.operators import signed
from gr_kernels.tracing import once


def obstacle(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: Problem) -> str:
    """Why this call can't be compiled code's, "" when it can."""
    if q_THQ.device.type != "cpu":
        return f"the tensors are on {q_THQ.device}, not on CPU"
    if q_THQ.dtype != torch.float32:
        return f"it computes in float32, not {q_THQ.dtype}"
    for name, table in (("position", problem.bias.position), ("time", problem.bias.time)):
        if table is not None and table.dtype != torch.float32:
            return f"bias.{name} is {table.dtype}, not float32"
    for name, used in (
        ("a window", problem.mask.window > 0),
        ("contexts", problem.mask.contexts > 0),
    ):
        if used:
            return f"its masks are the full one and the causal one with or without targets, without {name}"
    return native.why_unavailable()


def attention(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: Problem) -> Tensor:
    """hstu_attention() for a validated call without obstacle, after `register`."""
    bias, buckets, targets = problem.bias, problem.bias.buckets, problem.mask.targets
    # The key is a constant of a traced graph: without dropout it is always the same.
    key = problem.dropout_key if problem.dropout else 0
    out_THV = torch.ops.gr_kernels.hstu_attention(
        _rows(q_THQ),
        _rows(k_SHQ),
        _rows(v_SHV),
        problem.offsets.contiguous(),
        *(
            None if x is None else x.contiguous()
            for x in (
                problem.query_offsets,
                None if targets is None else targets.long(),
                bias.position,
                bias.time,
                bias.query_times,
                bias.key_times,
            )
        ),
        None
        if bias.time is None
        else torch.ops.gr_kernels.time_thresholds(buckets.kind, buckets.count, buckets.width),
        problem.scale,
        problem.divisor,
        problem.activation == "softmax",
        problem.mask.causal,
        problem.dropout,
        signed(key),
    )
    return out_THV  # type: ignore[no-any-return]


def _rows(x_THD: Tensor) -> Tensor:
    """The kernels take any row and head stride, but neighbouring numbers must be neighbours."""
    return x_THD if x_THD.stride(-1) == 1 or x_THD.shape[-1] == 1 else x_THD.contiguous()


def _thresholds(kind: Any, count: int, width: float) -> Tensor:
    return TimeBuckets(kind, count, width).thresholds()


def _fake_thresholds(kind: str, count: int, width: float) -> Tensor:
    return torch.empty(count - 1, dtype=torch.int64)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty((q.shape[0], *v.shape[1:]))


def _fake_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Any, query_offsets: Any, targets: Any, *rest: Any
) -> tuple[Tensor, ...]:
    tables = (q.new_empty((0,)) if table is None else q.new_empty(table.shape) for table in rest[:2])
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *tables)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.settings = inputs[:11], inputs[11:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    d_q, d_k, d_v, d_position, d_time = torch.ops.gr_kernels.hstu_attention_backward(
        d_out.contiguous(), *tensors, *ctx.settings
    )
    position, time = tensors[6:8]
    return (
        d_q,
        d_k,
        d_v,
        *(None for _ in range(3)),
        None if position is None else d_position,
        None if time is None else d_time,
        *(None for _ in range(3 + len(ctx.settings))),
    )


@once
def register() -> None:
    """What the compiled operators need to trace and to differentiate."""
    # A traced graph can't compute the thresholds' decimals, but it can call an operator that does.
    operators.define(
        "time_thresholds", "(str kind, int count, float width) -> Tensor", _thresholds, _fake_thresholds
    )
    torch.library.register_fake("gr_kernels::hstu_attention", _fake_forward)
    torch.library.register_fake("gr_kernels::hstu_attention_backward", _fake_backward)
    torch.library.register_autograd("gr_kernels::hstu_attention", _backward, setup_context=_keep_for_backward)
