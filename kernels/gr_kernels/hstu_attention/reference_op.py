"""The plain PyTorch attention as an operator that traces.

T query and S key rows in the batch, H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.hstu_attention import reference, schema
from gr_kernels.hstu_attention.problem import AttentionProblem, Gradients
from gr_kernels.tracing import constant_when_traced


def obstacle(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: AttentionProblem) -> str:
    """The reference takes every call."""
    return ""


def attention(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: AttentionProblem) -> Tensor:
    """hstu_attention() for a validated call: (T, H, V) in q's dtype; differentiable once."""
    _register()
    operator = torch.ops.gr_kernels.hstu_attention_reference
    out_THV, _ = operator(q_THQ, k_SHQ, v_SHV, *schema.flatten(problem))
    return out_THV  # type: ignore[no-any-return]


@constant_when_traced
def _register() -> None:
    schema.register("hstu_attention_reference", _forward, _backward, softmax_gives_lse=False)


def _forward(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> tuple[Tensor, None]:
    return reference.forward(q, k, v, problem), None


def _backward(
    d_out: Tensor, out: None, lse: None, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem
) -> Gradients:
    return reference.backward(d_out, q, k, v, problem)
