"""Ranking over sequences: a training step beside that of a plain padded trainer, and many candidates of one history
beside full forward passes.

python benchmarks/training/ranking.py --seconds 60 --threads 2

HSTU with items and actions interleaved.  Prints a table and writes benchmarks/results/training-ranking.json; see
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks import lengths  # noqa: E402
from benchmarks.training import padded_ranking  # noqa: E402
from gr import config as configs  # noqa: E402
from gr.batch import Jagged  # noqa: E402
from gr.data.collate import collate  # noqa: E402
from gr.data.columns import ColumnInfo  # noqa: E402
from gr.data.sequences import Sequences  # noqa: E402
from gr.errors import program  # noqa: E402
from gr.models.pointwise import repeated  # noqa: E402
from gr.models.ranking import Ranking  # noqa: E402
from gr.models.step import StepContext  # noqa: E402
from gr.processes import Processes  # noqa: E402
from gr.train import environment  # noqa: E402
from gr_kernels.counter_random import derive_key  # noqa: E402

METHOD = (
    "Training: sequences of ML-1M's lengths with random items and two random labels, cut to the latest --length + 1 "
    "actions.  A pair of steps takes the same --batch sequences, ours and the padded one's, the first changing from "
    "pair to pair, from rows in memory to moved parameters (AdamW); ratio: the median over pairs.  Candidates: one "
    "user with --history actions and --candidates items.  cached: all of them by model.scores, history included.  "
    "full: model.logits of the history with one candidate each, --full of them in batches of eight, in seconds a "
    "candidate; the ratio takes it times --candidates."
)
TASKS, HIDDEN = 2, 64


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = {"training": training(options), "candidates": candidates(options)}
    show(result, options)
    record = {
        "benchmark": "ranking",
        "method": METHOD,
        "environment": environment.record(),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "results": result,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {options.json}")
    return 0


def made(items: int, length: int, dim: int, layers: int, heads: int, dropout: float) -> tuple[Any, Ranking]:
    """Our config and model."""
    encoder = {"name": "hstu", "layers": layers, "heads": heads, "dropout": dropout}
    encoder |= {"qk_dim": dim // heads, "v_dim": dim // heads}
    run = configs.from_dict(
        {
            "data": {"path": "none", "max_length": length},
            "model": {
                "name": "ranking",
                "dim": dim,
                "actions": "interleaved",
                "interaction": "product",
                "hidden": [HIDDEN],
                "input": {"scale": False, "positions": "normal", "dropout": dropout},
                "encoder": encoder,
                "tasks": {f"task{k}": {"column": f"label{k}", "at_least": 1} for k in range(TASKS)},
            },
            "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
        }
    )
    columns = [ColumnInfo(name, "int64") for name in ("item", "time", *(f"label{k}" for k in range(TASKS)))]
    catalogue = SimpleNamespace(rows=items, manifest=SimpleNamespace(columns=columns, action_type_names=[]))
    return run, run.model.build(run, catalogue, Processes(torch.device("cpu")))


def training(options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    lengths_R = np.minimum(lengths.ml_1m(rng.random(4096)), options.length + 1)
    samples = _samples(rng, lengths_R, options.items)
    run, model = made(options.items, options.length, options.dim, options.layers, options.heads, 0.2)
    processes = Processes(torch.device("cpu"))
    engine = run.train.engine.build(model, run.optimizer.build(), processes, clip_norm=None, bf16=False)
    torch.manual_seed(1)
    padded = padded_ranking.PaddedRanking(
        options.items,
        options.length + 1,
        options.dim,
        options.layers,
        options.heads,
        options.dim // options.heads,
        TASKS,
        HIDDEN,
        0.2,
    )
    optimizer = torch.optim.AdamW(padded.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def ours(rows: np.ndarray, step: int) -> None:
        batch = collate(samples.take(rows))
        key = derive_key(1, "step", step)
        part = model.supervise(batch, key, derive_key(key, "dropout", 0, 0))
        engine.forward_backward([part], StepContext(key), part.count).item()
        engine.step(1.0)

    def theirs(rows: np.ndarray, step: int) -> None:
        loss = padded(padded_ranking.pad([_one(samples, row) for row in rows], options.length + 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    times: dict[str, list[float]] = {"ours": [], "padded": []}
    start, pair = time.perf_counter(), 0
    while pair < 4 or time.perf_counter() - start < options.seconds:
        rows = rng.choice(len(lengths_R), options.batch, replace=False)
        sides = [("ours", ours), ("padded", theirs)]
        for name, step in sides if pair % 2 else sides[::-1]:
            begun = time.perf_counter()
            step(rows, pair)
            if pair:  # the first one warms up
                times[name].append(time.perf_counter() - begun)
        pair += 1
    ratios = [slow / fast for slow, fast in zip(times["padded"], times["ours"], strict=True)]
    return {
        "pairs": len(ratios),
        "samples_per_s": {name: options.batch / statistics.median(each) for name, each in times.items()},
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def candidates(options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    _, model = made(options.items, options.history, options.dim, options.layers, options.heads, 0.0)
    model.eval()
    alone = collate(_samples(rng, np.array([options.history + 1]), options.items))
    items = torch.from_numpy(rng.integers(0, options.items, options.candidates))
    asked = Jagged(torch.tensor([0, len(items)]), items)
    model.scores(alone, asked)
    cached = []
    for _ in range(3):
        begun = time.perf_counter()
        scores_CK = model.scores(alone, asked)
        cached.append(time.perf_counter() - begun)
    full, found = [], []
    for first in range(0, options.full, 8):
        batch = repeated(alone, items[first : first + 8])
        begun = time.perf_counter()
        found.append(model.logits(batch))
        full.append((time.perf_counter() - begun) / batch.sequences)
    off = (torch.cat(found) - scores_CK[: len(torch.cat(found))]).abs().max()
    seconds = {"cached": statistics.median(cached), "full_a_candidate": statistics.median(full)}
    ratio = seconds["full_a_candidate"] * options.candidates / seconds["cached"]
    return {**seconds, "ratio": ratio, "largest_difference": float(off)}


def _samples(rng: np.random.Generator, lengths_R: np.ndarray, items: int) -> Sequences:
    actions = int(lengths_R.sum())
    columns: dict[str, Any] = {
        "item": rng.integers(0, items, actions).astype(np.int32),
        "time": np.cumsum(rng.integers(1, 5000, actions)),
        **{f"label{k}": rng.integers(0, 2, actions) for k in range(TASKS)},
    }
    return Sequences.of(np.arange(len(lengths_R)), np.concatenate([[0], np.cumsum(lengths_R)]), **columns)


def _one(samples: Sequences, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    one = slice(samples.offsets_R1[row], samples.offsets_R1[row + 1])
    item, moment, *labels = (torch.from_numpy(np.asarray(column[one])) for column in samples.columns.values())
    return item.long(), moment, torch.stack(labels, dim=1).float()


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table("", "ours", "beside it", "ratio", title_justify="left", title="ranking over sequences")
    train, many = result["training"], result["candidates"]
    speed = train["samples_per_s"]
    table.add_row(
        f"training, samples/s ({train['pairs']} pairs)",
        f"{speed['ours']:,.1f}",
        f"{speed['padded']:,.1f} padded",
        f"{train['ratio']:.2f}x ({train['least']:.2f} to {train['most']:.2f})",
    )
    table.add_row(
        f"{options.candidates:,} candidates of {options.history:,} actions, s",
        f"{many['cached']:.3f} cached",
        f"{many['full_a_candidate'] * options.candidates:,.1f} by full forwards",
        f"{many['ratio']:.0f}x",
    )
    Console(width=110).print(table)
    print(f"largest difference of log-odds, cached and full: {many['largest_difference']:.1e}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of pairs of training steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=3883)
    parser.add_argument(
        "--length", type=int, default=100, help="actions before the last of a training sample"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--history", type=int, default=1000, help="actions of the user with many candidates")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--full", type=int, default=24, help="candidates that get a full forward pass")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "training-ranking.json"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
