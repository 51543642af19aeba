"""torch profiler trace of a few steps, for --profile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

WAIT, WARM_UP, STEPS = 3, 2, 6


def no_trace() -> None:
    """A step went by that nobody traces."""


@contextmanager
def trace(file: str = "trace.json") -> Iterator[Callable[[], None]]:
    """Yields what to call after each step; steps 6 to 11 go into ``file`` (Chrome and Perfetto read it)."""
    rank = int(os.environ.get("RANK", 0))
    path = Path(file if rank == 0 else f"rank{rank}-{file}")

    def finish(done: profiler.profile) -> None:
        done.export_chrome_trace(str(path))
        print(done.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
        print(f"trace: {path} (open it in Perfetto or chrome://tracing)", flush=True)

    schedule = profiler.schedule(wait=WAIT, warmup=WARM_UP, active=STEPS, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=finish) as running:
        yield running.step
