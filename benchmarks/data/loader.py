"""Speed and peak memory of the engines of ingest alone: shuffled batches from local Parquet, beside bare pyarrow.

    python benchmarks/data/loader.py --engines arrow ray --shapes ml-1m long --actions 1e6 1e7 1e8

A process for each engine, shape and size.  In it rounds of two passes over the dataset follow each other: pyarrow alone
reads the same columns of every row group, in one thread, and drops them; then the engine delivers an epoch, shuffled,
cut into global batches, collated into tensors.  Nothing is cut off from a sequence but the held-out action, so that
both handle the same actions.  The ratio is the median over rounds, of actions a second of one core (CPU time of all
threads, and of the cluster's processes where there is one).  The first epoch also verifies checksums: it stands apart.
A cluster reads ahead, into the next epoch too: its wall-clock speed tells something where an epoch has many windows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lengths
from gr.data.batches import Plan
from gr.data.dataset import SequenceDataset
from gr.data.loader import Arrow, Direct
from gr.data.order import Order
from gr.data.remote import Ray
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.writing import DatasetWriter
from gr.processes import Processes

RESULTS = Path(__file__).parents[1] / "results" / "data_loader.json"
LONG, ITEMS, USERS_AT_ONCE = 4096, 3883, 4096
ENGINES: dict[str, Callable] = {
    "arrow": lambda *given: Arrow(Arrow.Config(), *given),
    "direct": lambda *given: Direct(Direct.Config(), *given),
    "ray": lambda *given: Ray(Ray.Config(), *given),
    "ray-data": lambda *given: Ray(Ray.Config(executor="data"), *given),
}


def generate(path: Path, actions: int, shape: str, block_rows: int) -> SequenceDataset:
    """About so many actions, items of a skewed popularity, uneven times."""
    generator = np.random.default_rng(0)
    writer = DatasetWriter(path, shape, block_rows=block_rows)
    counts, users, left = np.zeros(ITEMS, np.int64), 0, actions
    while left > 0:
        lengths_R = (
            lengths.ml_1m(generator.random(USERS_AT_ONCE))
            if shape == "ml-1m"
            else np.full(block_rows, LONG, np.int64)
        )
        if left < lengths_R.sum():
            lengths_R = lengths_R[: max(int(np.searchsorted(lengths_R.cumsum(), left)), 1)]
        offsets_R1 = np.concatenate([[0], np.cumsum(lengths_R)])
        items_A = np.exp(generator.random(offsets_R1[-1]) * np.log(ITEMS)).astype(np.int32) - 1
        times_A = 1_400_000_000 + np.cumsum(generator.integers(0, 60, offsets_R1[-1]))
        counts += np.bincount(items_A, minlength=ITEMS)
        ids_R = np.arange(users, users + len(lengths_R))
        writer.add(Sequences.of(ids_R, offsets_R1, item=items_A, time=times_A))
        users, left = users + len(lengths_R), left - int(offsets_R1[-1])
    return writer.finish(pa.table({"item_id": np.arange(ITEMS), "count": counts}))


def bare(dataset: SequenceDataset) -> int:
    """Reads what the engines read, by pyarrow alone; how many actions."""
    actions = 0
    for file in dict.fromkeys(block.file for block in dataset.manifest.blocks):
        with pq.ParquetFile(dataset.path / file) as parquet:  # type: ignore[operator]
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=["items", "timestamps"], use_threads=False)
                actions += sum(len(chunk.values) for chunk in table["items"].chunks)
    return actions


def processes_below(pid: int) -> list[int]:
    """A process's descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(
                    Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def core_seconds() -> float:
    """CPU time so far of this process and of those below it."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for pid in processes_below(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
        except OSError:
            continue
    return total


def peak_bytes(pid: int | str = "self") -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def measure(args: argparse.Namespace) -> None:
    """The child: one engine on one dataset."""
    pa.set_cpu_count(args.threads)
    torch.set_num_threads(args.threads)
    dataset = SequenceDataset(args.measure)
    rows, blocks = dataset.users, dataset.manifest.block_rows
    order = Order(dataset.manifest.fingerprint, 1, rows, blocks, args.window_blocks)
    split = LeaveOneOut(LeaveOneOut.Config(holdout=1))
    plan = Plan(split, order, args.batch, LONG, columns=frozenset({"time"}))
    loader = ENGINES[args.engines[0]](dataset, plan)
    rounds = []
    base = peak_bytes()
    with loader.opened(Processes(torch.device("cpu"))):
        spent = 0.0
        while len(rounds) <= args.rounds or spent < args.seconds:
            begun, own, start = core_seconds(), time.process_time(), time.perf_counter()
            alone = {"actions": bare(dataset)}
            alone |= {"core_seconds": time.process_time() - own, "seconds": time.perf_counter() - start}
            start = time.perf_counter()
            ours = {"actions": sum(batch.share.actions for batch in loader.epoch(len(rounds)))}
            ours["seconds"] = time.perf_counter() - start
            # a cluster reads ahead while pyarrow reads: what isn't pyarrow's is the engine's
            ours["core_seconds"] = core_seconds() - begun - alone["core_seconds"]
            rounds.append({"bare": alone, "engine": ours})
            spent += alone["seconds"] + ours["seconds"]
        peak = peak_bytes()
        below = [peak_bytes(pid) for pid in processes_below(os.getpid())]
    print(
        json.dumps(
            {
                "rounds": rounds,
                "import_bytes": base,
                "peak_bytes": peak,
                "largest_below_bytes": max(below, default=0),
                "actions": dataset.actions,
                "users": dataset.users,
            }
        )
    )


def speed(part: dict, by: str = "core_seconds") -> float:
    return part["actions"] / max(part[by], 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["arrow", "ray"], choices=list(ENGINES))
    parser.add_argument("--shapes", nargs="+", default=["ml-1m", "long"], choices=["ml-1m", "long"])
    parser.add_argument("--actions", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--batch", type=int, default=128, help="sequences of a global batch")
    parser.add_argument("--window-blocks", type=int, default=4, help="memory follows this")
    parser.add_argument("--block-rows", type=int, default=0, help="0: 1024, and 32 of long sequences")
    parser.add_argument("--rounds", type=int, default=3, help="after the first one")
    parser.add_argument(
        "--seconds", type=float, default=5, help="more rounds of a small dataset, for so long"
    )
    parser.add_argument("--threads", type=int, default=1, help="of Arrow and torch")
    parser.add_argument("--scratch", help="folder for the generated datasets (about 8 bytes an action)")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        return measure(args)
    rows = []
    for shape in args.shapes:
        for actions in map(int, args.actions):
            work = Path(tempfile.mkdtemp(prefix="gr-loader-", dir=args.scratch))
            try:
                generate(work / "set", actions, shape, args.block_rows or (1024 if shape == "ml-1m" else 32))
                for engine in args.engines:
                    rows.append({"shape": shape, "engine": engine, **child(args, work / "set", engine)})
                    print(f"{shape}, {actions:,} actions, {engine}: done", file=sys.stderr, flush=True)
            finally:
                shutil.rmtree(work)
    show(rows, args)
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "load": os.getloadavg(),
    }
    result = {"command": ["benchmarks/data/loader.py", *sys.argv[1:]], "machine": machine, "rows": rows}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.json}")


def child(args: argparse.Namespace, dataset: Path, engine: str) -> dict:
    command = [sys.executable, __file__, "--measure", str(dataset), "--engines", engine]
    for name in ("batch", "window_blocks", "rounds", "seconds", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show(rows: list[dict], args: argparse.Namespace) -> None:
    table = Table(
        title=f"loader: batches of {args.batch}, windows of {args.window_blocks} blocks; M actions/s of a core",
        title_justify="left",
    )
    for column in (
        "shape",
        "engine",
        "actions",
        "M/s wall",
        "M/s core",
        "first epoch",
        "bare pyarrow",
        "ratio (range)",
        "peak MiB",
        "above imports",
    ):
        table.add_column(column, justify="left" if column in ("shape", "engine") else "right")
    for row in rows:
        first, *others = row["rounds"]
        # what a cluster had read ahead took nothing
        others = [each for each in others if each["engine"]["core_seconds"] > 0] or others
        ratios = [speed(r["engine"]) / speed(r["bare"]) for r in others]
        median = {
            name: statistics.median(values) / 1e6
            for name, values in {
                "wall": [speed(r["engine"], "seconds") for r in others],
                "core": [speed(r["engine"]) for r in others],
                "bare": [speed(r["bare"]) for r in others],
            }.items()
        }
        table.add_row(
            row["shape"],
            row["engine"],
            f"{row['actions']:,}",
            f"{median['wall']:.1f}",
            f"{median['core']:.1f}",
            f"{speed(first['engine']) / 1e6:.1f}",
            f"{median['bare']:.1f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{(row['peak_bytes'] - row['import_bytes']) / 2**20:,.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
