"""How far a sweep's members are, while they train: read off their folders, wherever they run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gr.progress import clock
from gr.train.sweep.plan import Member

TERMINAL_SECONDS, PLAIN_SECONDS = 2.0, 60.0
"""Between two looks: where a table is drawn over, and where lines stay."""
TAIL = 8192
"""Bytes at a metrics file's end that hold a whole row."""


class Watch:
    """``begin`` and ``end`` of each member's training; what runs is looked at from time to time."""

    def __init__(self, members: Sequence[Member], console: Console | None = None) -> None:
        self.console = console or Console()
        self.count = len(members)
        self.ended = self.failed = 0
        self._begun: dict[str, tuple[Member, float, int]] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()

    def begin(self, member: Member) -> None:
        with self._lock:
            self._begun[member.cell.name] = (member, time.monotonic(), step_of(member))

    def end(self, member: Member, failed: bool) -> None:
        with self._lock:
            self._begun.pop(member.cell.name, None)
            self.ended, self.failed = self.ended + 1, self.failed + failed

    @property
    def title(self) -> str:
        return f"{self.ended} of {self.count} members over, {self.failed} failed"

    def rows(self) -> list[list[str]]:
        """Of each member that trains: name, steps, steps a second, time left."""
        with self._lock:
            begun = list(self._begun.values())
        found = []
        for member, since, first in begun:
            step, total = step_of(member), member.config.train.max_steps
            rate = (step - first) / max(time.monotonic() - since, 1e-9)
            of = f" of {total:,}" if total else ""
            left = clock((total - step) / rate) if total and rate else ""
            found.append([member.cell.name, f"{step:,}{of}", f"{rate:.1f}" if rate else "", left])
        return found

    def table(self) -> Table:
        view = Table("member", "steps", "steps/s", "left", title=self.title, title_justify="left")
        for row in self.rows():
            view.add_row(*row)
        return view

    @contextmanager
    def shown(self) -> Iterator[None]:
        """A table that is drawn over on a terminal; elsewhere a line for each member that trains, once a minute."""
        terminal = self.console.is_terminal
        live = Live(console=self.console, get_renderable=self.table, refresh_per_second=1 / TERMINAL_SECONDS)
        watcher = threading.Thread(target=self._say, daemon=True)
        try:
            if terminal:
                live.start()
            else:
                watcher.start()
            yield
        finally:
            self._over.set()
            if terminal:
                live.stop()
            else:
                watcher.join()

    def _say(self) -> None:
        while not self._over.wait(PLAIN_SECONDS):
            for name, steps, rate, left in self.rows():
                more = f", {rate} steps/s" * bool(rate) + f", {left} left" * bool(left)
                self.console.print(f"  {name}: {steps} steps{more}", highlight=False, markup=False)


def step_of(member: Member) -> int:
    """The last step that a member's folder tells of."""
    file = Path(member.cell.folder) / "metrics.jsonl"
    with suppress(OSError):
        with file.open("rb") as lines:
            lines.seek(0, 2)
            lines.seek(max(lines.tell() - TAIL, 0))
            tail = lines.read()
        for line in reversed(tail.splitlines()):
            with suppress(ValueError, TypeError, KeyError):
                return int(json.loads(line)["step"])
    return 0
