"""Times gr_kernels.log_partition.cross_entropy on CPU, value and gradients: the C++ operator against chunks of GEMMs.

    python benchmarks/kernels/cross_entropy_cpu.py [--threads 1] [--pairs 7] [--width 64] [--out results.json]

The full softmax of ML-1M: T = 14,000 tokens of a batch against I = 3,883 items, float32. The two ways run in turn,
pair by pair, so that whatever else the machine does meets both; the ratio is the median of the pairs' ratios. Times
are the CPU time of the process (all its threads, their waiting included), which other processes disturb least, and
the wall time. No time is printed when the two disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels import native
from gr_kernels.log_partition import cross_entropy

T, I = 14_000, 3_883
SCALE, EPS = 20.0, 1e-6
WAYS = ("cpp", "chunked")


def steps(width: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """For each way: the loss and the gradients of queries and table, on the same inputs."""
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(T, width), dim=-1).requires_grad_()
    table = torch.randn(I, width).requires_grad_()
    targets = torch.randint(0, I, (T,))

    def step(way: str) -> tuple[Tensor, ...]:
        loss = cross_entropy(queries, table, targets, scale=SCALE, normalize_eps=EPS, implementation=way)
        return loss.detach(), *torch.autograd.grad(loss, (queries, table))

    return {way: lambda way=way: step(way) for way in WAYS}


def timed(step: Callable[[], tuple[Tensor, ...]]) -> tuple[float, float]:
    """CPU and wall milliseconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7, help="timed calls of each way")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    if not native.available():
        sys.exit(f"nothing to compare: {native.why_unavailable()}")
    torch.set_num_threads(arguments.threads)
    ways = steps(arguments.width)
    for got, wanted in zip(*(ways[way]() for way in WAYS)):
        error = float((got - wanted).abs().max() / wanted.abs().max())
        if error > 1e-4:
            sys.exit(f"the ways disagree by {error:.1e} of the largest value: nothing timed")
    pairs = [{way: timed(ways[way]) for way in WAYS} for _ in range(arguments.pairs)]
    flops = 6.0 * T * I * arguments.width
    print(
        f"T={T:,}, I={I:,}, D={arguments.width}, {arguments.threads} threads, float32, torch {torch.__version__}"
    )
    results = {}
    for way in WAYS:
        cpu, wall = (median(pair[way][kind] for pair in pairs) for kind in (0, 1))
        results[way] = {"cpu_ms_p50": cpu, "wall_ms_p50": wall, "gflops_per_cpu_second": flops / cpu / 1e6}
        print(
            f"{way:<8} {cpu:>8.1f} ms CPU {wall:>8.1f} ms wall {flops / cpu / 1e6:>7.1f} GFLOP per CPU second"
        )
    for kind, name in enumerate(("cpu", "wall")):
        ratio = median(pair["chunked"][kind] / pair["cpp"][kind] for pair in pairs)
        results[f"{name}_ratio"] = ratio
        print(f"chunked / cpp, {name} time: {ratio:.2f}")
    if arguments.out:
        shape = {"T": T, "I": I, "D": arguments.width, "threads": arguments.threads}
        arguments.out.write_text(json.dumps({"shape": shape, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
