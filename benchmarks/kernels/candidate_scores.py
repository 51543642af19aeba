"""Measures gr_kernels.candidate_scores: scores of queries against candidate rows of a table.

The peer is what public code does: gather the candidates' rows, normalise them again, batched products (T x K x D
values stored several times).  T queries, I catalogue size, D width, K candidates a query.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import library, losses, shapes
from benchmarks.kernels.losses import EPS
from benchmarks.kernels.problem import Case, Step, Way, Work, always, as_it_is, in_float64
from benchmarks.kernels.shapes import LossSpec
from gr_kernels.candidate_scores import candidate_scores, op, reference
from gr_kernels.counter_random import derive_key, uniform_integers

NAME = "candidate_scores"
FORMULA = "FLOPs: 2 T K D forward, 4 T K D backward; bytes: T K gathered rows forward, twice that backward"


def specs(device: str, grid: str) -> list[LossSpec]:
    return shapes.candidate_scores(device, grid)


def build(spec: LossSpec, device: torch.device) -> Case:
    """Candidates drawn as training draws them."""
    generator = torch.Generator().manual_seed(0)
    leaves = losses.leaves(spec, device, generator)
    zeros_T = torch.zeros(spec.T, dtype=torch.int64)
    rows_TK = uniform_integers(derive_key(0, "benchmark"), torch.arange(spec.T), zeros_T, spec.K, spec.I)
    flops = 2.0 * spec.T * spec.K * spec.D
    moved = float(spec.T * spec.K * spec.D * leaves["table"].itemsize)
    return Case(
        spec=spec,
        leaves=leaves,
        upstream=torch.randn(spec.T, spec.K, generator=generator).to(device, leaves["table"].dtype),
        fixed={"rows": rows_TK.to(device)},
        work=Work(flops, 2 * flops, moved, 2 * moved),
        tokens=spec.T,
    )


def ways(case: Case) -> list[Way]:
    ours = [
        Way(
            name,
            partial(_step, name),
            _too_many_rows if name == "dense" else always,
            ours=True,
            answer="scores",
        )
        for name in library.names(op.IMPLEMENTATIONS)
    ]
    return [
        *ours,
        *losses.eager_ways(eager, "scores", lambda spec: 5.0 * spec.T * spec.K * spec.D, "T x K x D"),
    ]


def _step(implementation: str, case: Case) -> Step:
    queries, table, rows = case.leaves["queries"], case.leaves["table"], case.fixed["rows"]
    return Step(
        lambda: candidate_scores(queries, table, rows, normalize_eps=EPS, implementation=implementation),
        case.leaves,
    )


def _too_many_rows(case: Case) -> str:
    spec = losses.spec_of(case)
    return (
        f"all {spec.I:,} rows for {spec.K} candidates: seconds, for nothing" if spec.I > 200 * spec.K else ""
    )


def eager(case: Case) -> Tensor:
    return reference.candidate_scores(case.leaves["queries"], case.leaves["table"], case.fixed["rows"], EPS)


exact = in_float64(partial(_step, "gather"))
plain = as_it_is(lambda case: Step(lambda: eager(case), case.leaves))
