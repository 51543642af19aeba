"""The operators that can be measured, by name."""

from __future__ import annotations

import importlib
from typing import cast

from benchmarks.kernels.problem import Operator

NAMES = ("hstu_attention", "block", "cross_entropy", "sampled_softmax", "candidate_scores")


def load(name: str) -> Operator:
    return cast(Operator, importlib.import_module(f"benchmarks.kernels.{name}"))
