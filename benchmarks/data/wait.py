"""How long a training waits for its batches: HSTU with the published settings, fed by each engine of ingest.

    python benchmarks/data/wait.py --engines arrow ray --steps 200 [--data data/ml-1m]

Each is a run of its own, in its own process, of ``--threads`` threads.  The first batch comes with the engine's start
(under ``ray`` a cluster's) and stands apart.  Without ``--data`` sequences are generated that are as long as ML-1M's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from benchmarks.data.loader import generate

RESULTS = Path(__file__).parents[1] / "results" / "data_wait.json"


def trained(engine: str, data: Path, folder: Path, steps: int, threads: int) -> dict:
    """What a run's timing.jsonl has of its waits and steps, seconds."""
    command = [sys.executable, "-m", "gr", "train", "--config", "ml-1m/hstu"]
    command += [f"data.path={data}", f"data.ingest={engine}", f"run.dir={folder}", f"train.max_steps={steps}"]
    command += [f"train.threads={threads}", "log.every_steps=1", "eval.splits=[]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    waits, times = ([row[name] for row in rows if name in row] for name in ("wait_s", "step_s"))
    later = sum(waits[1:])
    return {
        "engine": engine,
        "steps": len(times),
        "first_wait_s": waits[0],
        "wait_s": later,
        "step_s": statistics.median(times),
        "share": later / (later + sum(times[1:])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["arrow", "ray"], choices=["arrow", "direct", "ray"])
    parser.add_argument("--data", type=Path, help="a prepared dataset with times")
    parser.add_argument("--actions", type=float, default=1e6, help="of the generated one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gr-wait-") as scratch:
        work = Path(scratch)
        data = args.data.resolve() if args.data else work / "data"
        if args.data is None:
            generate(data, int(args.actions), "ml-1m", 1024)
        rows = [trained(name, data, work / name, args.steps, args.threads) for name in args.engines]
    table = Table("engine", "steps", "ms a step", "first batch, s", "later waits, s", "of steps and waits")
    for row in rows:
        table.add_row(
            row["engine"],
            str(row["steps"]),
            f"{1e3 * row['step_s']:.0f}",
            f"{row['first_wait_s']:.2f}",
            f"{row['wait_s']:.2f}",
            f"{row['share']:.2%}",
        )
    Console().print(table)
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()}
    result = {"command": ["benchmarks/data/wait.py", *sys.argv[1:]], "machine": machine, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.json}")


if __name__ == "__main__":
    main()
