"""The compiled CPU attention (csrc/hstu_attention_cpu.cpp): which calls it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.hstu_attention.problem import AttentionProblem


def obstacle(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: AttentionProblem) -> str:
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
        ("targets", problem.mask.targets is not None),
    ):
        if used:
            return f"its masks are the causal and the full one, without {name}"
    if problem.query_offsets is not None:
        return "its queries and keys are the same rows, without query_offsets"
    from gr_kernels.hstu_attention import cpp_op  # loads the compiled code: on first use, not before

    return cpp_op.WHY_UNAVAILABLE


def attention(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: AttentionProblem) -> Tensor:
    """hstu_attention() for a validated call without obstacle."""
    from gr_kernels.hstu_attention import cpp_op

    return cpp_op.attention(q_THQ, k_SHQ, v_SHV, problem)
