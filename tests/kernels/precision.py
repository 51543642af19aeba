"""The rule on precision: at most so many times as far from float64 as plain PyTorch in the same dtype is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 5.0


def error(found: Tensor, exact: Tensor) -> float:
    """Distance from the exact result, in float64."""
    return float((found.detach().double().cpu() - exact.detach().double().cpu()).norm())


def tolerance(plain: Tensor, exact: Tensor, times: float, dtype: torch.dtype) -> float:
    """``times`` the error of plain PyTorch, or of the exact result rounded to ``dtype`` where plain's is smaller.

    2^-24 of the result's norm is added: half a unit in float32's last place, where both happen to be exact.
    """
    unavoidable = error(exact.to(dtype), exact)
    return times * max(error(plain, exact), unavoidable) + 2.0**-24 * float(exact.double().norm())


def assert_precise(
    found: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    forward: tuple[str, ...] = ("out",),
) -> None:
    """The rule for every named result: those of ``forward`` within 2 times plain's error, gradients within 5.

    found: of the implementation under test.  plain: of plain PyTorch in the same dtype.  exact: of plain PyTorch in
    float64, from the same inputs (rounded to the dtype first).  Shapes and dtypes must be plain's.
    """
    assert found.keys() == plain.keys() == exact.keys()
    for name, value in found.items():
        assert value.shape == plain[name].shape, (name, value.shape, plain[name].shape)
        assert value.dtype == plain[name].dtype, (name, value.dtype, plain[name].dtype)
        times = FORWARD if name in forward else GRADIENT
        allowed = tolerance(plain[name], exact[name], times, value.dtype)
        distance = error(value, exact[name])
        assert distance <= allowed, f"{name}: {distance:.3g} from float64, {allowed:.3g} allowed"
