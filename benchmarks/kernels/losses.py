"""What the benchmarks of losses and scores share: queries and a table, and eager PyTorch as a peer.

T queries, I catalogue size, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.memory import available_bytes
from benchmarks.kernels.peers import compiled
from benchmarks.kernels.problem import Case, Step, Way
from benchmarks.kernels.shapes import LossSpec

SCALE, EPS = 20.0, 1e-6  # of cosines


def spec_of(case: Case) -> LossSpec:
    assert isinstance(case.spec, LossSpec)
    return case.spec


def leaves(spec: LossSpec, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    """Unit queries and a table of unit scale."""
    dtype = getattr(torch, spec.dtype)
    queries_TD = F.normalize(torch.randn(spec.T, spec.D, generator=generator), dim=-1)
    table_ID = torch.randn(spec.I, spec.D, generator=generator)
    both = {"queries": queries_TD, "table": table_ID}
    return {name: x.to(device, dtype).requires_grad_() for name, x in both.items()}


def scale_and_eps(case: Case) -> tuple[float, float | None]:
    """The arguments scale and normalize_eps of the operators: logits of the same size, normalised or not."""
    spec = spec_of(case)
    return (SCALE, EPS) if spec.normalized else (SCALE * spec.D**-0.5, None)


def normalized(rows: Tensor, eps: float | None) -> Tensor:
    return rows if eps is None else F.normalize(rows, dim=-1, eps=eps)


def logits(case: Case) -> Tensor:
    """(T, I) float32 at least: all of them at once, as plain PyTorch forms them."""
    scale, eps = scale_and_eps(case)
    logits_TI = scale * (case.leaves["queries"] @ normalized(case.leaves["table"], eps).t())
    return logits_TI.to(torch.promote_types(logits_TI.dtype, torch.float32))


def eager_ways(
    eager: Callable[[Case], Tensor], answer: str, values: Callable[[LossSpec], float], of: str
) -> list[Way]:
    """Plain PyTorch and torch.compile of it.  values: how many it stores, in float32, of what shape."""

    def too_large(case: Case) -> str:
        needed = 4 * values(spec_of(case))
        if needed > available_bytes(case.device):
            return f"{of} values and their gradients take about {needed / 2**30:,.0f} GiB"
        return ""

    return [
        Way("eager", lambda case: Step(lambda: eager(case), case.leaves), too_large, answer=answer),
        Way(
            "compiled",
            lambda case: Step(compiled(lambda: eager(case)), case.leaves),
            too_large,
            answer=answer,
        ),
    ]
