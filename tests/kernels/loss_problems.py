"""Inputs of the losses' tests, and their results by one way in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.precision import analysed, assert_within

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


def assert_precise(
    found: Mapping[str, Tensor],
    definition: Callable[[dict[str, Tensor]], Tensor],
    made: dict[str, Tensor],
    wanted: Sequence[str] = LEAVES,
    scale: float = 1.0,
) -> None:
    """``results`` of an implementation against those of its definition in float64, within the bound on rounding."""
    dtype = made["queries"].dtype
    exact, allowed = analysed(lambda: results(definition, made, torch.float64, wanted), dtype, scale=scale)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    assert_within(
        found, exact, allowed, {"out": at_least_float32, **{name: made[name].dtype for name in wanted}}
    )
