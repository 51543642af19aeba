"""Seconds of a training step as they are planned on paper (gr/scaling), beside what small real runs on this CPU take.

    python benchmarks/training/planned_time.py [--json FILE]

Constants are measured first (gr/scaling/calibration.py), then runs on 1, 2 and 4 processes of one thread each.  Both
sides are of CPU time of a process, so that what others do on the machine matters less; exchanges count as copies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.training.planned_memory import config_of, make_dataset  # noqa: E402
from gr import config as configs  # noqa: E402
from gr.config import RunConfig  # noqa: E402
from gr.models.step import StepContext  # noqa: E402
from gr.processes import Processes, processes  # noqa: E402
from gr.scaling.calibration import calibrated  # noqa: E402
from gr.scaling.plan import Planner  # noqa: E402
from gr.train.parts import build  # noqa: E402
from gr.train.planning import OfDataset  # noqa: E402

RUNS: list[tuple[str, str, int, list[str]]] = [
    ("HSTU", "hstu", 1, []),
    ("SASRec, BCE", "sasrec, bce", 1, []),
    ("Transformer", "transformer", 1, []),
    ("HSTU, full softmax", "hstu, full softmax", 1, []),
    ("HSTU, DDP", "hstu", 2, []),
    ("HSTU, rows dealt out", "hstu, sharded, adagrad", 4, []),
]
WARM_UP, STEPS, COLLECTIVES = 2, 7, 50


def run_config(base: str, data: Path, overrides: list[str]) -> RunConfig:
    return configs.override(config_of(base, data), overrides)


def seconds_of_steps(config: RunConfig, joined: Processes) -> list[float]:
    """CPU seconds of this process for each of some steps on its share of the first global batch."""
    parts = build(config, joined)
    with parts.batches.opened(joined), closing(parts.batches.epoch(0)) as batches:
        share = next(batches).share
    found = []
    for number in range(WARM_UP + STEPS):
        joined.barrier()
        started = time.process_time()
        supervised = [parts.model.supervise(p, number) for p in share.split(config.train.micro_batch_actions)]
        (targets,) = joined.world.sum([sum(part.count for part in supervised)])
        parts.engine.forward_backward(supervised, StepContext(number), int(targets))
        parts.engine.step(1.0)
        found.append(time.process_time() - started)
    return found[WARM_UP:]


def member(options: argparse.Namespace) -> None:
    """One of several processes: the mean over them of the median step."""
    config = run_config(options.base, options.data, options.overrides)
    with processes("cpu", 1) as joined:
        medians = joined.everybodys(statistics.median(seconds_of_steps(config, joined)))
        collectives = joined.everybodys(seconds_of_a_collective(joined))
        if joined.is_main:
            found = {"seconds": statistics.mean(medians), "collective": statistics.mean(collectives)}
            print(json.dumps(found), flush=True)


def seconds_of_a_collective(joined: Processes) -> float:
    """CPU seconds that an exchange of next to nothing takes."""
    joined.barrier()
    started = time.process_time()
    for _ in range(COLLECTIVES):
        joined.world.add_up(torch.ones(256))
    return (time.process_time() - started) / COLLECTIVES


def measured(base: str, data: Path, count: int, overrides: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--base", base, "--data", str(data), *overrides]
    if count > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))
    return found


def planned(base: str, data: Path, count: int, overrides: list[str], collective: float) -> dict[str, float]:
    config = run_config(base, data, overrides)
    parts = build(config, Processes(torch.device("cpu")))
    machine = calibrated(count)
    machine = machine.changed([f"collective={collective!r}"]) if count > 1 else machine
    plan = Planner(config, OfDataset(parts.data), machine).plan(config, count, {})
    parts_of = {name: getattr(plan.time, name) for name in ("compute", "memory", "calls", "network")}
    return {"planned": plan.time.seconds, **parts_of, "flops": plan.flops}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if options.base is not None:
        member(options)
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = make_dataset(Path(scratch, "data"))
        for name, base, count, overrides in RUNS:
            if options.only and name not in options.only:
                continue
            taken = measured(base, data, count, overrides)
            on_paper = planned(base, data, count, overrides, taken["collective"])
            found.append({"run": name, "processes": count, "measured": taken["seconds"], **on_paper})
            found[-1]["collective"] = taken["collective"]
            print(found[-1], flush=True)
    table = Table(title="CPU seconds of a step, one thread a process (ms)", title_justify="left")
    for heading in ("run", "processes", "planned", "measured", "off"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in found:
        both = [f"{1e3 * row[key]:,.1f}" for key in ("planned", "measured")]
        table.add_row(
            row["run"], str(row["processes"]), *both, f"{row['planned'] / row['measured'] - 1:+.0%}"
        )
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
