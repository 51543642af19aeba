"""Measures gr_kernels.bias_table_gradient: the gradients of scores summed by bucket.

The scores are those of full causal sequences; those above the diagonal have no bucket. B sequences of N rows, M = B N^2
values, E entries of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels import library, shapes
from benchmarks.kernels.hstu_attention import BUCKETS
from benchmarks.kernels.peers import compiled
from benchmarks.kernels.problem import Case, Step, Way, Work, as_it_is, in_float64
from benchmarks.kernels.shapes import TableSpec
from gr_kernels.bias_table_gradient import bias_table_gradient, op

NAME = "bias_table_gradient"
FORMULA = (
    "bytes: every value and its bucket read once, the table written once; no backward pass: it is of one"
)
ANSWER = "sums"


def specs(device: str, grid: str) -> list[TableSpec]:
    return shapes.bias_table_gradient(device, grid)


def build(spec: TableSpec, device: torch.device) -> Case:
    """The values are the upstream gradient: of the scores."""
    entries = spec.N if spec.table == "position" else BUCKETS.count
    row_N = torch.arange(spec.N, device=device)
    bucket_BNN = (row_N[:, None] - row_N).expand(spec.B, -1, -1)
    if spec.table == "time":
        time_BN = _times(spec).to(device)
        bucket_BNN = BUCKETS.bucket(time_BN[:, :, None] - time_BN[:, None, :])
    bucket_BNN = bucket_BNN.masked_fill(row_N[:, None] < row_N, -1).to(getattr(torch, spec.index))
    values = torch.randn(spec.B, spec.N, spec.N, generator=torch.Generator().manual_seed(0))
    upstream = values.to(device, getattr(torch, spec.dtype))
    read = float(upstream.nbytes + bucket_BNN.nbytes)
    return Case(
        spec=spec,
        leaves={},
        upstream=upstream,
        fixed={"buckets": bucket_BNN, "entries": entries},
        work=Work(0.0, 0.0, read + 4.0 * entries, 0.0),
        tokens=upstream.numel(),
    )


def _times(spec: TableSpec) -> Tensor:
    """(B, N) int64 seconds, ascending, with ties."""
    rng = np.random.default_rng(0)
    gaps = (10 ** rng.uniform(0, 6, (spec.B, spec.N))).astype(np.int64) * (rng.random((spec.B, spec.N)) < 0.8)
    return torch.from_numpy(gaps.cumsum(1))


def ways(case: Case) -> list[Way]:
    ours = []
    for name in library.names(op.IMPLEMENTATIONS):
        ours.append(Way(name, partial(_step, name, False), ours=True, answer=ANSWER))
        if name == "cuda":
            ours.append(Way("cuda-deterministic", partial(_step, name, True), ours=True, answer=ANSWER))
    peers: dict[str, Callable[[Case], Step]] = {
        "eager": _eager_step,
        "compiled": lambda case: Step(compiled(lambda: eager(case)), {}),
        "bincount": lambda case: Step(lambda: bincount(case), {}),
    }
    notes = {"eager": "index_add", "bincount": "torch.bincount with weights"}
    return [*ours, *(Way(n, bind, answer=ANSWER, note=notes.get(n, "")) for n, bind in peers.items())]


def _step(implementation: str, deterministic: bool, case: Case) -> Step:
    keywords = {"deterministic": deterministic, "implementation": implementation}
    values, buckets, entries = case.upstream, case.fixed["buckets"], case.fixed["entries"]
    return Step(lambda: bias_table_gradient(values, buckets, entries, **keywords), {})


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32)).flatten()


def eager(case: Case) -> Tensor:
    """Values without a bucket go to an entry of their own."""
    values_M, entries = _at_least_float32(case.upstream), case.fixed["entries"]
    bucket_M = case.fixed["buckets"].flatten()
    slot_M = torch.where(bucket_M < 0, entries, bucket_M)
    return values_M.new_zeros(entries + 1).index_add_(0, slot_M, values_M)[:entries]


def bincount(case: Case) -> Tensor:
    slot_M = case.fixed["buckets"].flatten() + 1
    counted = torch.bincount(slot_M, _at_least_float32(case.upstream), minlength=case.fixed["entries"] + 1)
    return counted[1:]


def _eager_step(case: Case) -> Step:
    return Step(lambda: eager(case), {})


exact, plain = in_float64(_eager_step), as_it_is(_eager_step)
