"""Modules that use a module they do not own."""

from __future__ import annotations

from typing import Any

from torch import nn


def borrow(module: nn.Module, name: str, other: Any) -> None:
    """``module.name = other`` without making ``other`` a part of ``module``.

    The table is used by the input, the similarity and the objective; were it a submodule of each, a state dict
    would hold it once for each.  Its owner is the recommender.
    """
    object.__setattr__(module, name, other)
