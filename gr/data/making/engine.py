"""Engine: where preparing is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """Where the work is done: ``process`` or ``ray``.  ``address``: of the cluster (auto, HOST:PORT), None starts one
    on this machine; ``tasks``: at most so many at a time, as many as cores and memory allow without."""

    name: str = "process"
    address: str | None = None
    tasks: int | None = None


IN_PROCESS = Engine()
