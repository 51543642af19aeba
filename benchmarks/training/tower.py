"""What a step costs whose items are encoded, beside encoding the step's distinct items alone, in one process.

    python benchmarks/training/tower.py --config configs/ml-1m/morec-text.yaml data.path=data/ml-1m

A whole step (forward, backward, optimiser) and, of the same items, only the encoder's forward and backward pass, take
turns; processor time of one thread, so that other work on the machine shifts both alike.  An epoch is said to take its
steps times the median one: it is extrapolated, not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gr import config as configs
from gr.modality.content import Encoded
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train.engines.engine import Engine
from gr.train.environment import record
from gr.train.parts import build


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def step(engine: Engine, part: Any, context: StepContext) -> None:
    """All of it."""
    engine.forward_backward([part], context, part.count)
    engine.step(1.0)


def alone(content: Encoded, rows_U: Tensor) -> None:
    """The encoder's two passes, and nothing else."""
    vectors_UE = content.of_step(rows_U)
    content.take_back(torch.ones_like(vectors_UE))
    for parameter in content.encoder.parameters():
        parameter.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="of a run whose tower is tuned, or has adapters")
    parser.add_argument("--steps", type=int, default=3, help="after one that warms up (default: %(default)s)")
    parser.add_argument("--json", default="benchmarks/results/tower.json", help="(default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    config = configs.load(options.config, options.overrides)
    parts = build(config, Processes(torch.device("cpu")))
    model, engine, content = parts.model, parts.engine, parts.model.items.content
    if not isinstance(content, Encoded):
        parser.error("the config's tower encodes nothing in a step: use mode tuned or adapters")
    rows = []
    for number, batch in enumerate(islice(parts.batches.epoch(0), options.steps + 1)):
        part = model.supervise(batch.share, number)
        context = StepContext(number, part.targets_S if model.needs_global_targets else None)
        wanted = torch.cat([found.reshape(-1) for found in model.wanted([part], context)["items"]]).unique()
        took = {
            "step": seconds(partial(step, engine, part, context)),
            "encoding alone": seconds(partial(alone, content, wanted)),
        }
        if number:  # the first one warms up
            tokens = int(content.items.lengths_n[wanted].sum())
            rows.append({"samples": batch.samples, "items": len(wanted), "tokens": tokens, **took})
    table = Table(title="processor seconds")
    for heading in (*rows[0], "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        row["ratio"] = row["step"] / row["encoding alone"]
        table.add_row(
            *(f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for value in row.values())
        )
    Console().print(table)
    median, steps = statistics.median(row["step"] for row in rows), parts.batches.in_epoch(0)
    epoch = {"precision": config.train.precision, "steps": steps, "core_minutes": median * steps / 60}
    print(f"median ratio {statistics.median(row['ratio'] for row in rows):.2f}")
    print(
        f"an epoch: {steps:,} steps, {epoch['core_minutes']:.1f} minutes of one core in {epoch['precision']}"
    )
    content_json = {
        "steps": rows,
        "epoch": epoch,
        "overrides": options.overrides,
        "environment": record(),
    }
    Path(options.json).write_text(json.dumps(content_json, indent=1) + "\n")


if __name__ == "__main__":
    main()
