"""Jagged HSTU attention with relative position and time bias; README.md here has the maths."""

from gr_kernels.hstu_attention.op import hstu_attention
from gr_kernels.hstu_attention.problem import (
    AttentionMask,
    Problem as AttentionProblem,
    RelativeBias,
    TimeBuckets,
)

__all__ = ["AttentionMask", "AttentionProblem", "RelativeBias", "TimeBuckets", "hstu_attention"]
