"""Measures gr_kernels.cross_entropy: the full softmax over a catalogue, without T x I logits in memory.

T queries, I catalogue size, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels import library, losses, shapes
from benchmarks.kernels.losses import scale_and_eps
from benchmarks.kernels.problem import Case, Step, Way, Work, as_it_is, in_float64
from benchmarks.kernels.shapes import LossSpec
from gr_kernels.log_partition import cross_entropy, op

NAME = "cross_entropy"
FORMULA = (
    "FLOPs: forward 2 T I D, backward 4 T I D (logits formed again aren't counted); ways that form gradients in the "
    "forward pass look slow there: compare both passes"
)
PRODUCTS, PRODUCT_ROWS = "products-only", 2048


def specs(device: str, grid: str) -> list[LossSpec]:
    return shapes.cross_entropy(device, grid)


def build(spec: LossSpec, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    leaves = losses.leaves(spec, device, generator)
    flops, size = 2.0 * spec.T * spec.I * spec.D, sum(x.nbytes for x in leaves.values())
    return Case(
        spec=spec,
        leaves=leaves,
        upstream=torch.ones((), device=device),
        fixed={"targets": torch.randint(0, spec.I, (spec.T,), generator=generator).to(device)},
        work=Work(flops, 2 * flops, size, size),
        tokens=spec.T,
    )


def ways(case: Case) -> list[Way]:
    return [
        *(
            Way(name, partial(_step, name), ours=True, answer="loss")
            for name in library.names(op.IMPLEMENTATIONS)
        ),
        *losses.eager_ways(eager, "loss", lambda spec: 3 * spec.T * spec.I, "T x I"),
        Way(
            PRODUCTS,
            _products_only,
            answer="",
            note=f"three products, {PRODUCT_ROWS} queries at a time, no softmax",
        ),
    ]


def _step(implementation: str, case: Case) -> Step:
    queries, table, targets = case.leaves["queries"], case.leaves["table"], case.fixed["targets"]
    scale, eps = scale_and_eps(case)

    def forward() -> Tensor:
        return cross_entropy(
            queries, table, targets, scale=scale, normalize_eps=eps, implementation=implementation
        )

    return Step(forward, case.leaves)


def eager(case: Case) -> Tensor:
    return F.cross_entropy(losses.logits(case), case.fixed["targets"], reduction="sum")


class _Products(torch.autograd.Function):
    """The three products that any way must form."""

    @staticmethod
    def forward(ctx: Any, queries_TD: Tensor, table_ID: Tensor) -> Tensor:
        d_queries, d_table = torch.empty_like(queries_TD), torch.zeros_like(table_ID)
        for start in range(0, len(queries_TD), PRODUCT_ROWS):
            rows = slice(start, start + PRODUCT_ROWS)
            logits = queries_TD[rows] @ table_ID.t()
            d_queries[rows] = logits @ table_ID
            d_table.addmm_(logits.t(), queries_TD[rows])
        ctx.save_for_backward(d_queries, d_table)
        return queries_TD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(ctx.saved_tensors)


def _products_only(case: Case) -> Step:
    return Step(lambda: _Products.apply(case.leaves["queries"], case.leaves["table"]), case.leaves)


exact = in_float64(partial(_step, "chunked"))
plain = as_it_is(lambda case: Step(lambda: eager(case), case.leaves))
