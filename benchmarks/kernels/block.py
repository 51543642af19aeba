"""Measures a whole HSTU layer: norm, uvqk projection, SiLU, attention, norm times gate, dropout, output projection,
residual.

B sequences, T rows in the batch, N longest sequence, H heads, D model width (H times the width of a head).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels import hstu_attention as attention, padding, peers, shapes, shares
from benchmarks.kernels.problem import Case, Step, Way, Work, gradients, in_double
from benchmarks.kernels.shapes import BlockSpec
from gr_kernels.hstu_attention import hstu_attention
from gr_kernels.hstu_attention.reference import definition as specification

NAME = "block"
FORMULA = (
    "FLOPs: attention 4 H Q sum(n^2) / 2, projections 2 T D (4 D + D); backward 2.5 x and 2 x (nothing computed again "
    "is counted)"
)
EPS = 1e-6
KEY = 0x1234_5678_9ABC_DEF0


def specs(device: str, grid: str) -> list[BlockSpec]:
    return shapes.block(device, grid)


def build(spec: BlockSpec, device: torch.device) -> Case:
    inner = attention.build(spec.attention, device)
    generator = torch.Generator().manual_seed(1)
    dtype, T, D = getattr(torch, spec.dtype), inner.tokens, spec.attention.H * spec.attention.D

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()

    leaves = {
        "x": normal(T, D),
        "uvqk": normal(4 * D, D, std=D**-0.5),
        "output": normal(D, D, std=D**-0.5),
        "output_bias": normal(D),
        **{name: x for name, x in inner.leaves.items() if name in ("position", "time")},
    }
    projections = 10.0 * T * D * D
    row_bytes = T * D * dtype.itemsize
    weight_bytes = 5 * D * D * dtype.itemsize
    flops = inner.work.flops_forward
    case = Case(
        spec=replace(spec, dropout=0.0),
        leaves=leaves,
        upstream=normal(T, D).detach(),
        fixed=inner.fixed,
        work=Work(
            flops + projections,
            2.5 * flops + 2 * projections,
            2 * row_bytes + weight_bytes,
            3 * row_bytes + 2 * weight_bytes,
        ),
        tokens=T,
    )
    return replace(case, spec=spec, for_gate=case)


def ways(case: Case) -> list[Way]:
    return [
        Way("fused", _fused(recompute=True), ours=True, answer="block"),
        Way("fused-keep", _fused(recompute=False), ours=True, answer="block", note="recompute=False"),
        Way("unfused", lambda case: Step(lambda: unfused(case), case.leaves), ours=True, answer="block"),
        _peer("eager", lambda case: Step(lambda: eager(case), case.leaves)),
        _peer("compiled", lambda case: Step(peers.compiled(lambda: eager(case)), case.leaves)),
    ]


def _peer(name: str, bind: Callable[[Case], Step]) -> Way:
    def too_large(case: Case) -> str:
        return peers.too_large(replace(case, spec=_spec(case).attention))

    return Way(name, bind, too_large, answer="block", slack=peers.LOGARITHM, note=peers.LOGARITHM_NOTE)


def _spec(case: Case) -> BlockSpec:
    assert isinstance(case.spec, BlockSpec)
    return case.spec


def _attention_arguments(case: Case) -> dict[str, Any]:
    """hstu_attention()'s keywords."""
    return attention.settings(replace(case, spec=_spec(case).attention))


def _split(uvqk: Tensor, case: Case) -> list[Tensor]:
    """u, v, q, k of (..., 4 D), the last three (..., H, Q)."""
    u, *vqk = uvqk.chunk(4, dim=-1)
    return [u, *(x.unflatten(-1, (_spec(case).attention.H, -1)) for x in vqk)]


def _fused(recompute: bool) -> Callable[[Case], Step]:
    def bind(case: Case) -> Step:
        fused_layer: Any = importlib.import_module("gr_kernels.fused_layer")
        leaves, keywords, dropout = case.leaves, _attention_arguments(case), _spec(case).dropout
        heads, widths = _spec(case).attention.H, [leaves["x"].shape[1]] * 4

        def forward() -> Tensor:
            parts = fused_layer.norm_linear_silu_parts(
                leaves["x"], leaves["uvqk"], widths, eps=EPS, recompute=recompute
            )
            u, (v, q, k) = parts[0], (part.unflatten(-1, (heads, -1)) for part in parts[1:])
            attended = hstu_attention(q, k, v, case.fixed["offsets"], **keywords).flatten(1)
            out: Tensor = fused_layer.gated_output(
                attended, u, leaves["x"], leaves["output"], leaves["output_bias"],
                eps=EPS, dropout=dropout, dropout_key=KEY, recompute=recompute,
            )  # fmt: skip
            return out

        return Step(forward, leaves)

    return bind


def unfused(case: Case, attend: Callable[..., Tensor] = hstu_attention, **more: Any) -> Tensor:
    """The layer with one PyTorch operator after the other around gr_kernels' attention."""
    leaves = case.leaves
    x, D = leaves["x"], leaves["x"].shape[1:]
    u, v, q, k = _split(F.silu(F.linear(F.layer_norm(x, D, eps=EPS), leaves["uvqk"])), case)
    keywords = _attention_arguments(case) | more
    if attend is specification:
        keywords = attention.of_specification(keywords, x.dtype)
    attended = attend(q, k, v, case.fixed["offsets"], **keywords).flatten(1)
    gated = F.dropout(u * F.layer_norm(attended, D, eps=EPS), _spec(case).dropout)
    return x + F.linear(gated, leaves["output"], leaves["output_bias"])


def eager(case: Case) -> Tensor:
    """The layer on padded rows, as public HSTU code computes it: norms, projections and dropout on the padding too."""
    spec, fixed, leaves = _spec(case).attention, case.fixed, case.leaves
    to_pad = (leaves["x"], fixed["query_times"], fixed["key_times"])
    x, *times = (padding.pad(each, fixed["index"], spec.B, spec.N) for each in to_pad)
    D = x.shape[-1:]
    u, v, q, k = _split(F.silu(F.linear(F.layer_norm(x, D, eps=EPS), leaves["uvqk"])), case)
    bias = peers.padded_bias(leaves.get("position"), leaves.get("time"), *times)
    attended = peers.padded_attention(q, k, v, bias, spec.D**-0.5, float(spec.N)).flatten(2)
    gated = F.dropout(u * F.layer_norm(attended, D, eps=EPS), _spec(case).dropout)
    out = x + F.linear(gated, leaves["output"], leaves["output_bias"])
    return padding.unpad(out, fixed["index"])


def exact(case: Case, answer: str) -> dict[str, Tensor]:
    double = in_double(case)
    step = Step(lambda: unfused(double, implementation="blocked"), double.leaves)
    return gradients(step, double.upstream)


def plain(case: Case, answer: str) -> dict[str, Tensor]:
    return gradients(Step(lambda: unfused(case, specification), case.leaves), case.upstream)


def extra(step: Step, case: Case) -> dict[str, Any]:
    """Where the time of a step goes, on a GPU."""
    return {"shares": shares.measure(step, case.upstream)} if case.device.type == "cuda" else {}
