"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

FIRST_SECONDS = 1.0
PLAIN_SECONDS = 10.0
"""Without a terminal: a line after a second, and from then on at most one in so many."""


class Stage:
    """One stage of the work: ``advance`` counts units done (actions, records, bytes)."""

    def advance(self, units: int) -> None:
        """``units`` more are done."""

    def show(self, status: str) -> None:
        """From the next ``advance`` on: ``status`` in place of the average rate."""

    def say(self, text: str) -> None:
        """A line that stays."""


class Progress:
    """Quiet progress, and the interface: ``with progress.stage('reading', total, 'actions') as stage: ...``."""

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = "actions", done: int = 0
    ) -> Iterator[Stage]:
        """A stage of ``total`` units (None: not known), ``done`` of which were done at another time."""
        yield Stage()

    def note(self, text: str) -> None:
        """One line for the reader."""


class _Counted(Stage):
    """A stage that knows how far and how fast it is.  Rates are averages since its beginning."""

    def __init__(self, name: str, total: int | None, unit: str, done: int):
        self.name, self.total, self.unit = name, total, unit
        self.first = self.done = done
        self.shown = ""
        self.start = time.monotonic()

    def show(self, status: str) -> None:
        self.shown = status

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)

    @property
    def rate(self) -> float:
        return (self.done - self.first) / self.seconds

    def status(self) -> str:
        """How much is done, how fast, how long the rest takes; what is shown goes last, where a terminal may cut it."""
        of = f" of {self.total:,}" if self.total else ""
        left = (
            f", {clock(max(self.total - self.done, 0) / self.rate)} left" if self.total and self.rate else ""
        )
        rate = "" if self.shown else f", {speed(self.rate)}/s"
        shown = f", {self.shown}" if self.shown else ""
        return f"{self.done:,}{of} {self.unit}{rate}{left}{shown}"

    def result(self) -> str:
        """The same when all is done; a total that was an estimate is of no more interest."""
        return f"{self.done - self.first:,} {self.unit} in {clock(self.seconds, 1)}, {speed(self.rate)}/s"


def clock(seconds: float, digits: int = 0) -> str:
    """59 s, 12:34, 1:02:03; ``digits`` of the seconds below a minute."""
    if seconds < 59.5:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def speed(rate: float) -> str:
    """1,234 a second; of less than ten two digits, so that what takes minutes a piece doesn't look as if it stood."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


class _PlainStage(_Counted):
    def __init__(self, stream: TextIO, *stage):
        super().__init__(*stage)
        self.stream, self.due = stream, self.start + FIRST_SECONDS

    def advance(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        if now >= self.due:
            self.due = now + PLAIN_SECONDS
            self.say(f"{self.name}: {self.status()}")

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class _Written(Progress):
    """Progress on ``stream`` (stderr)."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class PlainProgress(_Written):
    """Lines."""

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = "actions", done: int = 0
    ) -> Iterator[Stage]:
        stage = _PlainStage(self.stream, name, total, unit, done)
        yield stage
        if stage.done > stage.first:
            stage.say(f"{name}: {stage.result()}")


_NAME, _BAR = 12, 16
"""Widths of a stage's name and of its bar."""


class _BarStage(_Counted):
    def __init__(self, bar, *stage):
        super().__init__(*stage)
        self.bar = bar
        self.task = bar.add_task(self.name, total=self.total, completed=self.done, status="")

    def advance(self, units: int) -> None:
        self.done += units
        room = max(self.bar.console.width - max(_NAME, len(self.name)) - _BAR - 2, 1)
        status = self.status()  # a narrow terminal cuts its end, not the name or the bar
        status = status if len(status) <= room else f"{status[: room - 1]}…"
        self.bar.update(self.task, completed=self.done, status=status)

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        self.bar.update(self.task, total=max(self.done, 1), completed=max(self.done, 1), status=self.result())


class BarProgress(_Written):
    """A rich bar with rate and time left; the stream is a terminal."""

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = "actions", done: int = 0
    ) -> Iterator[Stage]:
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn(f"{{task.description:<{_NAME}}}", markup=False),
            bars.BarColumn(bar_width=_BAR),
            bars.TextColumn("{task.fields[status]}", markup=False),
        )
        with bars.Progress(*columns, console=Console(file=self.stream)) as bar:
            stage = _BarStage(bar, name, total, unit, done)
            yield stage
            stage.finish()


def default_progress(stream: TextIO | None = None) -> Progress:
    """A bar when ``stream`` (stderr) is a terminal, lines on it otherwise."""
    stream = stream or sys.stderr
    return BarProgress(stream) if stream.isatty() else PlainProgress(stream)
