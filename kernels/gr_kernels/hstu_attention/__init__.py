"""Jagged HSTU attention with relative position and time bias; README.md here has the maths."""

from gr_kernels.hstu_attention.op import hstu_attention
from gr_kernels.hstu_attention.parts import add_part, attend_part, attend_part_backward
from gr_kernels.hstu_attention.problem import (
    AttentionMask,
    AttentionPart,
    Problem as AttentionProblem,
    RelativeBias,
    TimeBuckets,
)

__all__ = [
    "AttentionMask",
    "AttentionPart",
    "AttentionProblem",
    "RelativeBias",
    "TimeBuckets",
    "add_part",
    "attend_part",
    "attend_part_backward",
    "hstu_attention",
]
