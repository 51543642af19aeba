"""The plain PyTorch attention as an operator that traces; importing this module registers it."""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.hstu_attention import reference
from gr_kernels.hstu_attention.problem import AttentionProblem
from gr_kernels.hstu_attention.schema import flatten, register

register("hstu_attention_reference", reference.forward, reference.backward)


def attention(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: AttentionProblem) -> Tensor:
    """hstu_attention() for a validated call."""
    operator = torch.ops.gr_kernels.hstu_attention_reference
    return operator(q_THQ, k_SHQ, v_SHV, *flatten(problem))  # type: ignore[no-any-return]
