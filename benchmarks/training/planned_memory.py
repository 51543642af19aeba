"""Memory of a training step as it is planned on paper (gr/scaling), beside what torch's allocator gives out.

    python benchmarks/training/planned_memory.py

Small real runs on the CPU, of every kind of model: one step to make moments, then one whose allocations torch's
profiler records, those that operators make inside included.  Both figures are of tensors: parameters, moments and what
a step adds at its peak.  Interpreter, libraries and the allocator's holes are neither's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces itself otherwise

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from gr import config as configs  # noqa: E402
from gr.config import RunConfig  # noqa: E402
from gr.data.dataset import DatasetWriter  # noqa: E402
from gr.data.sequences import Sequences  # noqa: E402
from gr.models.step import StepContext  # noqa: E402
from gr.processes import Processes  # noqa: E402
from gr.scaling.machine import cpu  # noqa: E402
from gr.scaling.plan import Planner  # noqa: E402
from gr.train.parts import Parts, build  # noqa: E402
from gr.train.planning import OfDataset  # noqa: E402

USERS, ITEMS, LONGEST = 256, 3000, 100

HSTU = {"name": "hstu", "layers": 4, "heads": 2, "qk_dim": 32, "v_dim": 32}
RETRIEVAL = {"dim": 64, "encoder": HSTU}
RANKED = {"tasks": {"liked": {"column": "value", "at_least": 3}}}
RUNS: dict[str, dict[str, Any]] = {
    "hstu": {"model": RETRIEVAL},
    "hstu, recompute": {"model": RETRIEVAL, "train": {"activation_checkpointing": True}},
    "hstu, micro-batches": {"model": RETRIEVAL, "train": {"micro_batch_actions": 2000}},
    "hstu, full softmax": {"model": RETRIEVAL, "objective": "full_softmax"},
    "hstu, rows by lazy_adam": {"model": RETRIEVAL, "optimizer": "lazy_adam"},
    "hstu, sharded, adagrad": {"model": {**RETRIEVAL, "table": "torchrec"}, "optimizer": "rowwise_adagrad"},
    "transformer": {"model": {"dim": 64, "encoder": {"name": "transformer", "layers": 3, "heads": 2}}},
    "sasrec, bce": {"model": {"dim": 64, "encoder": {"name": "sasrec", "ffn": 64}}, "objective": "bce"},
    "sasrec, in_batch": {
        "model": {"dim": 64, "encoder": {"name": "sasrec", "ffn": 64}},
        "objective": "in_batch",
    },
    "bert4rec": {
        "model": {
            "dim": 64,
            "task": "cloze",
            "encoder": {"name": "transformer", "layers": 2, "heads": 2, "norm": "post", "causal": False},
        }
    },
    "ranking, interleaved": {
        "model": {"name": "ranking", "dim": 64, "encoder": HSTU, "actions": "interleaved", **RANKED},
        "objective": None,
    },
    "din": {"model": {"name": "din", "dim": 32, **RANKED}, "objective": None},
    "dlrm": {"model": {"name": "dlrm", "dim": 32, **RANKED}, "objective": None},
    "gru4rec": {"model": {"dim": 64, "encoder": {"name": "gru4rec", "layers": 2, "hidden": 96}}},
}


def make_dataset(path: Path) -> Path:
    rng = np.random.default_rng(0)
    lengths = rng.integers(LONGEST // 4, LONGEST + 2, USERS)
    actions = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    writer = DatasetWriter(path, "planned-memory", block_rows=64)
    items = rng.integers(0, ITEMS, actions).astype(np.int32)
    values = rng.integers(1, 6, actions).astype(np.float32)
    times = np.arange(actions) * 60
    writer.add(Sequences.of(np.arange(USERS), offsets, item=items, time=times, value=values))
    writer.finish(pa.table({"item_id": np.arange(ITEMS), "count": np.bincount(items, minlength=ITEMS)}))
    return path


def config_of(name: str, data: Path) -> RunConfig:
    run = RUNS[name]
    raw = {
        "data": {"path": str(data), "max_length": LONGEST},
        "objective": {"name": "sampled_softmax", "negatives": 64},
        "optimizer": "adamw",
        **{key: value for key, value in run.items() if key != "train"},
        "train": {"global_batch": 128, "threads": 1, "device": "cpu", **run.get("train", {})},
    }
    return configs.from_dict(raw)


def step(parts: Parts, config: RunConfig, number: int) -> None:
    """As the trainer takes one, on the first global batch."""
    with closing(parts.batches.epoch(0)) as batches:
        share = next(batches).share
    share, _ = parts.model.learn(share, number)
    cut = share.split(config.train.micro_batch_actions)
    supervised = [parts.model.supervise(part, number, number) for part in cut]
    candidates = None
    if parts.model.needs_global_targets:
        candidates = torch.cat([part.targets_S for part in supervised])
    targets = sum(part.count for part in supervised)
    parts.engine.forward_backward(supervised, StepContext(number, candidates), targets)
    parts.engine.step(1.0)


def measured_peak(config: RunConfig, parts: Parts, processes: Processes) -> int:
    """Bytes of tensors at the peak of a step: what stays, and what torch's allocator gave out beside it."""
    with parts.batches.opened(processes):
        step(parts, config, 0)  # makes moments
        parts_of = parts.engine.tensors()
        kept = sum(t.numel() * t.element_size() for name, t in parts_of.items() if not name.endswith("/step"))
        del parts_of
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step(parts, config, 1)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return kept + int(max(np.cumsum([event.nbytes() for event in events]).max(), 0))


def compare(name: str, data: Path) -> dict[str, Any]:
    config, processes = config_of(name, data), Processes(torch.device("cpu"))
    parts = build(config, processes)
    plan = Planner(config, OfDataset(parts.data), cpu(1)).plan(config, 1, {})
    measured = measured_peak(config, parts, processes)
    return {
        "run": name,
        "planned": plan.memory.peak,
        "measured": measured,
        "error": plan.memory.peak / measured - 1,
        "parts": plan.memory.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_dataset(Path(scratch, "data"))
        found = [compare(name, data) for name in options.runs or RUNS]
    table = Table(title="memory of a step, MiB", title_justify="left")
    for heading in ("run", "planned", "measured", "off", "most of it is"):
        table.add_column(heading, justify="left" if heading in ("run", "most of it is") else "right")
    for row in found:
        most = max(row["parts"], key=lambda name, row=row: row["parts"][name])  # type: ignore[misc]
        sizes = [f"{row[key] / 2**20:,.1f}" for key in ("planned", "measured")]
        table.add_row(row["run"], *sizes, f"{row['error']:+.1%}", most)
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
