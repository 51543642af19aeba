"""Where the GPU time of a step goes: its kernels by what they do."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.problem import Step, gradients

STEPS = 5
# gr_kernels' own, named as in its triton_kernel.py files, and everybody else's.
ATTENTION = ("forward_kernel", "d_q_kernel", "d_kv_kernel", "delta_kernel", "table_gradients_kernel")
PRODUCTS = ("linear",)
# The first rule that the kernel's name matches; the rest is elementwise work: norms, gates, activations, copies.
RULES = (
    ("attention", re.compile(rf"^({'|'.join(ATTENTION)})$|attention|attn|flash|fmha", re.IGNORECASE)),
    (
        "products",
        re.compile(rf"^({'|'.join(PRODUCTS)})$|gemm|nvjet|xmma|cutlass|cublas|splitk", re.IGNORECASE),
    ),
)


def classify(kernel: str) -> str:
    return next((part for part, rule in RULES if rule.search(kernel)), "elementwise")


def measure(step: Step, upstream: Tensor) -> dict[str, Any]:
    """Shares of GPU time by part, and the ten kernels that take most of it, with theirs."""
    from torch.profiler import ProfilerActivity, profile

    gradients(step, upstream)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            gradients(step, upstream)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            times[event.key] = times.get(event.key, 0.0) + event.self_device_time_total
    total = sum(times.values())
    parts = dict.fromkeys([part for part, _ in RULES] + ["elementwise"], 0.0)
    for kernel, microseconds in times.items():
        parts[classify(kernel)] += microseconds / total
    largest = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {"parts": parts, "largest": {kernel[:120]: us / total for kernel, us in largest}}
