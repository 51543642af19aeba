"""Speed and peak memory of preparing a generated action log, over its size.

    python benchmarks/data/prepare.py --actions 1e6 1e7 1e8 --engines process ray

Users and items are Zipf-distributed, rows in no order of user or time.  Each size is prepared in its own process, whose
peak memory is taken: it must follow the chunk and the partition, not the number of actions.  Of the Ray engine, which
starts a cluster for each, it is that of all the cluster's processes together (anonymous and shared memory, sampled),
and that of the largest of them; its seconds count the start.  Every engine has to give the same fingerprint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

FILE_ROWS = 2**23
CHUNK_ROWS = 2**20
RESULTS = Path(__file__).parents[1] / "results" / "data_prepare.json"

CHILD = """
import json, os, resource, sys, threading, time
from pathlib import Path
from gr.data.making.engine import Engine
from gr.data.making.sources.base import make_source
source, out, options, engine = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
TICK = os.sysconf("SC_CLK_TCK")
total = largest = 0
seconds_of = {}

def sample():
    "Memory and core seconds of this process and all that come from it."
    global total, largest
    stats = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stats[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            pass
    ours, more = {os.getpid()}, True
    while more:
        more = {pid for pid, stat in stats.items() if int(stat[1]) in ours} - ours
        ours |= more
    sizes = []
    for pid in ours & stats.keys():
        seconds_of[pid] = (int(stats[pid][11]) + int(stats[pid][12])) / TICK
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes.append(sum(int(l.split()[1]) for l in lines if l.startswith(("Pss_Anon", "Pss_Shmem"))) * 1024)
    total, largest = max(total, sum(sizes)), max(largest, *sizes)

def watch():
    while not done.wait(0.5):
        sample()

done = threading.Event()
if engine != "process":
    threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
dataset = make_source("log", options).prepare(source, out, engine=Engine(engine))
seconds = time.perf_counter() - start
done.set()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "engine": engine,
    "seconds": seconds,
    "core_seconds": sum(seconds_of.values()) or usage.ru_utime + usage.ru_stime,
    "peak_bytes": total or usage.ru_maxrss * 1024,
    "largest_process_bytes": largest or usage.ru_maxrss * 1024,
    "actions": dataset.actions,
    "users": dataset.users,
    "items": dataset.items,
    "fingerprint": dataset.manifest.fingerprint,
}))
"""
IMPORT_ONLY = """
import resource
import gr.data.making.sources.log
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def generate(folder: Path, actions: int, users: int, items: int, text_ids: bool, seed: int = 0) -> None:
    """Stream a log of ``actions`` rows (user, item, ts in seconds) to Parquet files."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    kind = pa.string() if text_ids else pa.int64()
    schema = pa.schema([("user", kind), ("item", kind), ("ts", pa.int64())])
    writer, in_file, files = None, 0, 0
    for start in range(0, actions, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, actions - start)
        if writer is None:
            writer = pq.ParquetWriter(folder / f"part-{files:05d}.parquet", schema)
        # the inverse of a power law's distribution function: id i is drawn with probability ~ 1/(i + 1)
        item = np.exp(generator.random(rows) * np.log(items)).astype(np.int64) - 1
        user = (generator.random(rows) ** 2 * users).astype(np.int64)
        columns = [pa.array(user), pa.array(item), pa.array(generator.integers(1.4e9, 1.7e9, rows))]
        if text_ids:
            columns[:2] = [
                pa.array(np.char.add("u", user.astype(str))),
                pa.array(np.char.add("i", item.astype(str))),
            ]
        writer.write_table(pa.table(columns, schema=schema))
        in_file += rows
        if in_file >= FILE_ROWS or start + rows == actions:
            writer.close()
            writer, in_file, files = None, 0, files + 1


def child(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--actions", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--engines", nargs="+", choices=("process", "ray"), default=["process"])
    parser.add_argument("--actions-per-user", type=int, default=50)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--memory-mb", type=int, default=256)
    parser.add_argument("--chunk-rows", type=int, default=2**20)
    parser.add_argument("--text-ids", action="store_true", help="ids are strings")
    parser.add_argument("--core", type=int, default=0, help="k of a k-core filter, 0 for none")
    parser.add_argument(
        "--scratch", help="folder for the generated logs and datasets (about 60 bytes an action)"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    options: dict = {
        "columns": {"user": "user", "item": "item", "time": "ts"},
        "memory_mb": args.memory_mb,
        "chunk_rows": args.chunk_rows,
    }
    if args.core:
        options["filter"] = {"mode": "core", "min_item_count": args.core, "min_user_count": args.core}
    base = int(child(IMPORT_ONLY))
    rows = []
    for actions in map(int, args.actions):
        work = Path(tempfile.mkdtemp(prefix="gr-prepare-", dir=args.scratch))
        try:
            start = time.perf_counter()
            generate(
                work / "log", actions, max(actions // args.actions_per_user, 1), args.items, args.text_ids
            )
            generated = time.perf_counter() - start
            log = {
                "log_actions": actions,
                "log_bytes": sum(f.stat().st_size for f in (work / "log").iterdir()),
                "generating_seconds": generated,
            }
            made = []
            for engine in args.engines:
                given = (str(work / "log"), str(work / engine), json.dumps(options), engine)
                made.append(json.loads(child(CHILD, *given)))
                shutil.rmtree(work / engine)
                said = f"{actions:,} actions, {engine}: {made[-1]['seconds']:.1f} s"
                print(said, file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(work)
        if len({row["fingerprint"] for row in made}) > 1:
            sys.exit(f"the engines give different datasets: {made}")
        rows += [{**log, **row} for row in made]
    show(rows, base, args)
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
    }
    result = {
        "command": ["benchmarks/data/prepare.py", *sys.argv[1:]],
        "machine": machine,
        "import_bytes": base,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    plot(rows, base, args.json.with_suffix(".png"))
    print(f"written: {args.json}, {args.json.with_suffix('.png')}")


def show(rows: list[dict], base: int, args: argparse.Namespace) -> None:
    table = Table(
        title=f"prepare: chunk {args.chunk_rows:,} rows, partition {args.memory_mb} MiB", title_justify="left"
    )
    for column in (
        "engine",
        "actions",
        "users",
        "items",
        "seconds",
        "actions/s",
        "per core-s",
        "peak MiB",
        "above imports",
        "one process",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["engine"],
            f"{row['log_actions']:,}",
            f"{row['users']:,}",
            f"{row['items']:,}",
            f"{row['seconds']:.1f}",
            f"{row['log_actions'] / row['seconds']:,.0f}",
            f"{row['log_actions'] / row['core_seconds']:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{(row['peak_bytes'] - base) / 2**20:,.0f}",
            f"{row['largest_process_bytes'] / 2**20:,.0f}",
        )
    Console(width=130).print(table)


def plot(rows: list[dict], base: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for engine in dict.fromkeys(row["engine"] for row in rows):
        mine = [row for row in rows if row["engine"] == engine]
        actions = [row["log_actions"] for row in mine]
        left.plot(actions, [(row["peak_bytes"] - base) / 2**20 for row in mine], "o-", label=engine)
        right.plot(actions, [row["log_actions"] / row["seconds"] for row in mine], "o-", label=engine)
    left.set(xscale="log", xlabel="actions", ylabel="peak memory above imports, MiB", ylim=(0, None))
    right.set(xscale="log", xlabel="actions", ylabel="actions a second", ylim=(0, None))
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
