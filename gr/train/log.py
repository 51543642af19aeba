"""What a run says of itself: rows in files, and one moving line for the person who watches."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from gr.train.folder import RunFolder, append_rows

PLAIN_SECONDS = 10.0


class MetricsLog:
    """metrics.jsonl (deterministic), timing.jsonl (not), TensorBoard if it is there.  Only the main rank writes."""

    def __init__(self, folder: RunFolder, tensorboard: bool, active: bool, done: int = 0):
        """``done``: steps so far; TensorBoard forgets what it had of later ones."""
        self.folder, self.active = folder, active
        self.events = _tensorboard(folder, done) if active and tensorboard else None

    def write(self, row: dict[str, Any]) -> int:
        """Append a row to metrics.jsonl; returns 1, the rows written."""
        if self.active:
            append_rows(self.folder.metrics, [row])
            self._events(
                {"eval": row.get("split"), "baseline": row.get("name")}.get(row["kind"]) or "train", row
            )
        return 1

    def write_timing(self, row: dict[str, Any]) -> None:
        if self.active:
            append_rows(self.folder.timing, [row])
            self._events("timing", row)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()

    def _events(self, kind: str, row: dict[str, Any]) -> None:
        if self.events is None:
            return
        try:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("epoch", "step"):
                    self.events.add_scalar(f"{kind}/{name}", value, row["step"])
        except Exception as error:  # a logger can never kill a run
            print(f"TensorBoard failed ({error}): training goes on without it", file=sys.stderr)
            self.events = None


def _tensorboard(folder: RunFolder, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1 if done else None)
    except Exception:  # not installed, or broken: it is an extra
        return None


class StepProgress:
    """The moving line: a bar on a terminal, a plain line every few seconds elsewhere, nothing on other ranks."""

    def __init__(self, total_steps: int, done: int, active: bool):
        self.total, self.active = total_steps, active
        self.first = self.step = done
        self.start = time.perf_counter()
        self.window = _Window()
        self._printed = 0.0
        self._bar = _Bar(total_steps, done) if active and sys.stdout.isatty() else None

    def update(self, epoch: int, epochs: int, step: int, loss: float, samples: int, actions: int) -> None:
        """After step number ``step`` with the global batch's ``samples`` sequences and ``actions`` targets."""
        self.step = step
        self.window.add(samples, actions)
        if not self.active:
            return
        now = time.perf_counter()
        shown = "-" if math.isnan(loss) else f"{loss:.4f}"  # none was read since a resume
        line = (
            f"epoch {epoch + 1}/{epochs}  loss {shown}  "
            f"{self.window.samples_per_s:,.0f} samples/s  {self.window.actions_per_s:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(step, line)
        elif now - self._printed > PLAIN_SECONDS or step == self.first + 1:
            self._printed = now
            print(f"step {step}/{self.total}  {line}  ETA {clock(self.eta)}", flush=True)

    @property
    def eta(self) -> float:
        done = self.step - self.first
        return (time.perf_counter() - self.start) / done * (self.total - self.step) if done else float("nan")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.say(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Window:
    """Rates over about the last ten seconds."""

    def __init__(self) -> None:
        self.marks = [(time.perf_counter(), 0, 0)]

    def add(self, samples: int, actions: int) -> None:
        _, s, a = self.marks[-1]
        self.marks.append((time.perf_counter(), s + samples, a + actions))
        while len(self.marks) > 2 and self.marks[-1][0] - self.marks[1][0] > 10:
            self.marks.pop(0)

    def _rate(self, column: int) -> float:
        first, last = self.marks[0], self.marks[-1]
        return (last[column] - first[column]) / max(last[0] - first[0], 1e-9)

    samples_per_s = property(lambda self: self._rate(1))
    actions_per_s = property(lambda self: self._rate(2))


class _Bar:
    def __init__(self, total: int, done: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("starting", total=total, completed=done)
        self.progress.start()

    def update(self, step: int, line: str) -> None:
        self.progress.update(self.task, completed=step, description=line)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.progress.stop()


def clock(seconds: float) -> str:
    if seconds != seconds:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
