"""Inputs of the losses' tests, and their results by one way in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.kernels.precision import FORWARD, assert_precise, error

EPS = 1e-6
LEAVES = ("queries", "table", "bias")


def inputs(
    tokens: int, catalogue: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Unit-scale queries, table (with a row below eps) and bias (float32), targets and positive weights.

    Values are exact in ``dtype``, so that float64 starts from the same numbers.
    """
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(catalogue, width, generator=generator)
    if catalogue > 2:
        table[2] *= EPS / 100
    made = {
        "queries": torch.randn(tokens, width, generator=generator).to(dtype),
        "table": table.to(dtype),
        "bias": torch.randn(catalogue, generator=generator),
        "targets": torch.randint(0, catalogue, (tokens,), generator=generator),
        "weights": torch.rand(tokens, generator=generator),
    }
    return {name: value.to(device) for name, value in made.items()}


def results(
    function: Callable[[dict[str, Tensor]], Tensor],
    made: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    wanted: Sequence[str] = LEAVES,
) -> dict[str, Tensor]:
    """``function``'s value "out" (per query, or a scalar) and the gradients of the leaves, in ``dtype`` if given.

    Gradients of a table row below eps, where they are 1 / eps times the others, are scaled back to unit size.
    """
    cast = {n: x.to(dtype) if dtype and x.is_floating_point() else x for n, x in made.items()}
    for name in wanted:
        cast[name] = cast[name].detach().clone().requires_grad_()
    out = function(cast)
    upstream = (
        cast["weights"].to(out.dtype) if out.dim() else torch.tensor(0.7, dtype=out.dtype, device=out.device)
    )
    gradients = torch.autograd.grad(out, [cast[name] for name in wanted], upstream)
    found = {"out": out.detach(), **dict(zip(wanted, gradients))}
    if "table" in found and len(found["table"]) > 2 and float(found["table"][2].abs().max()) > 1e3:
        found["table"] = found["table"].clone()
        found["table"][2] *= EPS
    return found


def assert_loss_precise(
    found: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    typical: float = 0.0,
) -> None:
    """The rule on precision, where the loss may be a sum: one number, which plain PyTorch may have right by luck.

    It gets two last places more, and ``typical``, the root of the sum of squares of its terms' errors in plain PyTorch,
    counts as plain's error where that is smaller.
    """
    out = found["out"]
    if out.dim():
        return assert_precise(found, plain, exact)
    assert out.dtype == plain["out"].dtype
    allowed = FORWARD * max(typical, error(plain["out"], exact["out"])) + 2.0**-22 * abs(float(exact["out"]))
    assert error(out, exact["out"]) <= allowed, f"loss: {error(out, exact['out']):.3g}, {allowed:.3g} allowed"
    rest = [{name: x for name, x in every.items() if name != "out"} for every in (found, plain, exact)]
    assert_precise(*rest)
