"""Cells: trainings that belong together, each in a process and a folder of its own.

What is finished is not repeated, what was interrupted goes on, and a folder that was trained otherwise is refused, so
that the same command, run again, takes the work to its end.  What a cell is trained for (a published table, a sweep)
is its owner's matter.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from gr.config import RunConfig, load
from gr.data.dataset import SequenceDataset
from gr.errors import UserError
from gr.train import checkpoint
from gr.train.changes import differences, within
from gr.train.folder import RunFolder, read_rows

TRAIN = (sys.executable, "-m", "gr.programs.train")
"""A training as a person starts it: by the program's name, in this interpreter."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
NOT_THE_RESULT = (
    *("run", "checkpoint", "log", "data.path", "data.prefetch", "data.ingest"),
    *("eval.batch", "eval.max_scores", "eval.buckets"),
    *("train.device", "train.threads", "train.kernels", "train.micro_batch_actions"),
)
"""Keys in which a run that is there may differ from the one asked for."""

Begun = Callable[["subprocess.Popen[bytes]"], None]
Start = Callable[[Sequence[str], Path | None], int]
"""Starts a program, hands what it prints on to a file, waits for its end: the exit status, as :func:`exit_status`."""


def unwatched(process: subprocess.Popen[bytes]) -> None:
    """Nobody wants to know of the process."""


@dataclass(frozen=True)
class Cell:
    """``config`` (a file, or the name of one that ships) with ``overrides``, trained in ``folder`` by ``processes``."""

    name: str
    config: str | Path
    folder: str
    overrides: tuple[str, ...] = ()
    processes: int = 1


@dataclass(frozen=True)
class Trained:
    """A finished cell: the config of its run, the rows of its metrics.jsonl, and those of its timing.jsonl."""

    cell: Cell
    config: RunConfig
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]] = field(default_factory=list, compare=False)


def train_cells(cells: Sequence[Cell]) -> list[Trained]:
    """Train what isn't finished, in the order given; the results are in it too.

    Raises UserError: before anything is trained, where a cell's config can't be read, its folder holds another run or
    two cells share one; later, where a training fails or is stopped.
    """
    check_cells(cells)
    return [train_cell(cell, which=f"{number} of {len(cells)}, ") for number, cell in enumerate(cells, 1)]


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuse cells that could not be trained, or whose folder holds another run."""
    owners: dict[Path, Cell] = {}
    for cell in cells:
        other = owners.setdefault(Path(cell.folder).resolve(), cell)
        if other is not cell:
            raise UserError(
                f"'{cell.name}' and '{other.name}' both train in '{cell.folder}': give each its own"
            )
        if cell.processes < 1:
            raise UserError(f"'{cell.name}' asks for {cell.processes} processes: one is the least")
        _refuse_another_run(cell)


def is_finished(cell: Cell) -> bool:
    """Whether the cell's folder holds its run, trained to the end."""
    cursor = _cursor(cell)
    return cursor is not None and cursor["finished"]


def _cursor(cell: Cell) -> dict[str, Any] | None:
    """How far the cell's run is by its newest whole checkpoint."""
    newest = checkpoint.newest(RunFolder(cell.folder).checkpoints)
    return None if newest is None else checkpoint.read_state(newest)["cursor"]


def _refuse_another_run(cell: Cell) -> None:
    wanted = load(cell.config, cell.overrides)
    run = RunFolder(cell.folder)
    if not run.config.is_file():
        return
    for key, found, asked in differences(load(run.config), wanted):
        if not within(key, NOT_THE_RESULT):
            raise UserError(
                f"'{cell.folder}' is there and was trained with {key}={found}, not {asked}: choose another --out, "
                "or move that run away"
            )
    cursor = _cursor(cell)
    generation = SequenceDataset(wanted.data.path).manifest.generation
    if cursor is not None and cursor["generation"] != generation:
        raise UserError(
            f"'{cell.folder}' is there and was trained on another dataset than '{wanted.data.path}' (generation "
            f"{cursor['generation']}, not {generation}): choose another --out, or move that run away"
        )


def train_cell(cell: Cell, log: Path | None = None, start: Start | None = None, which: str = "") -> Trained:
    """Train a checked cell unless it is finished.  log: a file for what the training prints, behind what is there.
    start: what runs the training, on this machine without it.  which: stands before its name on the screen.  Raises
    UserError where the training fails or is stopped."""
    run = RunFolder(cell.folder)
    if not is_finished(cell):
        if log is None:
            print(f"\n{which}{cell.name}: {cell.folder}", flush=True)
        arguments = ["--config", str(cell.config), f"run.dir={cell.folder}", *cell.overrides]
        if run.config.is_file():
            arguments = ["--resume", cell.folder]
        program = TRAIN if cell.processes == 1 else (*TORCHRUN, str(cell.processes), *TRAIN[1:])
        status = (start or exit_status)([*program, *arguments], log)
        if status > 0:
            where = "above" if log is None else f"'{log}'"
            raise UserError(
                f"training '{cell.name}' failed (see {where}); run the same command again to go on"
            )
        if status < 0 or not is_finished(cell):
            raise UserError(f"training '{cell.name}' was stopped; run the same command again to go on")
    return Trained(cell, load(run.config), run.read_metrics(), read_rows(run.timing))


def exit_status(command: Sequence[str], log: Path | None = None, begun: Begun = unwatched) -> int:
    """The exit status of a program of ours, or less than 0 where a signal ended it.  log: as train_cell's.  begun:
    called with the process.

    A request to stop is handed on, so that a training saves and leaves; however it ends then, it was stopped."""
    asked = 0
    with ExitStack() as held:
        output = None if log is None else held.enter_context(log.open("a"))
        process = held.enter_context(subprocess.Popen(command, stdout=output, stderr=output))
        begun(process)

        def hand_on(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked = number
            process.send_signal(number)

        try:
            before = signal.signal(signal.SIGTERM, hand_on)
        except ValueError:  # not in the main thread: signals are somebody else's
            before = None
        try:
            status = process.wait()
            return -asked if asked else status
        except KeyboardInterrupt:  # the terminal has sent it to the training as well
            process.wait()
            raise
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
