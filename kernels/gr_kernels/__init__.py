"""Operators of generative recommenders, usable on their own: `pip install --no-build-isolation ./kernels`.

Importing this package imports nothing else: each name below is brought in from its folder when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr_kernels.bias_table_gradient import bias_table_gradient as bias_table_gradient
    from gr_kernels.candidate_scores import candidate_scores as candidate_scores
    from gr_kernels.counter_random import (
        derive_key as derive_key,
        truncated_normal_rows as truncated_normal_rows,
        uniform_floats as uniform_floats,
        uniform_integers as uniform_integers,
    )
    from gr_kernels.dispatch import explain as explain, preferring as preferring
    from gr_kernels.fused_layer import (
        gated_output as gated_output,
        norm_linear_silu as norm_linear_silu,
        norm_linear_silu_parts as norm_linear_silu_parts,
    )
    from gr_kernels.hstu_attention import (
        AttentionMask as AttentionMask,
        RelativeBias as RelativeBias,
        TimeBuckets as TimeBuckets,
        hstu_attention as hstu_attention,
    )
    from gr_kernels.jagged import (
        add_positions_and_times as add_positions_and_times,
        concat_jagged as concat_jagged,
        dense_to_jagged as dense_to_jagged,
        jagged_dropout as jagged_dropout,
        jagged_to_dense as jagged_to_dense,
        split_jagged as split_jagged,
    )
    from gr_kernels.log_partition import cross_entropy as cross_entropy, log_partition as log_partition
    from gr_kernels.sampled_softmax import sampled_softmax as sampled_softmax

_FOLDERS = {
    "bias_table_gradient": ("bias_table_gradient",),
    "candidate_scores": ("candidate_scores",),
    "counter_random": ("derive_key", "truncated_normal_rows", "uniform_floats", "uniform_integers"),
    "dispatch": ("explain", "preferring"),
    "fused_layer": ("gated_output", "norm_linear_silu", "norm_linear_silu_parts"),
    "hstu_attention": ("AttentionMask", "RelativeBias", "TimeBuckets", "hstu_attention"),
    "jagged": (
        *("add_positions_and_times", "concat_jagged", "dense_to_jagged"),
        *("jagged_dropout", "jagged_to_dense", "split_jagged"),
    ),
    "log_partition": ("cross_entropy", "log_partition"),
    "sampled_softmax": ("sampled_softmax",),
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
