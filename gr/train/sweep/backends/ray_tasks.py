"""Members as tasks of a Ray cluster: each starts its training as a process of the node it is given.

A request to stop is a file that the tasks look for, since Ray has no way to ask a task to save and leave.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gr.data.cluster import joined
from gr.train.sweep.backends.base import LOST, Backend, Resources

POLL_SECONDS = 0.5
KEPT = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH", "HOME")
"""Variables that a training has as the sweep has them, on whatever node."""


class RayTasks(Backend):
    def __init__(self, ray: Any, resources: Resources) -> None:
        self.ray = ray
        self.task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_trained)
        self._flags: set[Path] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, name: str, command: Sequence[str], log: Path) -> int:
        flag = log.resolve().with_suffix(".stop")
        flag.unlink(missing_ok=True)
        with self._lock:
            self._flags.add(flag)
        if self._stopped:
            flag.touch()
        kept = {key: os.environ[key] for key in KEPT if key in os.environ}
        try:
            return self.ray.get(
                self.task.remote(list(command), str(log.resolve()), str(flag), os.getcwd(), kept)
            )
        except self.ray.exceptions.RayError:  # its node or its worker is gone
            return LOST
        finally:
            with self._lock:
                self._flags.discard(flag)
            flag.unlink(missing_ok=True)

    def stop(self) -> None:
        self._stopped = True
        with self._lock:
            for flag in self._flags:
                flag.touch()


def _trained(command: list[str], log: str, flag: str, folder: str, variables: dict[str, str]) -> int:
    """The exit status of the command, on the node that this runs on."""
    if os.path.exists(flag):
        return -signal.SIGTERM
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env={**os.environ, **variables}
        )
    asked = False
    try:
        while (status := process.poll()) is None:
            if not asked and os.path.exists(flag):
                asked = True
                process.terminate()
            time.sleep(POLL_SECONDS)
    except BaseException:  # the sweep's own process is gone, and with it whoever wants the result
        process.terminate()
        raise
    return -signal.SIGTERM if asked else status


@contextmanager
def opened(resources: Resources) -> Iterator[Backend]:
    with joined(resources.ray) as ray:
        yield RayTasks(ray, resources)
