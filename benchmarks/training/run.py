"""Training throughput on CPU: gr beside a plain padded trainer, steps interleaved on the same batches.

python benchmarks/training/run.py --shape ml-1m --data data/ml-1m --seconds 60 --threads 2

Prints a table a shape and writes benchmarks/results/training.json and .png; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces itself otherwise

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.training import loss_alone, report, shares  # noqa: E402
from benchmarks.training.memory import peak_mib  # noqa: E402
from benchmarks.training.shapes import (  # noqa: E402
    ML_1M,
    SHAPES,
    Shape,
    batches,
    generate,
    read,
    training_samples,
)
from benchmarks.training.sides import SIDES, Side  # noqa: E402
from gr.data.sequences import Sequences  # noqa: E402
from gr.errors import UserError, program  # noqa: E402
from gr.train import environment  # noqa: E402

LEAST_PAIRS = 3
WARM_UP, PROFILED, MEMORY_STEPS, LOSS_ROUNDS = 2, 3, 3, 5


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        shape, samples, _ = load(SHAPES[options.shape], options.data)
        print(json.dumps(memory(options.memory_of, shape, samples)))
        return 0
    names = list(SHAPES) if options.shape == "all" else [options.shape]
    if options.data and ML_1M.name not in names:
        raise UserError("--data is the prepared ML-1M; the Books sequences are generated: leave it out")
    console = Console(width=110)
    results = []
    for name in names:
        data = options.data if name == ML_1M.name else None
        results.append(benchmark(SHAPES[name], data, options.seconds))
        report.show(results[-1], console)
    write(results, options.json)
    console.print(f"\nwritten: {options.json} and {options.json.with_suffix('.png').name}")
    return 0


def benchmark(shape: Shape, data: Path | None, seconds: float) -> dict[str, Any]:
    """All figures of a shape: a JSON-able dict."""
    name = shape.name
    shape, samples, source = load(shape, data)
    peaks = {side: memory_in_child(side, name, data) for side in SIDES}
    sides: dict[str, Side] = {name: side(shape, samples) for name, side in SIDES.items()}
    timed, used, tokens, sizes = interleave(sides, samples, shape, seconds)
    profiles = {
        name: shares.measure(side.step, islice(batches(samples, shape.batch, seed=2), PROFILED))
        for name, side in sides.items()
    }
    del sides
    return {
        "shape": asdict(shape),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "data": {
            "source": source,
            "users": len(samples),
            "mean_inputs": float(samples.lengths_R.mean() - 1),
            "inputs_p10_p50_p90": np.percentile(samples.lengths_R - 1, [10, 50, 90]).tolist(),
        },
        "pairs": len(tokens),
        "ratio": spread(timed["baseline"] / timed["ours"]),
        "cpu_ratio": spread(used["baseline"] / used["ours"]),
        "sides": {
            name: {
                "samples_per_s": np.percentile(sizes / timed[name], [10, 50, 90]).tolist(),
                "tokens_per_s": np.percentile(tokens / timed[name], [10, 50, 90]).tolist(),
                "step_ms": float(np.median(timed[name])) * 1e3,
                "cpu_s": float(np.median(used[name])),
                "step_s": timed[name].round(5).tolist(),
                "profile": profiles[name],
                **peaks[name],
            }
            for name in SIDES
        },
        "loss_alone": loss_alone.measure(shape, int(np.median(tokens)), LOSS_ROUNDS),
    }


def load(shape: Shape, data: Path | None) -> tuple[Shape, Sequences, str]:
    """The shape (its catalogue that of the dataset, if given), the training samples and where they are from."""
    if data is None:
        rows, source = generate(shape), f"generated with the lengths of {shape.name}"
    else:
        rows, items = read(data)
        shape, source = replace(shape, items=items), f"dataset {data.name}"
    return shape, training_samples(rows, shape.length), source


def interleave(
    sides: dict[str, Side], samples: Sequences, shape: Shape, seconds: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Of each step: each side's seconds, and CPU seconds of all its threads; the batch's targets and sequences.

    A pair of steps shares its batch, and the side that goes first changes from pair to pair.
    """
    stream = batches(samples, shape.batch)
    for rows in islice(stream, WARM_UP):
        for side in sides.values():
            side.step(rows)
    times: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, list[float]] = {name: [] for name in sides}
    tokens: list[int] = []
    sizes: list[int] = []
    finish = time.perf_counter() + seconds
    while len(tokens) < LEAST_PAIRS or time.perf_counter() < finish:
        rows = next(stream)
        order = list(sides) if len(tokens) % 2 == 0 else list(reversed(sides))
        for name in order:
            started, started_cpu = time.perf_counter(), time.process_time()
            sides[name].step(rows)
            times[name].append(time.perf_counter() - started)
            used[name].append(time.process_time() - started_cpu)
        tokens.append(int((samples.lengths_R[rows] - 1).sum()))
        sizes.append(len(rows))
    timed, cpu = ({name: np.array(values) for name, values in by_side.items()} for by_side in (times, used))
    return timed, cpu, np.array(tokens), np.array(sizes)


def spread(ratios: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(ratios)), "min": float(ratios.min()), "max": float(ratios.max())}


def memory_in_child(side: str, shape: str, data: Path | None) -> dict[str, float]:
    """Peak memory of a few steps of one side, in a process of its own."""
    command = [sys.executable, __file__, "--shape", shape, "--memory-of", side]
    command += ["--threads", str(torch.get_num_threads())]
    if data is not None:
        command += ["--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"measuring the memory of {side} failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(side: str, shape: Shape, samples: Sequences) -> dict[str, float]:
    """MiB: the peak of this process, and what model, optimiser and steps added to what it held before them."""
    before = peak_mib()
    trainer = SIDES[side](shape, samples)
    for rows in islice(batches(samples, shape.batch), MEMORY_STEPS):
        trainer.step(rows)
    peak = peak_mib()
    return {"peak_mib": peak, "step_mib": peak - before}


def write(results: list[dict[str, Any]], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "training", "method": shares.__doc__, "environment": environment.record()}
    file.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")
    report.plot(results, file.with_suffix(".png"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--data", type=Path, help="a prepared ML-1M; without it its sequences are generated")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of interleaved steps a shape (default 60)"
    )
    parser.add_argument("--threads", type=int, help="torch's (default: as many as torch takes)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "training.json")
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
