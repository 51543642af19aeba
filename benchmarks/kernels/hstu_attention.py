"""Measures gr_kernels.hstu_attention: causal attention on jagged sequences, with and without relative bias.

B sequences, T rows in the batch, N longest sequence, H heads, D width of a head.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels import padding, peers, shapes
from benchmarks.kernels.problem import Case, Step, Way, Work, gradients, in_double
from benchmarks.kernels.shapes import AttentionSpec
from gr_kernels.hstu_attention import RelativeBias, TimeBuckets, hstu_attention
from gr_kernels.hstu_attention.op import IMPLEMENTATIONS
from gr_kernels.hstu_attention.reference import definition as specification

NAME = "hstu_attention"
FORMULA = "FLOPs: forward 4 H D sum(n^2) / 2 (two products over the causal half), backward 2.5 x forward"
BUCKETS = TimeBuckets("log", 129, 0.301)


def specs(device: str, grid: str) -> list[AttentionSpec]:
    return shapes.attention(device, grid)


def build(spec: AttentionSpec, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    lengths = spec.draw()
    T = int(lengths.sum())
    dtype = getattr(torch, spec.dtype)
    leaves = {name: torch.randn(T, spec.H, spec.D, generator=generator).to(device, dtype) for name in "qkv"}
    if spec.bias != "none":
        leaves["position"] = torch.randn(spec.N, generator=generator).to(device)
    if spec.bias == "position+time":
        leaves["time"] = torch.randn(BUCKETS.count, generator=generator).to(device)
    rng = np.random.default_rng(0)
    gaps = (10 ** rng.uniform(0, 6, T + 1)).astype(np.int64) * (rng.random(T + 1) < 0.8)
    times = torch.from_numpy(gaps.cumsum() + 978_300_000).to(device)
    offsets = torch.tensor([0, *itertools.accumulate(lengths.tolist())], device=device)
    flops = 4 * spec.H * spec.D * float((lengths.astype(np.float64) ** 2).sum()) / 2
    rows = T * spec.H * spec.D * dtype.itemsize
    return Case(
        spec=spec,
        leaves={name: x.requires_grad_() for name, x in leaves.items()},
        upstream=torch.randn(T, spec.H, spec.D, generator=generator).to(device, dtype),
        fixed={
            "offsets": offsets,
            "offsets32": offsets.int(),
            "index": padding.index(offsets, spec.N),
            "query_times": times[1:].contiguous(),
            "key_times": times[:-1].contiguous(),
        },
        work=Work(flops, 2.5 * flops, 4 * rows, 7 * rows),
        tokens=T,
    )


def settings(case: Case, activation: str = "silu", **more: Any) -> dict[str, Any]:
    """hstu_attention()'s keyword arguments."""
    spec = case.spec
    assert isinstance(spec, AttentionSpec)
    return {
        "max_length": spec.N,
        "divisor": float(spec.N),
        "scale": spec.D**-0.5,
        "activation": activation,
        "bias": relative_bias(case),
        **more,
    }


def relative_bias(case: Case) -> RelativeBias:
    query_times, key_times = case.fixed["query_times"], case.fixed["key_times"]
    if "time" not in case.leaves:
        query_times, key_times = None, None
    return RelativeBias(case.leaves.get("position"), case.leaves.get("time"), query_times, key_times, BUCKETS)


def ways(case: Case) -> list[Way]:
    """Ours, then the peers."""
    names = [way.name for way in IMPLEMENTATIONS if way.name not in ("blocked", "reference")]
    ours = [_ours(name, name) for name in names]
    ours += [_ours(f"{name}-deterministic", name, deterministic=True) for name in names if name != "cpp"]
    ours += [_ours(f"{name}-softmax", name, activation="softmax") for name in names]
    return [*ours, replace(_ours("blocked", "blocked"), ours=False), *peers.attention()]


def _ours(name: str, implementation: str, activation: str = "silu", **more: Any) -> Way:
    def arguments(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
        tensors = [*(case.leaves[x] for x in "qkv"), case.fixed["offsets"]]
        return tensors, settings(case, activation, implementation=implementation, **more)

    def bind(case: Case) -> Step:
        tensors, keywords = arguments(case)
        return Step(lambda: hstu_attention(*tensors, **keywords), case.leaves)

    return Way(name, bind, ours=True, answer=activation)


def exact(case: Case, answer: str) -> dict[str, Tensor]:
    """Of a case in float64, in blocks, which the tests hold to the definition."""
    double = in_double(case)
    return gradients(_ours("", "blocked", answer).bind(double), double.upstream)


def plain(case: Case, answer: str) -> dict[str, Tensor]:
    """The specification in the case's dtype: one sequence after the other, every score in memory."""
    q, k, v = (case.leaves[name] for name in "qkv")
    keywords = of_specification(settings(case, answer), q.dtype)
    step = Step(lambda: specification(q, k, v, case.fixed["offsets"], **keywords), case.leaves)
    return gradients(step, case.upstream)


def of_specification(keywords: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """hstu_attention()'s keywords as specification() takes them: no max_length, tables in the dtype of the rows."""
    bias = keywords["bias"]
    tables = {name: getattr(bias, name) for name in ("position", "time")}
    narrow = {name: None if table is None else table.to(dtype) for name, table in tables.items()}
    return {name: x for name, x in keywords.items() if name != "max_length"} | {
        "bias": replace(bias, **narrow)
    }
