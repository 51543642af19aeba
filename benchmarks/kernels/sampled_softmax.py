"""Measures gr_kernels.sampled_softmax: the loss of a target among sampled negatives, each position's own or shared.

T queries, I catalogue size, D width, K negatives.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels import library, losses, shapes
from benchmarks.kernels.losses import scale_and_eps
from benchmarks.kernels.problem import Case, Step, Way, Work, as_it_is, in_float64
from benchmarks.kernels.shapes import LossSpec
from gr_kernels.counter_random import derive_key, uniform_integers
from gr_kernels.sampled_softmax import op, sampled_softmax

NAME = "sampled_softmax"
FORMULA = "FLOPs: 2 T (K + 1) D forward, 4 T (K + 1) D backward; bytes: each gathered row once a pass (shared: once)"


def specs(device: str, grid: str) -> list[LossSpec]:
    return shapes.sampled_softmax(device, grid)


def build(spec: LossSpec, device: torch.device) -> Case:
    """Targets and negatives drawn as training draws them."""
    generator = torch.Generator().manual_seed(0)
    leaves = losses.leaves(spec, device, generator)
    samples = 1 if spec.shared else spec.T
    zeros = torch.zeros(samples, dtype=torch.int64)
    negatives = uniform_integers(derive_key(0, "benchmark"), torch.arange(samples), zeros, spec.K, spec.I)
    flops = 2.0 * spec.T * (spec.K + 1) * spec.D
    rows = 2.0 * spec.T + spec.K if spec.shared else float(spec.T * (spec.K + 2))
    moved = rows * spec.D * leaves["table"].itemsize
    return Case(
        spec=spec,
        leaves=leaves,
        upstream=torch.ones((), device=device),
        fixed={
            "targets": torch.randint(0, spec.I, (spec.T,), generator=generator).to(device),
            "negatives": (negatives[0] if spec.shared else negatives).to(device),
        },
        work=Work(flops, 2 * flops, moved, 2 * moved),
        tokens=spec.T,
    )


def ways(case: Case) -> list[Way]:
    def values(spec: LossSpec) -> float:
        return 3.0 * spec.T * spec.K if spec.shared else 5.0 * spec.T * spec.K * spec.D

    return [
        *(
            Way(name, partial(_step, name), ours=True, answer="loss")
            for name in library.names(op.IMPLEMENTATIONS)
        ),
        *losses.eager_ways(eager, "loss", values, "T x K" if losses.spec_of(case).shared else "T x K x D"),
    ]


def _step(implementation: str, case: Case) -> Step:
    tensors = (*case.leaves.values(), case.fixed["targets"], case.fixed["negatives"])
    scale, eps = scale_and_eps(case)

    def forward() -> Tensor:
        return sampled_softmax(*tensors, scale=scale, normalize_eps=eps, implementation=implementation)

    return Step(forward, case.leaves)


def eager(case: Case) -> Tensor:
    """As public code does it: gathered rows, normalised anew; one product where the negatives are shared."""
    scale, eps = scale_and_eps(case)
    queries, table = case.leaves["queries"], case.leaves["table"]
    targets_T, negatives = case.fixed["targets"], case.fixed["negatives"]
    rows = losses.normalized(F.embedding(negatives, table), eps)
    negative_TK = queries @ rows.t() if negatives.dim() == 1 else torch.einsum("td,tkd->tk", queries, rows)
    positive_T1 = (queries * losses.normalized(F.embedding(targets_T, table), eps)).sum(-1, keepdim=True)
    negative_TK = negative_TK.masked_fill(negatives == targets_T[:, None], -torch.inf)
    logits = scale * torch.cat([positive_T1, negative_TK], dim=1)
    first = torch.zeros_like(targets_T)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), first, reduction="sum"
    )


exact = in_float64(partial(_step, "scores"))
plain = as_it_is(lambda case: Step(lambda: eager(case), case.leaves))
