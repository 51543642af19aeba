"""What operators share: one table of their arguments, keys of 64 bits, and definitions that happen once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gr_kernels.operators import Arguments, define, field, refuse_twice, signed, unsigned
from gr_kernels.tracing import once


@dataclass
class Inner:
    width: int


@dataclass
class Outer:
    x: Tensor
    inner: Inner
    key: int
    scale: float
    table: Tensor | None = None


TABLE = Arguments(
    [
        field("Tensor x"),
        field("Tensor? table"),
        field("int inner_width", "inner.width"),
        field("key key"),
        field("float scale"),
    ]
)


def test_one_table_makes_the_schema_and_takes_apart() -> None:
    assert TABLE.schema == "Tensor x, Tensor? table, int inner_width, SymInt key, float scale"
    assert TABLE.tensors == [0, 1] and TABLE.index["inner_width"] == 2 and len(TABLE) == 5
    whole = Outer(torch.ones(2), Inner(7), 2**64 - 1, 2)
    flat = TABLE.flatten(whole)
    assert flat == (whole.x, None, 7, -1, 2.0) and isinstance(flat[4], float)
    again = TABLE.unflatten(flat, {"": Outer, "inner": Inner})
    assert again == whole
    assert TABLE.by_name(flat)["inner_width"] == 7


def test_values_by_name() -> None:
    assert TABLE.named({"scale": 3, "x": 1}) == (1, None, None, None, 3)
    with pytest.raises(ValueError, match="no arguments are called width"):
        TABLE.named({"width": 1})


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_keys_keep_their_bits(key: int) -> None:
    assert -(2**63) <= signed(key) < 2**63 and signed(key) % 2**64 == key
    assert unsigned(signed(key)) == key


def test_what_is_defined_traces_and_differentiates_once() -> None:
    def backward(ctx: object, d: Tensor) -> tuple[Tensor]:
        return (torch.ops.gr_kernels.test_twice_backward(d),)

    define("test_twice", "(Tensor x) -> Tensor", lambda x: 2 * x, torch.empty_like, backward)
    define("test_twice_backward", "(Tensor d) -> Tensor", lambda d: 2 * d, torch.empty_like)
    refuse_twice("test_twice_backward")
    x = torch.ones(3, requires_grad=True)
    torch.library.opcheck(torch.ops.gr_kernels.test_twice.default, (x,))
    (gradient,) = torch.autograd.grad((torch.ops.gr_kernels.test_twice(x) ** 2).sum(), x, create_graph=True)
    assert gradient.tolist() == [8.0] * 3
    with pytest.raises(RuntimeError, match="gr_kernels::test_twice is differentiable once"):
        torch.autograd.grad(gradient.sum(), x)


def test_once_is_once_whoever_asks() -> None:
    calls: list[int] = []
    together = threading.Barrier(8)
    register = once(lambda: calls.append(1))

    def ask() -> None:
        together.wait()
        register()

    with ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(ask) for _ in range(8)]:
            asked.result()
    register()
    assert calls == [1]


def test_once_asks_again_after_a_failure() -> None:
    attempts: list[int] = []

    def register() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("not yet")

    registered = once(register)
    with pytest.raises(RuntimeError, match="not yet"):
        registered()
    registered()
    registered()
    assert len(attempts) == 2
