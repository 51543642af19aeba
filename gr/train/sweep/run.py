"""Training a sweep's members, several at a time; one that fails is a result like another."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from gr.errors import UserError
from gr.train.cells import Trained, check_cells, is_finished, train_cell
from gr.train.sweep.plan import Member

Ended = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """A member after its training.  why: what failed, where there is no ``trained``."""

    member: Member
    trained: Trained | None
    why: str = ""


class _Running:
    """The trainings that are under way, so that a request to stop reaches each."""

    def __init__(self) -> None:
        self.stopped = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def begun(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._processes.append(process)
        if self.stopped:  # asked for while it was being started
            process.terminate()

    def stop(self) -> None:
        self.stopped = True
        for process in list(self._processes):
            with suppress(ProcessLookupError):
                process.terminate()


def train_members(members: Sequence[Member], out: Path, workers: int, say: Ended = print) -> list[Outcome]:
    """Train what isn't finished, ``workers`` at a time, each with its share of the cores; in the order given.

    What a training prints goes to out/logs/NAME.txt.  SIGTERM and an interrupt are handed on, so that each saves.
    Raises UserError before anything is trained where a member's folder holds another run, and after a request to stop.
    """
    check_cells([member.cell for member in members])
    (out / "logs").mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    running = _Running()

    def train(member: Member) -> Outcome:
        cell, log = member.cell, out / "logs" / f"{member.cell.name}.txt"
        if member.config.train.threads is None and workers > 1:
            cell = replace(cell, overrides=(*cell.overrides, f"train.threads={threads}"))
        if running.stopped and not is_finished(cell):
            return Outcome(member, None, "not begun")
        before = log.stat().st_size if log.is_file() else 0
        try:
            return Outcome(member, train_cell(cell, log, running.begun))
        except UserError as error:
            return Outcome(member, None, ("" if running.stopped else _reason(log, before)) or str(error))

    with _handing_on(running), ThreadPoolExecutor(workers) as pool:
        futures: list[Future[Outcome]] = [pool.submit(train, member) for member in members]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                outcome = future.result()
                failed = "stopped" if running.stopped else f"failed: {outcome.why}"
                ended = "finished" if outcome.trained else failed
                say(f"[{number}/{len(members)}] {outcome.member.cell.name} {ended}")
        except KeyboardInterrupt:
            running.stop()
            raise
    if running.stopped:
        raise UserError("the sweep was stopped; run the same command again to go on")
    return [future.result() for future in futures]


@contextmanager
def _handing_on(running: _Running) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        running.stop()

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(log: Path, before: int) -> str:
    """The last error that a training has told, behind what stood in its log ``before``."""
    with suppress(OSError):
        text = log.read_bytes()[before:].decode(errors="replace")
        told = [line for line in text.splitlines() if line.startswith("error: ")]
        if told:
            return told[-1].removeprefix("error: ")
    return ""
