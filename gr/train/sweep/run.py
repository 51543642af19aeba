"""Training a sweep's members, several at a time; one that fails is a result like another."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from gr.errors import UserError
from gr.train.cells import Trained, check_cells, is_finished, train_cell
from gr.train.sweep.backends.base import Backend
from gr.train.sweep.plan import Member
from gr.train.sweep.watch import Watch


@dataclass(frozen=True)
class Outcome:
    """A member after its training.  why: what failed, where there is no ``trained``."""

    member: Member
    trained: Trained | None
    why: str = ""


def train_members(members: Sequence[Member], out: Path, workers: int, backend: Backend) -> list[Outcome]:
    """Train what isn't finished, ``workers`` at a time; in the order given.

    What a training prints goes to out/logs/NAME.txt.  SIGTERM and an interrupt are handed on, so that each saves.
    Raises UserError before anything is trained where a member's folder holds another run, and after a request to stop.
    """
    check_cells([member.cell for member in members])
    (out / "logs").mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    watch, stopped = Watch(members), _Stopped(backend)

    def train(member: Member) -> Outcome:
        cell, log = member.cell, out / "logs" / f"{member.cell.name}.txt"
        if member.config.train.threads is None and workers > 1 and backend.shares_cores:
            cell = replace(cell, overrides=(*cell.overrides, f"train.threads={threads}"))
        if stopped.asked and not is_finished(cell):
            return Outcome(member, None, "not begun")
        before = log.stat().st_size if log.is_file() else 0
        watch.begin(member)
        try:
            trained = train_cell(cell, log, lambda command, _: backend.run(cell.name, command, log))
            return Outcome(member, trained)
        except (UserError, OSError) as error:  # a full disk is this member's, as far as it is
            return Outcome(member, None, ("" if stopped.asked else _reason(log, before)) or str(error))

    with stopped.handing_on(), watch.shown(), ThreadPoolExecutor(workers) as pool:
        futures: list[Future[Outcome]] = [pool.submit(train, member) for member in members]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                outcome = future.result()
                watch.end(outcome.member, outcome.trained is None)
                failed = "stopped" if stopped.asked else f"failed: {outcome.why}"
                ended = "finished" if outcome.trained else failed
                watch.console.print(
                    f"[{number}/{len(members)}] {outcome.member.cell.name} {ended}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
        except KeyboardInterrupt:
            stopped.stop()
            raise
    if stopped.asked:
        raise UserError("the sweep was stopped; run the same command again to go on")
    return [future.result() for future in futures]


class _Stopped:
    """Whether somebody has asked for the end; the backend is told."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.asked = backend, False

    def stop(self) -> None:
        self.asked = True
        self.backend.stop()

    @contextmanager
    def handing_on(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stop()

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
