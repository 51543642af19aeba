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


class _Counted(Stage):
    """A stage that knows how far and how fast it is.  Rates are averages since its beginning."""

    def __init__(self, name: str, total: int | None, unit: str):
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)

    def status(self) -> str:
        """How much is done, how fast, how long the rest takes."""
        rate = self.done / self.seconds
        of = f" of {self.total:,}" if self.total else ""
        left = f", {clock(max(self.total - self.done, 0) / rate)} left" if self.total and rate else ""
        return f"{self.done:,}{of} {self.unit}, {rate:,.0f}/s{left}"

    def result(self) -> str:
        """The same when all is done; a total that was an estimate is of no more interest."""
        return f"{self.done:,} {self.unit} in {self.seconds:.1f} s, {self.done / self.seconds:,.0f}/s"


def clock(seconds: float) -> str:
    """59 s, 12:34, 1:02:03."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _PlainStage(_Counted):
    def __init__(self, name: str, total: int | None, unit: str, stream: TextIO):
        super().__init__(name, total, unit)
        self.stream, self.last = stream, self.start

    def advance(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.last >= PLAIN_SECONDS:
            self.last = now
            self.line(self.status())

    def line(self, text: str) -> None:
        print(f"{self.name}: {text}", file=self.stream, flush=True)


class PlainProgress(Progress):
    """Lines on ``stream`` (stderr)."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "actions") -> Iterator[Stage]:
        stage = _PlainStage(name, total, unit, self.stream)
        yield stage
        stage.line(stage.result())

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class _BarStage(_Counted):
    def __init__(self, bar, name: str, total: int | None, unit: str):
        super().__init__(name, total, unit)
        self.bar, self.task = bar, bar.add_task(name, total=total, status="")

    def advance(self, units: int) -> None:
        self.done += units
        self.bar.update(self.task, completed=self.done, status=self.status())

    def finish(self) -> None:
        self.bar.update(self.task, total=max(self.done, 1), completed=max(self.done, 1), status=self.result())


class BarProgress(Progress):
    """A rich bar with rate and time left."""

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "actions") -> Iterator[Stage]:
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("{task.description:<12}", markup=False),
            bars.BarColumn(bar_width=16),
            bars.TextColumn("{task.fields[status]}", markup=False),
        )
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            stage = _BarStage(bar, name, total, unit)
            yield stage
            stage.finish()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def default_progress() -> Progress:
    """A bar when stderr is a terminal, lines otherwise."""
    return BarProgress() if sys.stderr.isatty() else PlainProgress()
