"""Times gr_kernels.hstu_attention on CPU, forward and backward, with position and time bias and their gradients.

    python benchmarks/kernels/hstu_attention_cpu.py [--threads 2] [--repeats 20] [--out results.json]

Shapes: ML-1M as HSTU's paper trains it (batch 128, at most 200 rows, one head of 50) and a Books-like one (batch 128,
at most 50 rows, four heads of 16). The baseline is what public code does: pad to the longest length, a logarithm and
a table look-up for every (query, key) of the batch, an N x N bias, batched matrix products, SiLU, mask, autograd.
All ways take turns in one process, so a busy machine disturbs them alike; each is weighed in a process of its own
(growth of its peak memory in one step). No time is printed for a way whose results are wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_kernels import RelativeBias, hstu_attention, native

BASELINE = "padded eager"
# Relative error against float64. The baseline's float32 logarithm puts times at the border in the bucket beside.
ALLOWED = {BASELINE: 1e-2, "reference": 1e-4, "cpp": 1e-4}


@dataclass(frozen=True)
class Shape:
    """B sequences of at most N rows; lengths log-normal with this mean of their logarithm, H heads of width Q = V."""

    B: int
    N: int
    H: int
    Q: int
    log_mean: float
    shortest: int


SHAPES = {
    "ML-1M": Shape(B=128, N=200, H=1, Q=50, log_mean=4.57, shortest=15),
    "Books": Shape(B=128, N=50, H=4, Q=16, log_mean=2.3, shortest=4),
}


@dataclass(frozen=True)
class Inputs:
    """Leaves (q, k, v, position table, time table), the rest of the call, and an upstream gradient."""

    leaves: tuple[Tensor, ...]
    offsets: Tensor
    query_times: Tensor
    key_times: Tensor
    d_out: Tensor
    shape: Shape


def make_inputs(shape: Shape) -> Inputs:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(shape.log_mean, 0.9, shape.B), shape.shortest, shape.N).astype(np.int64)
    rows = int(lengths.sum())
    gaps = (10 ** rng.uniform(0, 6, rows + 1)).astype(np.int64) * (rng.random(rows + 1) < 0.8)
    times = torch.from_numpy(gaps.cumsum() + 978_300_000)
    torch.manual_seed(0)
    qkv = [torch.randn(rows, shape.H, shape.Q) for _ in range(3)]
    tables = [torch.randn(shape.N) * 0.02, torch.randn(129) * 0.02]
    return Inputs(
        leaves=tuple(x.requires_grad_() for x in (*qkv, *tables)),
        offsets=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
        query_times=times[1:].contiguous(),
        key_times=times[:-1].contiguous(),
        d_out=torch.randn(rows, shape.H, shape.Q),
        shape=shape,
    )


def in_double(inputs: Inputs) -> Inputs:
    leaves = tuple(x.detach().double().requires_grad_() for x in inputs.leaves)
    return replace(inputs, leaves=leaves, d_out=inputs.d_out.double())


def padded_eager(inputs: Inputs) -> Tensor:
    """(T, H, V): the same attention over (B, N) padded tensors."""
    q, k, v, position, time_table = inputs.leaves
    shape, offsets = inputs.shape, inputs.offsets
    lengths = offsets.diff()
    real_BN = torch.arange(shape.N) < lengths[:, None]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(shape.B, shape.N, *x.shape[1:])
        padded[real_BN] = x
        return padded

    q_BNHQ, k_BNHQ, v_BNHV = pad(q), pad(k), pad(v)
    scores_BHNN = torch.einsum("bnhd,bmhd->bhnm", q_BNHQ, k_BNHQ)
    dt_BNN = pad(inputs.query_times)[:, :, None] - pad(inputs.key_times)[:, None, :]
    bucket_BNN = (dt_BNN.abs().clamp(min=1).float().log() / 0.301).long().clamp(0, 128)
    time_BNN = torch.index_select(time_table, 0, bucket_BNN.flatten()).view(bucket_BNN.shape)
    distance_NN = torch.arange(shape.N)[:, None] - torch.arange(shape.N)
    position_NN = torch.index_select(position, 0, distance_NN.clamp(min=0).flatten()).view(shape.N, shape.N)
    weights = torch.nn.functional.silu(scores_BHNN + (time_BNN + position_NN)[:, None]) / shape.N
    weights = weights * (distance_NN >= 0)
    out_BNHV = torch.einsum("bhnm,bmhd->bnhd", weights, v_BNHV)
    return out_BNHV[real_BN]


def jagged(inputs: Inputs, implementation: str) -> Tensor:
    q, k, v, position, time_table = inputs.leaves
    bias = RelativeBias(position, time_table, inputs.query_times, inputs.key_times)
    return hstu_attention(
        q,
        k,
        v,
        inputs.offsets,
        max_length=inputs.shape.N,
        divisor=inputs.shape.N,
        bias=bias,
        implementation=implementation,
    )


def step(way: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """The output and all gradients."""
    out = padded_eager(inputs) if way == BASELINE else jagged(inputs, way)
    return out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.d_out)


def peak_growth(shape: Shape, way: str, threads: int, answer: Any) -> None:
    """Sends the MiB by which one step raises the peak memory of this (fresh) process."""
    torch.set_num_threads(threads)
    inputs = make_inputs(shape)
    native.available()  # loading code is not the step's memory
    before = peak_mib()
    step(way, inputs)
    answer.send(peak_mib() - before)


def peak_mib() -> float:
    """Peak resident memory of this process. (On Linux ru_maxrss starts from the parent's at the fork: not that.)"""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def memory(shape: Shape, way: str, threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_growth, args=(shape, way, threads, sender))
    process.start()
    sender.close()
    value = float(receiver.recv())
    process.join()
    return value


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU milliseconds (all threads) of every call, taking turns, after a round that isn't counted."""
    taken: dict[str, dict[str, list[float]]] = {way: {"wall": [], "cpu": []} for way in calls}
    for round_ in range(repeats + 1):
        for way, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if round_:
                taken[way]["wall"].append(1e3 * (time.perf_counter() - wall))
                taken[way]["cpu"].append(1e3 * (time.process_time() - cpu))
    return taken


def wrong_by(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def measure(name: str, shape: Shape, repeats: int, threads: int) -> list[dict[str, Any]]:
    inputs = make_inputs(shape)
    rows, pairs = inputs.d_out.shape[0], int(inputs.offsets.diff().double().pow(2).sum())
    print(f"\n{name}: {shape}, {rows:,} rows ({rows / shape.B:.0f} a sequence), {threads} threads, float32")
    ways = [BASELINE, "reference", *(["cpp"] if native.available() else [])]
    expected = step("reference", in_double(inputs))
    errors = {way: wrong_by(step(way, inputs), expected) for way in ways}
    for way in [way for way, wrong in errors.items() if not wrong < ALLOWED[way]]:
        print(f"{way}: WRONG, off by {errors[way]:.1e}; not timed")
        ways.remove(way)
    taken = interleaved({way: (lambda way=way: step(way, inputs)) for way in ways}, repeats)
    results = []
    for way in ways:
        p10, p50, p90 = np.quantile(taken[way]["wall"], [0.1, 0.5, 0.9]).tolist()
        # Both passes' seven products over the causal half, 2 flops a multiply-add: forward 2, backward 5.
        flops = 7 * 2 * shape.H * shape.Q * (pairs + rows) / 2
        results.append(
            {
                "case": name,
                "way": way,
                "ms_p10": p10,
                "ms_p50": p50,
                "ms_p90": p90,
                "cpu_ms_p50": float(np.median(taken[way]["cpu"])),
                "gflops_p50": flops / p50 / 1e6,
                "peak_mib": memory(shape, way, threads),
                "relative_error": errors[way],
                "ratio": float(np.median(np.divide(taken[BASELINE]["wall"], taken[way]["wall"]))),
                "cpu_ratio": float(np.median(np.divide(taken[BASELINE]["cpu"], taken[way]["cpu"]))),
            }
        )
    return results


def show(results: list[dict[str, Any]]) -> None:
    """One line a way; ratios to the baseline are medians over rounds, above 1 when the way is faster."""
    heads = ["way", "p10 ms", "p50 ms", "p90 ms", "CPU ms", "GFLOP/s", "peak MiB", "x eager", "x eager CPU"]
    print(f"{heads[0]:<14}" + "".join(f"{head:>12}" for head in heads[1:]))
    keys = ["ms_p10", "ms_p50", "ms_p90", "cpu_ms_p50", "gflops_p50", "peak_mib", "ratio", "cpu_ratio"]
    for result in results:
        print(f"{result['way']:<14}" + "".join(f"{result[key]:>12.1f}" for key in keys))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds; every way runs once a round")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "command": " ".join(sys.argv),
    }
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    results = []
    for name, shape in SHAPES.items():
        rows = measure(name, shape, arguments.repeats, arguments.threads)
        show(rows)
        results += rows
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"environment": environment, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
