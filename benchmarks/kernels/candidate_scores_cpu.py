"""Times gr_kernels.candidate_scores and gr_kernels.log_partition on CPU, forward and backward.

    python benchmarks/kernels/candidate_scores_cpu.py [--threads 2] [--repeats 10] [--out results.json]

Two shapes of sampled scores: ML-1M as HSTU's paper trains it (T tokens of a batch, K = 1 + 128 negatives a token)
and a Books-sized catalogue with 512 negatives. The baseline is what public code does: gather the candidates' rows,
normalise them again, batched dot products, autograd (T x K x D values stored several times). Every way is timed in
one run and, each in a process of its own, weighed: the growth of its peak memory over what its inputs take. No
time is printed for a way whose results are wrong. Then the full softmax at ML-1M's shape, against plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.candidate_scores import candidate_scores, explain, reference
from gr_kernels.counter_random import derive_key, uniform_integers
from gr_kernels.log_partition import cross_entropy, reference as full_reference

EPS = 1e-6
SHAPES = {
    "ML-1M, 128 negatives": {"T": 14_500, "I": 3_883, "D": 50, "K": 129},
    "Books-sized, 512 negatives": {"T": 2_500, "I": 695_762, "D": 64, "K": 513},
}
SOFTMAX = {"T": 14_000, "I": 3_883, "D": 64}
BASELINE = "eager gather"
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(T: int, I: int, D: int, K: int) -> Problem:
    """Unit queries, a table, candidates drawn as training draws them, an upstream gradient."""
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(T, D), dim=-1).requires_grad_()
    table = torch.randn(I, D).requires_grad_()
    rows = uniform_integers(
        derive_key(0, "benchmark"), torch.arange(T), torch.zeros(T, dtype=torch.int64), K, I
    )
    return queries, table, rows, torch.randn(T, K)


def step(way: str, inputs: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and both gradients."""
    queries, table, rows, grad = inputs
    if way == BASELINE:
        scores = reference.candidate_scores(queries, table, rows, EPS)
    else:
        scores = candidate_scores(queries, table, rows, normalize_eps=EPS, implementation=way)
    return scores.detach(), *torch.autograd.grad(scores, (queries, table), grad)


def milliseconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """p10, p50, p90 of the wall time, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()


def peak_mib() -> float:
    """Peak resident memory of this process since its start (getrusage's would be its parent's, where larger)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


def peak_growth(shape: dict[str, int], way: str, threads: int, answer: Any) -> None:
    """Sends the MiB by which one step raises the peak memory of this (fresh) process."""
    torch.set_num_threads(threads)
    inputs = problem(**shape)
    before = peak_mib()
    step(way, inputs)
    answer.send(peak_mib() - before)


def memory(shape: dict[str, int], way: str, threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_growth, args=(shape, way, threads, sender))
    process.start()
    sender.close()
    value = receiver.recv()
    process.join()
    return value


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def sampled(
    name: str, shape: dict[str, int], ways: list[str], repeats: int, threads: int
) -> list[dict[str, Any]]:
    inputs = problem(**shape)
    wanted = step(BASELINE, inputs)
    print(f"\n{name}: " + ", ".join(f"{k}={v:,}" for k, v in shape.items()) + f", {threads} threads, float32")
    print(f"'auto' would take: {explain(shape['T'], shape['K'], shape['I'])}")
    results = []
    for way in ways:
        errors = [relative_error(a, b) for a, b in zip(step(way, inputs), wanted)]
        if max(errors) > 1e-4:
            print(f"{way}: WRONG, off by {max(errors):.1e}; not timed")
            continue
        slow = way != "cpp"
        p10, p50, p90 = milliseconds(
            lambda way=way: step(way, inputs), max(3, repeats // 4) if slow else repeats
        )
        results.append({"case": name, "way": way, "ms_p10": p10, "ms_p50": p50, "ms_p90": p90})
        if sys.platform == "linux":
            results[-1]["peak_mib"] = memory(shape, way, threads)
        results[-1]["max_relative_error"] = max(errors)
    show(results, [BASELINE, "dense"])
    return results


def show(results: list[dict[str, Any]], against: list[str]) -> None:
    """One line a way; ratios are of medians, above 1 when the way is faster."""
    medians = {r["way"]: r["ms_p50"] for r in results}
    against = [name for name in against if name in medians]
    print(
        f"{'way':<16}{'p10':>10}{'p50':>10}{'p90':>10} ms   peak MiB"
        + "".join(f"{'/ ' + n:>18}" for n in against)
    )
    for r in results:
        ratios = "".join(f"{medians[name] / r['ms_p50']:>17.2f}x" for name in against)
        peak = f"{r['peak_mib']:>11.0f}" if "peak_mib" in r else f"{'':>11}"
        print(f"{r['way']:<16}{r['ms_p10']:>10.1f}{r['ms_p50']:>10.1f}{r['ms_p90']:>10.1f}   {peak}{ratios}")


def softmax(repeats: int, threads: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(SOFTMAX["T"], SOFTMAX["D"]), dim=-1).requires_grad_()
    table = torch.randn(SOFTMAX["I"], SOFTMAX["D"]).requires_grad_()
    targets = torch.randint(0, SOFTMAX["I"], (SOFTMAX["T"],))
    name = "full softmax"
    print(
        f"\n{name}: " + ", ".join(f"{k}={v:,}" for k, v in SOFTMAX.items()) + f", {threads} threads, float32"
    )
    ways: dict[str, Callable[[], Tensor]] = {
        "plain PyTorch": lambda: full_reference.cross_entropy(queries, table, targets, None, 20.0, EPS),
        "cross_entropy": lambda: cross_entropy(queries, table, targets, scale=20.0, normalize_eps=EPS),
    }
    results = []
    for way, loss in ways.items():
        p10, p50, p90 = milliseconds(
            lambda loss=loss: torch.autograd.grad(loss(), (queries, table)), max(3, repeats // 2)
        )
        results.append({"case": name, "way": way, "ms_p10": p10, "ms_p50": p50, "ms_p90": p90})
    show(results, ["plain PyTorch"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--repeats", type=int, default=10, help="timed calls of the C++ way; fewer of the slow ones"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, python {platform.python_version()}"
    )
    native_ways = ["cpp"] if native.available() else []
    small, large = SHAPES
    results = [
        *sampled(
            small,
            SHAPES[small],
            [BASELINE, "dense", "gather", *native_ways],
            arguments.repeats,
            arguments.threads,
        ),
        # dense would be 2,500 x 695,762 scores three times over: seconds, for nothing
        *sampled(
            large, SHAPES[large], [BASELINE, "gather", *native_ways], arguments.repeats, arguments.threads
        ),
        *softmax(arguments.repeats, arguments.threads),
    ]
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
