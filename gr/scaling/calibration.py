"""What this machine's processor does, measured in a second or two: the figures that a plan for CPUs counts with.

They are of CPU time, so that a machine that others use as well measures as an idle one would, but for its caches.

Shapes: T rows, D and E widths, N length of a sequence, H heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from gr.scaling.flops import ATTENTION_BACKWARD
from gr.scaling.machine import Machine, cpu
from gr_kernels.hstu_attention import hstu_attention

SECONDS = 0.1
"""Of each measurement."""
T, D, E = 8192, 64, 256
N, H, Q = 100, 2, 32
TINY = 16


def seconds_of(step: Callable[[], object], budget: float = SECONDS) -> float:
    """CPU seconds of a call, the mean of as many as fit."""
    step()
    calls, started, spent = 0, time.process_time(), 0.0
    while spent < budget:
        step()
        calls += 1
        spent = time.process_time() - started
    return spent / calls


def calibrated(per_machine: int = 1) -> Machine:
    """This machine, with one thread a process: products of the shapes that models have and attention, forward and
    backward; what goes through a tensor number by number (a sum, a product, an activation, a norm and an exponential
    with their gradients, a draw); and what starting an operation takes."""
    x_TD, w_ED = torch.randn(T, D, requires_grad=True), torch.randn(E, D, requires_grad=True)
    d_TE = torch.ones(T, E)
    products = 3 * 2 * T * D * E / seconds_of(lambda: F.linear(x_TD, w_ED).backward(d_TE))
    q_THQ, k_THQ, v_THQ = (torch.randn(T // N * N, H, Q, requires_grad=True) for _ in range(3))
    offsets, d_THQ = torch.arange(0, len(q_THQ) + 1, N), torch.ones(len(q_THQ), H, Q)
    attending = 2 * 2 * Q * H * N * N * (len(q_THQ) // N) / 2

    def attend() -> None:
        out_THQ = hstu_attention(q_THQ, k_THQ, v_THQ, offsets, max_length=N, divisor=float(N))
        out_THQ.backward(d_THQ)

    attention = (1 + ATTENTION_BACKWARD) * attending / seconds_of(attend)
    y_TE, z_TE = torch.randn(T, E), torch.randn(T, E, requires_grad=True)
    words = torch.empty(T * E // 4, dtype=torch.int64)
    size = 4 * y_TE.numel()
    mixed = [
        (3 * size, lambda: y_TE + y_TE),
        (3 * size, lambda: y_TE * d_TE),
        (5 * size, lambda: F.silu(z_TE).backward(d_TE)),
        (5 * size, lambda: F.layer_norm(z_TE, (E,)).backward(d_TE)),
        (5 * size, lambda: F.log_softmax(z_TE, 1).backward(d_TE)),
        (2 * T * E, lambda: words.random_(-(1 << 63), None)),
    ]
    moved = sum(moved for moved, _ in mixed) / sum(seconds_of(step, SECONDS / 4) for _, step in mixed)
    tiny = torch.randn(TINY, requires_grad=True)
    call = seconds_of(lambda: tiny * 2.0)
    settings = {"fp32": products, "bf16": products, "products": 1.0, "attention": attention / products}
    settings |= {
        "speed": moved,
        "moved": 1.0,
        "link": moved / 2,
        "network": moved / 2,
        "exchanged": 1.0,
        "call": call,
    }
    return cpu(per_machine).changed([f"{name}={value!r}" for name, value in settings.items()])
