"""Ranking with the candidates of a request as rows of their own: all requests of a sequence in one pass, beside each
candidate by itself, and beside items and actions interleaved.

python benchmarks/training/together.py --seconds 60 --threads 1

Prints a table and writes benchmarks/results/training-together.json; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from gr import config as configs  # noqa: E402
from gr.batch import TARGETS_FROM, SequenceBatch  # noqa: E402
from gr.data.collate import collate  # noqa: E402
from gr.data.columns import ColumnInfo  # noqa: E402
from gr.data.sequences import Sequences  # noqa: E402
from gr.errors import program  # noqa: E402
from gr.models.ranking import Ranking  # noqa: E402
from gr.models.step import StepContext  # noqa: E402
from gr.processes import Processes  # noqa: E402
from gr.train import environment  # noqa: E402
from gr.train.engines.engine import Engine  # noqa: E402
from gr_kernels.counter_random import derive_key  # noqa: E402

METHOD = (
    "--batch users with --length actions each, in requests of --request, with random items and a random label.  A "
    "round takes each side's step on the same users, the order changing from round to round, from rows in memory to "
    "moved parameters (AdamW).  one by one: of each candidate a sample of its own, the actions before its request and "
    "itself, in micro-batches of --micro-batch actions.  Ratios: the medians over rounds.  difference: of the loss of "
    "all candidates at once from the sum of their own, relative, without dropout, before anything is trained."
)


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = measured(options)
    show(result)
    record = {
        "benchmark": "together",
        "method": METHOD,
        "environment": environment.record(),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "results": result,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {options.json}")
    return 0


def made(options: argparse.Namespace, actions: str) -> tuple[Ranking, Engine]:
    width = options.dim // options.heads
    encoder = {"name": "hstu", "layers": options.layers, "heads": options.heads, "dropout": 0.0}
    model = {
        "name": "ranking",
        "dim": options.dim,
        "actions": actions,
        "interaction": "product",
        "input": {"scale": False, "positions": "normal", "dropout": 0.0},
        "encoder": {**encoder, "qk_dim": width, "v_dim": width},
        "tasks": {"like": {"column": "label", "at_least": 1}},
    }
    optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0}
    data = {"path": "none", "max_length": options.length}
    run = configs.from_dict({"data": data, "model": model, "optimizer": optimizer})
    columns = [ColumnInfo(name, "int64") for name in ("item", "time", "label")]
    catalogue = SimpleNamespace(
        rows=options.items, manifest=SimpleNamespace(columns=columns, action_type_names=[])
    )
    processes = Processes(torch.device("cpu"))
    built = run.model.build(run, catalogue, processes)
    engine = run.train.engine.build(built, run.optimizer.build(), processes, clip_norm=None, bf16=False)
    return built, engine


def measured(options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    users, length = options.batch, options.length
    moments = np.tile(np.repeat(np.arange(length), options.request)[:length] * 3600, users)
    samples = Sequences.of(
        np.arange(users),
        np.arange(users + 1) * length,
        item=rng.integers(0, options.items, users * length).astype(np.int32),
        time=moments,
        label=rng.integers(0, 2, users * length),
    )
    whole = collate(samples)
    each = one_by_one(samples, options.request)
    sides = {
        "together": (*made(options, "together"), [whole]),
        "one by one": (*made(options, "together"), each.split(options.micro_batch)),
        "interleaved": (*made(options, "interleaved"), [whole]),
    }

    def step(name: str, number: int, move: bool = True) -> float:
        model, engine, batches = sides[name]
        key = derive_key(1, "step", number)
        parts = [model.supervise(batch, key, derive_key(key, n)) for n, batch in enumerate(batches)]
        loss = engine.forward_backward(parts, StepContext(key), sum(part.count for part in parts)).item()
        engine.step(1.0 if move else 0.0)
        return loss

    losses = [step(name, 0, move=False) for name in ("together", "one by one")]
    times: dict[str, list[float]] = {name: [] for name in sides}
    start, number = time.perf_counter(), 0
    while number < 3 or time.perf_counter() - start < options.seconds:
        for name in sides if number % 2 else [*sides][::-1]:
            begun = time.perf_counter()
            step(name, number)
            times[name].append(time.perf_counter() - begun)
        number += 1
    ratios = {
        name: [slow / fast for slow, fast in zip(times[name], times["together"], strict=True)]
        for name in ("one by one", "interleaved")
    }
    return {
        "rounds": number,
        "candidates": each.sequences,
        "seconds_a_step": {name: statistics.median(some) for name, some in times.items()},
        "ratio": {name: statistics.median(some) for name, some in ratios.items()},
        "least": {name: min(some) for name, some in ratios.items()},
        "difference": abs(losses[0] - losses[1]) / abs(losses[1]),
    }


def one_by_one(samples: Sequences, request: int) -> SequenceBatch:
    """A sample for each candidate: the actions before its request, then itself, which is its one target."""
    length = int(samples.lengths_R[0])
    places = np.arange(request, length)
    kept = [np.append(np.arange(place // request * request), place) for place in places]
    rows = np.concatenate([user * length + some for user in range(len(samples.lengths_R)) for some in kept])
    sizes = np.array([len(some) for some in kept] * len(samples.lengths_R))
    columns = {name: np.asarray(column)[rows] for name, column in samples.columns.items()}
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    batch = collate(Sequences.of(np.arange(len(sizes)), offsets, **columns))
    return replace(batch, user_columns={TARGETS_FROM: torch.from_numpy(sizes - 1)})


def show(result: dict[str, Any]) -> None:
    title = f"a step of {result['candidates']:,} candidates ({result['rounds']} rounds)"
    table = Table("", "s a step", "together is faster by", title_justify="left", title=title)
    for name, seconds in result["seconds_a_step"].items():
        ratio = ""
        if name in result["ratio"]:
            ratio = f"{result['ratio'][name]:.2f}x (at least {result['least'][name]:.2f})"
        table.add_row(name, f"{seconds:.3f}", ratio)
    Console(width=110).print(table)
    print(f"the loss of all at once is off by {result['difference']:.1e} of the sum of each by itself")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--items", type=int, default=3883)
    parser.add_argument("--batch", type=int, default=8, help="users")
    parser.add_argument("--length", type=int, default=200, help="actions of a user")
    parser.add_argument("--request", type=int, default=10, help="actions of a request")
    parser.add_argument("--micro-batch", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "training-together.json"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
