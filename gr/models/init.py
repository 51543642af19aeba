"""Initialisation by name: a dense parameter's first value depends on (seed, its name) alone, not on the order in
which modules are built nor on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gr_kernels.counter_random import derive_key
from gr_kernels.tracing import on_paper_now

Initialiser = Callable[[Tensor, torch.Generator], object]


def normal(std: float) -> Initialiser:
    return lambda tensor, generator: nn.init.normal_(tensor, 0.0, std, generator=generator)


def truncated_normal(std: float) -> Initialiser:
    """N(0, std^2) cut at +-2 std."""
    return lambda tensor, generator: nn.init.trunc_normal_(
        tensor, 0.0, std, a=-2 * std, b=2 * std, generator=generator
    )


def uniform(bound: float) -> Initialiser:
    return lambda tensor, generator: nn.init.uniform_(tensor, -bound, bound, generator=generator)


def xavier_normal(tensor: Tensor, generator: torch.Generator) -> object:
    return nn.init.xavier_normal_(tensor, generator=generator)


def xavier_uniform(tensor: Tensor, generator: torch.Generator) -> object:
    return nn.init.xavier_uniform_(tensor, generator=generator)


def zeros(tensor: Tensor, generator: torch.Generator) -> object:
    return nn.init.zeros_(tensor)


def ones(tensor: Tensor, generator: torch.Generator) -> object:
    return nn.init.ones_(tensor)


def initialise(model: nn.Module, seed: int) -> None:
    """Fill every dense parameter from a generator seeded by (seed, parameter name).

    A module says how in ``initialisers() -> {own parameter name: Initialiser}``; torch's LayerNorm and GRU are
    known; modules with ``initialises_itself`` (tables) are left alone.  Raises TypeError for any other parameter.
    On paper (gr_kernels.tracing) there is nothing to fill.
    """
    if on_paper_now():
        return
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or getattr(module, "initialises_itself", False):
            continue
        how = _initialisers(module)
        for name, parameter in own.items():
            full_name = f"{module_name}.{name}" if module_name else name
            if name not in how:
                raise TypeError(f"{type(module).__name__}.initialisers() says nothing about '{full_name}'")
            generator = torch.Generator().manual_seed(derive_key(seed, "parameter", full_name) >> 1)
            with torch.no_grad():
                fresh = torch.empty(parameter.shape)
                how[name](fresh, generator)
                parameter.copy_(fresh)


def _initialisers(module: nn.Module) -> dict[str, Initialiser]:
    if isinstance(module, nn.LayerNorm):
        return {"weight": ones, "bias": zeros}
    if isinstance(module, nn.GRU):
        return {name: uniform(1 / math.sqrt(module.hidden_size)) for name, _ in module.named_parameters()}
    if hasattr(module, "initialisers"):
        return module.initialisers()  # type: ignore[operator]
    return {}
