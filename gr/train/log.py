"""What a run says of itself: rows in files, and its progress for the person who watches."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from gr.data.batches import GlobalBatch
from gr.processes import Processes
from gr.progress import Progress, default_progress, speed
from gr.train.exposition import Exposition
from gr.train.folder import RunFolder, append_rows
from gr.train.work import Done

DATA_BOUND = 0.05
"""A run that waits for data longer than this share of its time is bound by it: batches read ahead cost no wait."""


class MetricsLog:
    """metrics.jsonl (deterministic), timing.jsonl (not), TensorBoard if it is there, Prometheus if it is wanted.  Only
    the main rank writes."""

    def __init__(
        self,
        folder: RunFolder,
        tensorboard: bool,
        active: bool,
        done: int = 0,
        prometheus: str | None = None,
    ):
        """``done``: steps so far; TensorBoard forgets what it had of later ones.  ``prometheus``: where to serve."""
        self.folder, self.active = folder, active
        self.events = _tensorboard(folder, done) if active and tensorboard else None
        self.served = Exposition(prometheus) if active and prometheus is not None else None

    def write(self, row: dict[str, Any]) -> int:
        """Append a row to metrics.jsonl; returns 1, the rows written."""
        if self.active:
            append_rows(self.folder.metrics, [row])
            if self.served is not None:
                self.served.take(row["kind"], row)
            self._events(
                {"eval": row.get("split"), "baseline": row.get("name")}.get(row["kind"]) or "train", row
            )
        return 1

    def write_timing(self, row: dict[str, Any]) -> None:
        if self.active:
            append_rows(self.folder.timing, [row])
            if self.served is not None:
                self.served.take("timing", row)
            self._events("timing", row)

    def close(self) -> None:
        if self.served is not None:
            self.served.close()
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

        return SummaryWriter(str(folder.here / "tensorboard"), purge_step=done + 1 if done else None)
    except Exception:  # not installed, or broken: it is an extra
        return None


class StepProgress:
    """How far training is, how it does and how fast: a stage of steps on stdout, nothing on other ranks."""

    def __init__(self, total_steps: int, done: int, active: bool):
        self.window = Window()
        self.waits = Waits()
        self._step, self._active = done, active
        self._held = ExitStack()
        progress = default_progress(sys.stdout) if active else Progress()
        self._stage = self._held.enter_context(progress.stage("training", total_steps, "steps", done))

    def update(
        self,
        epoch: int,
        epochs: int,
        step: int,
        loss: float,
        samples: int,
        actions: int,
        *,
        done: Done = Done(),
        status: Callable[[], str] | None = None,
    ) -> None:
        """After step number ``step`` with the global batch's ``samples`` sequences and ``actions`` targets, and the
        work that was ``done``; loss: the last one that was read; status: says more of the rates."""
        self.window.add(samples, actions, done.flops, done.padded)
        shown = "-" if math.isnan(loss) else f"{loss:.4f}"  # none was read since a resume
        text = (
            f"epoch {epoch + 1}/{epochs}, loss {shown}, "
            f"{speed(self.window.samples_per_s)} samples/s, {speed(self.window.actions_per_s)} tokens/s"
        )
        self._stage.show(text if status is None or not self._active else f"{text}, {status()}")
        self._stage.advance(step - self._step)
        self._step = step

    def pause(self) -> AbstractContextManager[None]:
        """Around what is no training (an evaluation, a checkpoint): it doesn't count in the rates."""
        return self.window.pause()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._stage.say(text)

    def close(self) -> None:
        self._held.close()


class Waits:
    """How long training waited for batches, and how level they were.

    ``last``: seconds, for the latest batch.  ``waited``: for all of them; ``spent``: on all steps and these waits.
    ``skews``: sums of the batches' (gr.data.batches.Described); ``batches``: how many there were.
    """

    def __init__(self) -> None:
        self.last = self.waited = self.spent = 0.0
        self.skews, self.batches = [0.0, 0.0], 0

    def timed(self, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
        """``batches``, the waits for them measured."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.last = time.perf_counter() - started
            self.waited, self.spent = self.waited + self.last, self.spent + self.last
            self.skews = [total + one for total, one in zip(self.skews, batch.skew, strict=True)]
            self.batches += 1
            yield batch

    def summary(self, processes: Processes) -> str:
        """What bounds the run, in a line; all processes ask, for the slowest one holds up the others."""
        seconds = processes.everybodys((self.waited, self.spent))
        waited, spent = max(seconds, key=lambda pair: pair[0] / max(pair[1], 1e-9))
        share = waited / max(spent, 1e-9)
        text = (
            f"{'data' if share > DATA_BOUND else 'compute'}-bound: {share:.1%} of {spent:,.1f} s of steps were spent "
            "waiting for data"
        )
        if processes.data.size > 1 and self.batches:
            dealt, consecutive = (total / self.batches for total in self.skews)
            text += f"; the heaviest rank had {dealt:.3f} of the mean cost ({consecutive:.3f} if it were not dealt)"
        return text


class Window:
    """Rates of training over about the last ten seconds that were spent on it."""

    def __init__(self) -> None:
        self._paused = 0.0
        self._marks = [(self._now(), 0, 0, 0, 0)]

    def _now(self) -> float:
        """A clock that stands still in pauses."""
        return time.perf_counter() - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def add(self, samples: int, actions: int, flops: int = 0, padded: int = 0) -> None:
        _, s, a, f, p = self._marks[-1]
        self._marks.append((self._now(), s + samples, a + actions, f + flops, p + padded))
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[1][0] > 10:
            self._marks.pop(0)

    def _rate(self, column: int) -> float:
        first, last = self._marks[0], self._marks[-1]
        return (last[column] - first[column]) / max(last[0] - first[0], 1e-9)

    samples_per_s = property(lambda self: self._rate(1))
    actions_per_s = property(lambda self: self._rate(2))
    flops_per_s = property(lambda self: self._rate(3))
    padded_per_s = property(lambda self: self._rate(4))
