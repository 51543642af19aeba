"""The correctness gate: no speed for a way whose results are wrong.

Error is |found - exact| / |exact| (Euclidean norms), exact in float64. A result may be FORWARD times, a gradient
BACKWARD times as far off as plain PyTorch in the same dtype is on a small case of the same kind, plus a rounding of
every number (of a single number, which plain PyTorch may hit by chance: SINGLE roundings).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.problem import Case, Operator, Spec, Step, Way, gradients, in_double

FORWARD, BACKWARD, SINGLE = 2.0, 5.0, 8


@dataclass(frozen=True)
class Gate:
    """exact: float64 results by name.  allowed: relative error by name."""

    exact: dict[str, Tensor]
    allowed: dict[str, float]

    def judge(self, step: Step, case: Case, way: Way) -> tuple[dict[str, float], str]:
        """Relative errors of a way by name, and "" or what is wrong."""
        found = gradients(step, case.upstream)
        errors, wrong = {}, []
        for name, exact in self.exact.items():
            if name not in found:  # a way may have other leaves, as a stored bias has
                continue
            errors[name] = relative_error(found[name], exact)
            allowed = self.allowed[name] + way.slack
            if not errors[name] <= allowed:
                wrong.append(f"{name} is off by {errors[name]:.1e} (allowed {allowed:.1e})")
        if not errors:
            raise ValueError(f"way {way.name!r} gave nothing that the exact results have")
        return errors, "; ".join(wrong)


def build(operator: Operator, case: Case, answer: str) -> Gate:
    """The exact results of a case, and the errors it allows."""
    return Gate(operator.exact(case, answer), allowed_errors(operator, case.spec.small(), answer))


@functools.cache
def allowed_errors(operator: Operator, small: Spec, answer: str) -> dict[str, float]:
    """By name, from plain PyTorch on a small case (many cases share it)."""
    case = operator.build(small, torch.device("cpu"))
    plain, exact = operator.plain(case, answer), operator.plain(in_double(case), answer)
    rounding = torch.finfo(getattr(torch, small.dtype)).eps / 2
    allowed = {}
    for name in exact:
        factor = FORWARD if name == "out" else BACKWARD
        floor = rounding if exact[name].numel() > 1 else SINGLE * rounding
        allowed[name] = factor * relative_error(plain[name], exact[name]) + floor
    return allowed


def relative_error(found: Tensor, exact: Tensor) -> float:
    """NaN or a wrong shape is infinitely wrong."""
    if found.shape != exact.shape:
        return math.inf
    error = float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf
