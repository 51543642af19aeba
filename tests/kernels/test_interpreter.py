"""The repaired interpreter's bfloat16 against torch's, operation by operation, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gr_kernels.triton_common.available import interpreting  # noqa: E402
from tests.precision import analysed, assert_within  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="there is a GPU: nothing is interpreted")
ROWS, COLUMNS = 16, 32


@triton.jit
def elementwise(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    elif OPERATION == "mul":
        out = x * y
    elif OPERATION == "div":
        out = x / y
    elif OPERATION == "scale":
        out = x * 0.3
    elif OPERATION == "negate":
        out = -x
    elif OPERATION == "abs":
        out = tl.abs(x)
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    elif OPERATION == "where":
        out = tl.where(x > y, x, 0.0)
    elif OPERATION == "equal":
        out = tl.where((x == y) | (x < 0.0), y, x)
    elif OPERATION == "clamp":
        out = tl.clamp(x, -0.5, 0.5)
    elif OPERATION == "fma":
        out = tl.fma(x, y, x)
    elif OPERATION == "exp":
        out = tl.exp(x.to(tl.float32)).to(tl.bfloat16)
    elif OPERATION == "full":
        out = tl.full([SIZE], 0.7, tl.bfloat16) + x
    elif OPERATION == "integer":
        out = (tl.arange(0, SIZE) * 3).to(tl.bfloat16)
    else:
        out = tl.zeros([SIZE], tl.bfloat16) + x
    tl.store(out_ptr + at, out)


EXPECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "scale": lambda x, y: x * torch.tensor(0.3, dtype=torch.bfloat16),
    "negate": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x > y, x, 0.0),
    "equal": lambda x, y: torch.where((x == y) | (x < 0), y, x),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "fma": lambda x, y: (x.float() * y.float() + x.float()).bfloat16(),
    "exp": lambda x, y: x.float().exp().bfloat16(),
    "full": lambda x, y: torch.tensor(0.7, dtype=torch.bfloat16) + x,
    "integer": lambda x, y: (torch.arange(len(x)) * 3).bfloat16(),
    "zeros": lambda x, y: x.clone(),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("operation", EXPECTED)
def test_elementwise(operation: str) -> None:
    x, y = numbers(512), numbers(512, seed=1)
    y[::7] = x[::7]
    out = torch.full_like(x, float("nan"))
    elementwise[(1,)](x, y, out, OPERATION=operation, SIZE=512)
    assert torch.equal(out, EXPECTED[operation](x, y))


@triton.jit
def convert(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


HALFWAY = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, 1e-40, 0.0])
SPECIAL = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 65504.0, 1e-30, 7.0, -2.5])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's, of what becomes infinite
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.int32),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
)
def test_conversions(source: torch.dtype, target: torch.dtype) -> None:
    """Ties go to the even neighbour; infinities, NaN, subnormals and signed zeros arrive as such."""
    integers = torch.int32 in (source, target)
    values = (
        torch.arange(-300.0, 724.0) * 3 if integers else torch.cat([HALFWAY, SPECIAL, torch.randn(1008) * 9])
    )
    x = values.to(source)
    out = torch.empty(1024, dtype=target)
    convert[(1,)](x, out, SIZE=1024)
    expected = x.to(target)
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(out[number], expected[number])


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    product = tl.dot(a, b)
    product = tl.dot(a, b, product)
    tl.store(out_ptr + m[:, None] * N + n[None, :], product)


def test_dot() -> None:
    """Products of bfloat16 in float32: as the float64 product up to float32's rounding."""
    a, b = numbers(16, 64), numbers(64, 32, seed=1)
    out = torch.full((16, 32), float("nan"))
    multiply[(1,)](a, b, out, M=16, K=64, N=32)
    exact, allowed = analysed(lambda: {"out": 2 * (a.double() @ b.double())}, torch.float32)
    assert_within({"out": out}, exact, allowed)


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def reduce(x_ptr, out_ptr, OPERATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    if OPERATION == "sum":
        out = tl.sum(x, 1)
    elif OPERATION == "sum_in_float32":
        out = tl.sum(x.to(tl.float32), 1)
    elif OPERATION == "max":
        out = tl.max(x, 1)
    elif OPERATION == "min":
        out = tl.min(x, 1)
    elif OPERATION == "argmax":
        out = tl.argmax(x, 1)
    else:
        out = tl.reduce(x, 1, _larger)
    tl.store(out_ptr + m, out.to(out_ptr.dtype.element_ty))


REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "sum_in_float32": lambda x: x.sum(1),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "argmax": lambda x: x.argmax(1).to(x.dtype),
    "any function": lambda x: x.amax(1),
}


@pytest.mark.parametrize("operation", REDUCED)
def test_reductions(operation: str) -> None:
    x = numbers(ROWS, COLUMNS)
    out = torch.full((ROWS,), float("nan"), dtype=torch.bfloat16)
    reduce[(1,)](x, out, OPERATION=operation, M=ROWS, N=COLUMNS)
    if "sum" not in operation:
        assert torch.equal(out, REDUCED[operation](x))
        return
    exact, allowed = analysed(lambda: {"out": x.double().sum(1)}, torch.float32)
    assert_within({"out": out}, exact, allowed, torch.bfloat16)


@triton.jit
def running_sum(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.cumsum(tl.load(x_ptr + n), 0))


def test_scan() -> None:
    x = numbers(COLUMNS)
    out = torch.full((COLUMNS,), float("nan"))
    running_sum[(1,)](x, out, N=COLUMNS)
    upper = torch.ones(COLUMNS, COLUMNS, dtype=torch.float64).triu()
    exact, allowed = analysed(lambda: {"out": x.double() @ upper}, torch.float32)
    assert_within({"out": out}, exact, allowed)
