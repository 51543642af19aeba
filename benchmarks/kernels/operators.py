"""The operators that can be measured, by name."""

from __future__ import annotations

import importlib
from typing import cast

from benchmarks.kernels.problem import Operator

NAMES = (
    "hstu_attention",
    "block",
    "cross_entropy",
    "log_partition",
    "sampled_softmax",
    "candidate_scores",
    "jagged",
    "bias_table_gradient",
)


def load(name: str) -> Operator:
    return cast(Operator, importlib.import_module(f"benchmarks.kernels.{name}"))
