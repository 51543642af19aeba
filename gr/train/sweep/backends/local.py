"""Members as processes of this machine."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gr.train import cells
from gr.train.sweep.backends.base import Backend, Resources


class Local(Backend):
    shares_cores = True

    def __init__(self) -> None:
        self._stopped = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def run(self, name: str, command: Sequence[str], log: Path) -> int:
        return cells.exit_status(command, log, self._begun)

    def _begun(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._processes.append(process)
        if self._stopped:  # asked for while it was being started
            process.terminate()

    def stop(self) -> None:
        self._stopped = True
        for process in list(self._processes):
            with suppress(ProcessLookupError):
                process.terminate()


@contextmanager
def opened(resources: Resources) -> Iterator[Backend]:
    yield Local()
