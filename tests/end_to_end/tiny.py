"""A tiny real run, started the way a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed.checkpoint as dcp

from gr.data.dataset import SequenceDataset
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.train.folder import RunFolder, read_rows
from tests.programs import TORCHRUN, run_python, torchrun

if TYPE_CHECKING:
    from gr.config import RunConfig
    from gr.train.job import RunResult

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600  # a training that hangs fails its test then; one on a busy machine takes minutes
CONFIG = """
run: {{dir: {run}}}
data: {{path: {data}, max_length: 20, window_blocks: 2, split: {{name: leave_one_out, holdout: 2}}}}
model:
  dim: 16
  encoder: {{name: hstu, layers: 2, heads: 2, qk_dim: 8, v_dim: 8, dropout: 0.2}}
objective: {{name: sampled_softmax, negatives: 16}}
optimizer: {{name: adamw, lr: 0.01}}
train: {{epochs: 3, global_batch: 16, clip_norm: 1.0, threads: 1}}
eval: {{splits: [valid, test], ks: [10]}}
checkpoint: {{every_steps: 4}}
log: {{every_steps: 1, tensorboard: false, plots: false}}
"""


def make_dataset(
    path: Path, users: int = 150, items: int = 60, described: Mapping[str, list] | None = None
) -> SequenceDataset:
    """Sequences that step through the catalogue with noise: something to learn.  described: columns of the items."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts = np.repeat(rng.integers(0, items, users), lengths)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    rows = ((starts + place + rng.integers(0, 3, offsets[-1])) % items).astype(np.int32)
    times = 1_000_000 + place * 3600 + rng.integers(0, 3000, offsets[-1])
    writer = DatasetWriter(path, "tiny", block_rows=32)
    writer.add(Sequences.of(np.arange(users), offsets, item=rows, time=times))
    counts = np.bincount(rows, minlength=items)
    return writer.finish(pa.table({"item_id": np.arange(items), "count": counts, **(described or {})}))


def write_config(folder: Path, data: Path, run: Path) -> Path:
    file = folder / f"{run.name}.yaml"
    file.write_text(CONFIG.format(run=run, data=data))
    return file


def command(arguments: list, processes: int = 1) -> list[str]:
    """What follows ``python`` to train."""
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    return [*launcher, str(ROOT / "launch/train.py"), *map(str, arguments)]


def train(arguments: list, processes: int = 1) -> str:
    """Run train.py to its end; returns what it printed."""
    program = command(arguments)
    done = run_python(program) if processes == 1 else torchrun(processes, program)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_and_signal(
    arguments: list, run: Path, step: int, number: signal.Signals, processes: int = 1, delay: float = 0.0
) -> int:
    """Start train.py, send ``number`` to every one of its processes ``delay`` seconds after ``step`` was logged; the
    exit status, when all of them have ended."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *command(arguments, processes)],
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not any(row.get("step", 0) >= step for row in read_rows(RunFolder(run).metrics)):
                assert process.poll() is None, f"training ended before step {step}\n{written(said)}"
                assert time.monotonic() < deadline, (
                    f"step {step} was not reached in {PATIENCE_S} s\n{written(said)}"
                )
                time.sleep(0.005)
            time.sleep(delay)
            assert process.poll() is None, f"training ended before the signal\n{written(said)}"
            # torchrun gives each a session of its own: a signal to its group would miss them
            workers = descendants(process.pid)
            assert len(workers) >= (processes if processes > 1 else 0)
            send(number, process.pid, *workers)
            status = process.wait(PATIENCE_S)
            deadline = time.monotonic() + PATIENCE_S
            while left := [pid for pid in workers if runs(pid)]:
                assert time.monotonic() < deadline, f"processes {left} outlived the signal"
                time.sleep(0.01)
            return status
        finally:
            if process.poll() is None:
                send(signal.SIGKILL, process.pid, *descendants(process.pid))
                process.wait()


def written(file: TextIO) -> str:
    file.seek(0)
    return file.read()


def send(number: signal.Signals, *processes: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` started, theirs, and so on."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    children: dict[int, list[int]] = {}
    for child, parent in (map(int, line.split()) for line in table.splitlines()):
        children.setdefault(parent, []).append(child)
    found, waiting = [], [pid]
    while waiting:
        started = children.get(waiting.pop(), [])
        found += started
        waiting += started
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    return tensors_in(sorted((run / "checkpoints").glob("step-*"))[-1])


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    described = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP tells every time that it runs in one process
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def assert_same_run(first: Path, second: Path) -> None:
    """Same metrics.jsonl to the letter, same bits of parameters and moments."""
    assert RunFolder(first).metrics.read_text() == RunFolder(second).metrics.read_text()
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stopped_and_resumed(config: RunConfig) -> RunResult:
    """Train, in this process; stop after the third step, whose row is past the last checkpoint's if there is one every
    second step; and go on to the end."""
    from gr.train import job

    def stop(folder: RunFolder) -> None:
        if len(folder.read_metrics()) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(config, on_step=stop)
    return job.resume(config.run.dir)
