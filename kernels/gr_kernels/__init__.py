"""Operators of generative recommenders, usable on their own: `pip install --no-build-isolation ./kernels`.

Importing this package imports nothing else: each name below is brought in from its folder when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr_kernels.candidate_scores import candidate_scores as candidate_scores
    from gr_kernels.counter_random import (
        derive_key as derive_key,
        truncated_normal_rows as truncated_normal_rows,
        uniform_floats as uniform_floats,
        uniform_integers as uniform_integers,
    )
    from gr_kernels.hstu_attention import (
        AttentionMask as AttentionMask,
        RelativeBias as RelativeBias,
        TimeBuckets as TimeBuckets,
        explain as explain,
        hstu_attention as hstu_attention,
    )
    from gr_kernels.log_partition import cross_entropy as cross_entropy, log_partition as log_partition

_FOLDERS = {
    "candidate_scores": ("candidate_scores",),
    "counter_random": ("derive_key", "truncated_normal_rows", "uniform_floats", "uniform_integers"),
    "hstu_attention": ("AttentionMask", "RelativeBias", "TimeBuckets", "explain", "hstu_attention"),
    "log_partition": ("cross_entropy", "log_partition"),
}
_HOMES = {name: folder for folder, names in _FOLDERS.items() for name in names}


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
