"""One kernel with one choice of types and tiles, to be compiled for a GPU that needn't be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """A specialisation of a kernel as a launch would make it.

    name: unique in the operator's folder, such as "forward.bf16.d128"; the record adds the folder's name.
    kernel: the @triton.jit function.
    signature: the type of every argument that is no constexpr: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32", ...;
        or "constexpr" for an argument whose value in `constexprs` the launch specialises on (None, or 1).
    constexprs: the constexpr arguments (and None pointers), from the function that picks tiles at launch.
    num_warps, num_stages: likewise.
    hot: a kernel that must run its products as wgmma on sm_90: mma.sync there fails the check.
    spill_budget: bytes of registers that may spill to memory.
    divisible_by_16: integer arguments that are multiples of 16 in this case (Triton specialises on it); pointers
        always are, but for those named in `unaligned`.
    architectures: the compute capabilities that this case would run on.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    hot: bool
    spill_budget: int = 0
    divisible_by_16: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (80, 90)
    unaligned: tuple[str, ...] = ()
