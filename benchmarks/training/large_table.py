"""Does a table of about the machine's memory train, evaluate, get saved and go on, without ever being there twice?

    python benchmarks/training/large_table.py --gib 8

Makes a dataset of few users over a catalogue of 2^31 / 64 items (for 8 GiB), trains it on two processes that hold
half of the table each, evaluates over the whole catalogue, writes a checkpoint, and goes on from it on one process:
as a user does it, by launch/train.py.  The memory of all processes together, torchrun's own included, is looked at all
the time: RSS, in which a page that two processes map counts twice, and PSS, in which it counts once.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIM, USERS, LENGTH = 64, 64, 20
GIB = 2**30
CONFIG = """
run: {{dir: {run}}}
data: {{path: {data}, max_length: {length}, split: {{name: leave_one_out, holdout: 2}}}}
model:
  dim: {dim}
  table: {{name: torchrec, sharding: row_wise}}
  encoder: {{name: hstu, layers: 2, heads: 2, qk_dim: 16, v_dim: 16, dropout: 0.2}}
objective: {{name: sampled_softmax, negatives: 128}}
optimizer: {{name: {optimizer}, lr: 0.01}}
train: {{epochs: 99, max_steps: 4, global_batch: 16, clip_norm: 1.0, threads: 1}}
eval: {{splits: [test], ks: [10, 100], every_epochs: 99, max_users: 32}}
checkpoint: {{keep: 1, every_epochs: 99, every_steps: {every_steps}, asynchronous: {asynchronous}}}
log: {{every_steps: 1, tensorboard: false}}
"""
MOMENTS = {"sgd": 0.0, "rowwise_adagrad": 1 / DIM, "lazy_adam": 2.0}
"""Numbers beside each of the table's."""


@dataclass
class Watch:
    """Of a process and all that it started: the peak of their memory together, in bytes."""

    pid: int
    rss: int = 0
    pss: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Until it is over: RSS fifty times a second, PSS (of which the system makes a sum over pages) twice."""
        last, before = 0.0, 0
        while not self._over.wait(0.02):
            pids = family(self.pid)
            rss = sum(_rss(pid) for pid in pids)
            # A process that starts another one is there twice for less than two looks, in name alone.
            self.rss, before = max(self.rss, min(rss, before)), rss
            if time.monotonic() - last > 0.5:
                self.pss, last = max(self.pss, sum(_pss(pid) for pid in pids)), time.monotonic()

    def end(self) -> None:
        self._over.set()


@dataclass(frozen=True)
class Row:
    """Of the table: what was done, its memory, its seconds, what it printed."""

    name: str
    watch: Watch
    seconds: float
    said: str


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        except OSError:  # it has just ended
            continue
    return found


def _rss(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def watched(command: list[str]) -> tuple[Watch, float, str]:
    """Run a command to its end: its peak, its seconds, what it printed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    watch = Watch(process.pid)
    thread = threading.Thread(target=watch.look)
    thread.start()
    said, _ = process.communicate()
    watch.end()
    thread.join()
    if process.returncode:
        raise SystemExit(said)
    return watch, time.monotonic() - started, said


def make_dataset(path: Path, items: int) -> None:
    """Few users with random items of a large catalogue; in a process of its own, for its memory goes with it."""
    import numpy as np
    import pyarrow as pa

    from gr.data.sequences import Sequences
    from gr.data.writing import DatasetWriter

    rng = np.random.default_rng(0)
    offsets = np.arange(USERS + 1) * LENGTH
    rows = rng.integers(0, items, USERS * LENGTH).astype(np.int32)
    times = np.tile(np.arange(LENGTH) * 3600, USERS)
    writer = DatasetWriter(path, "large")
    writer.add(Sequences.of(np.arange(USERS), offsets, item=rows, time=times))
    counts = np.zeros(items, np.int64)
    np.add.at(counts, rows, 1)
    writer.finish(pa.table({"item_id": np.arange(items), "count": counts}))


def measure(folder: Path, items: int, optimizer: str, asynchronous: bool) -> list[Row]:
    """What was done, in order."""
    config, run, data = folder / "config.yaml", folder / "run", folder / "data"
    config.write_text(
        CONFIG.format(
            run=run,
            data=data,
            dim=DIM,
            length=LENGTH,
            optimizer=optimizer,
            every_steps=2 if asynchronous else "null",
            asynchronous=str(asynchronous).lower(),
        )
    )
    program = str(ROOT / "launch/train.py")
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    commands = {
        "dataset": [sys.executable, __file__, "--only-dataset", str(data), "--items", str(items)],
        "2 processes: train, evaluate, save": [*two, "--config", str(config)],
        "1 process: load, train, evaluate, save": [
            *(sys.executable, program, "--resume", str(run), "train.max_steps=8")
        ],
    }
    done = []
    for name, command in commands.items():
        done.append(Row(name, *watched(command)))
        print(done[-1].said, file=sys.stderr)
    if "at epoch 2, step 4" not in done[-1].said:
        raise SystemExit("it did not go on from step 4")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="the table's weights, in GiB")
    parser.add_argument("--optimizer", choices=MOMENTS, default="rowwise_adagrad")
    parser.add_argument("--asynchronous", action="store_true", help="checkpoints in a thread")
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile (three times the table)")
    parser.add_argument("--only-dataset", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--items", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only_dataset:
        make_dataset(asked.only_dataset, asked.items)
        return
    items = int(asked.gib * GIB) // (4 * DIM)
    table = 4 * DIM * items
    state = table * (1 + MOMENTS[asked.optimizer])
    folder = Path(tempfile.mkdtemp(prefix="gr-large-table-", dir=asked.folder))
    try:
        rows = measure(folder, items, asked.optimizer, asked.asynchronous)
    finally:
        shutil.rmtree(folder)
    print(
        f"{items:,} items x {DIM} float32, {table / GIB:.2f} GiB, {asked.optimizer}: table and moments "
        f"{state / GIB:.2f} GiB; {platform.machine()}, {os.cpu_count()} cores"
    )
    print(
        "\n| | seconds | peak RSS, GiB | peak PSS, GiB | PSS - (table + moments), GiB |\n|---|---|---|---|---|"
    )
    for row in rows:
        rss, pss = row.watch.rss, row.watch.pss
        over = "" if row is rows[0] else f"{(pss - state) / GIB:+.2f}"
        print(f"| {row.name} | {row.seconds:.0f} | {rss / GIB:.2f} | {pss / GIB:.2f} | {over} |")
    for row in rows:
        if told := [line.strip() for line in row.said.splitlines() if "checkpoint of step" in line]:
            print(f"\n{row.name}: {'; '.join(told)}")


if __name__ == "__main__":
    main()
