"""torch profiler trace of a few steps, for --profile."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import profiler

from gr.train.folder import RunFolder

WAIT, WARM_UP, STEPS = 3, 2, 6


@contextmanager
def trace() -> Iterator[Callable[[RunFolder], None]]:
    """Yields what to call with the run's folder after each step; this process's steps 6 to 11 go into the folder's
    trace.json, of other ranks into rank1-trace.json and so on (Chrome and Perfetto read it)."""
    rank = int(os.environ.get("RANK", 0))
    name = "trace.json" if rank == 0 else f"rank{rank}-trace.json"
    folders: list[RunFolder] = []
    written = []

    def finish(done: profiler.profile) -> None:
        path = folders[-1].here / name
        done.export_chrome_trace(str(path))
        written.append(path)
        if rank == 0:
            print(done.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
            print(f"trace: {path} (open it in Perfetto or chrome://tracing)", flush=True)

    schedule = profiler.schedule(wait=WAIT, warmup=WARM_UP, active=STEPS, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=finish) as running:

        def after_step(folder: RunFolder) -> None:
            folders[:] = [folder]
            running.step()

        yield after_step
    if not written:
        print(f"no trace: the run took no more than {WAIT + WARM_UP} steps", file=sys.stderr, flush=True)
