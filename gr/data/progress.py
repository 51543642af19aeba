"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PLAIN_SECONDS = 5.0
"""Without a terminal: at most one line in so many seconds."""


class Stage:
    """One stage of the work: ``advance`` counts units done (actions, records, bytes)."""

    def advance(self, units: int) -> None:
        """``units`` more are done."""


class Progress:
    """Quiet progress, and the interface: ``with progress.stage('reading', total, 'actions') as stage: ...``."""

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "actions") -> Iterator[Stage]:
        """A stage of ``total`` units (None: not known)."""
        yield Stage()

    def note(self, text: str) -> None:
        """One line for the reader."""


class _PlainStage(Stage):
    def __init__(self, name: str, total: int | None, unit: str, stream: TextIO):
        self.name, self.total, self.unit, self.stream = name, total, unit, stream
        self.done = 0
        self.start = self.last = time.monotonic()

    def advance(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.last >= PLAIN_SECONDS:
            self.last = now
            self.line(now)

    def line(self, now: float) -> None:
        rate = self.done / max(now - self.start, 1e-9)
        of = f" of {self.total:,}" if self.total else ""
        eta = f", {max(self.total - self.done, 0) / rate:.0f} s left" if self.total and rate else ""
        print(f"{self.name}: {self.done:,}{of} {self.unit}, {rate:,.0f}/s{eta}", file=self.stream, flush=True)


class PlainProgress(Progress):
    """Lines on ``stream`` (stderr)."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "actions") -> Iterator[Stage]:
        stage = _PlainStage(name, total, unit, self.stream)
        yield stage
        stage.line(time.monotonic())

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class _BarStage(Stage):
    def __init__(self, bar, task):
        self.bar, self.task = bar, task

    def advance(self, units: int) -> None:
        self.bar.advance(self.task, units)
        speed = self.bar.tasks[self.task].finished_speed or self.bar.tasks[self.task].speed
        self.bar.update(self.task, rate=f"{speed:,.0f}/s" if speed else "")


class BarProgress(Progress):
    """A rich bar with rate and time left."""

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "actions") -> Iterator[Stage]:
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("{task.description:<12}"),
            bars.BarColumn(),
            bars.TextColumn("{task.completed:,.0f} {task.fields[unit]}  {task.fields[rate]}"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            yield _BarStage(bar, bar.add_task(name, total=total, unit=unit, rate=""))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def default_progress() -> Progress:
    """A bar when stderr is a terminal, lines otherwise."""
    return BarProgress() if sys.stderr.isatty() else PlainProgress()
