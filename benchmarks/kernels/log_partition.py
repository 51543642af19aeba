"""Measures gr_kernels.log_partition alone: log-sum-exp over a catalogue for each query, whatever its weight is later.

cross_entropy knows the weights in its forward pass and may form gradients there; here they come with the backward pass.

T queries, I catalogue size, D width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import cross_entropy, library, losses, shapes
from benchmarks.kernels.losses import scale_and_eps
from benchmarks.kernels.problem import Case, Step, Way, as_it_is, in_float64
from benchmarks.kernels.shapes import LossSpec
from gr_kernels.log_partition import log_partition, op

NAME = "log_partition"
FORMULA = "FLOPs: forward 2 T I D, backward 4 T I D (logits formed again aren't counted)"


def specs(device: str, grid: str) -> list[LossSpec]:
    return shapes.log_partition(device, grid)


def build(spec: LossSpec, device: torch.device) -> Case:
    """Every query with a weight of its own, which the forward pass doesn't know."""
    weights_T = torch.randn(spec.T, generator=torch.Generator().manual_seed(1)).to(device)
    return replace(cross_entropy.build(spec, device), upstream=weights_T)


def ways(case: Case) -> list[Way]:
    ours = [
        Way(name, partial(_step, name), ours=True, answer="sums")
        for name in library.names(op.IMPLEMENTATIONS)
    ]
    return [*ours, *losses.eager_ways(eager, "sums", lambda spec: 3 * spec.T * spec.I, "T x I")]


def _step(implementation: str, case: Case) -> Step:
    scale, eps = scale_and_eps(case)

    def forward() -> Tensor:
        return log_partition(
            case.leaves["queries"],
            case.leaves["table"],
            scale=scale,
            normalize_eps=eps,
            implementation=implementation,
        )

    return Step(forward, case.leaves)


def eager(case: Case) -> Tensor:
    return losses.logits(case).logsumexp(1)


exact = in_float64(partial(_step, "chunked"))
plain = as_it_is(lambda case: Step(lambda: eager(case), case.leaves))
