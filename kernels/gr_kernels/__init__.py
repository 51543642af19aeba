"""Operators of generative recommenders, usable on their own: `pip install --no-build-isolation ./kernels`.

Importing this package imports nothing else: each name below is brought in from its folder when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr_kernels.hstu_attention import (
        AttentionMask as AttentionMask,
        RelativeBias as RelativeBias,
        TimeBuckets as TimeBuckets,
        explain as explain,
        hstu_attention as hstu_attention,
    )

# Public name -> the folder it comes from.
_HOMES = {
    "hstu_attention": "hstu_attention",
    "AttentionMask": "hstu_attention",
    "RelativeBias": "hstu_attention",
    "TimeBuckets": "hstu_attention",
    "explain": "hstu_attention",
    "candidate_scores": "candidate_scores",
    "log_partition": "log_partition",
}


class _Package(ModuleType):
    """This package. A folder has the name of its main function; `gr_kernels.<name>` is always the function."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'gr_kernels' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"gr_kernels.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return  # the import system binding a folder to its name
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
