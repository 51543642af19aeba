"""SiLU in Triton kernels, by one special-function instruction where the precision allows it.

Everything is float32. FAST is a constexpr that the host picks: tanh.approx.f32 (relative error 2^-11, below the
rounding of bfloat16 and about that of float16) through inline assembly, for sm_75 and later; it can't be interpreted.
Without it the sigmoid is 1 / (1 + exp(-x)) to float32's precision, at two special-function instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh_approximate(x):
    """tanh.approx.f32 of a float32 tensor."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def silu_of_twice(h, FAST: tl.constexpr):
    """SiLU(2 h). As SiLU(2 h) = h (1 + tanh h), a kernel that can halve its scale for nothing saves a product."""
    if FAST:
        result = h + h * tanh_approximate(h)
    else:
        result = 2.0 * h / (1.0 + tl.exp(-2.0 * h))
    return result


@triton.jit
def silu_and_slope_of_twice(h, FAST: tl.constexpr):
    """SiLU(x) and SiLU'(x) = sigmoid(x) + SiLU(x) (1 - sigmoid(x)) at x = 2 h."""
    if FAST:
        sigmoid = 0.5 + 0.5 * tanh_approximate(h)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-2.0 * h))
    value = 2.0 * h * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid)


@triton.jit
def silu(x, FAST: tl.constexpr):
    """SiLU(x) = x sigmoid(x)."""
    return silu_of_twice(0.5 * x, FAST)


@triton.jit
def silu_and_slope(x, FAST: tl.constexpr):
    """SiLU(x) and its derivative."""
    return silu_and_slope_of_twice(0.5 * x, FAST)
