"""Members as jobs of Slurm: submitted by sbatch, watched by squeue, stopped by scancel.

A job writes its command's exit status into a file beside its log, for what Slurm knows of a job that has ended depends
on its accounting.  The job's number is kept there as well: a sweep that is started again waits for the jobs of the one
before, rather than train beside them.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gr.errors import UserError
from gr.train.sweep.backends.base import LOST, Backend, Resources, settle

POLL_SECONDS = 5.0
GRACE_SECONDS = 15.0
"""For a file that another machine has written to be seen here."""

SCRIPT = """#!/bin/sh
# a request to stop is for the training; this waits, and tells how it ended
trap : TERM
{command}
echo $? > {status}
"""


class Slurm(Backend):
    def __init__(self, resources: Resources) -> None:
        self.words = [f"--cpus-per-task={resources.cpus}"]
        if resources.gpus:
            self.words.append(f"--gpus-per-node={resources.gpus}")
        self.words += resources.sbatch
        self._stopped = False
        self._jobs: set[str] = set()
        self._lock = threading.Lock()
        self._asked, self._queued = float("-inf"), frozenset[str]()

    def run(self, name: str, command: Sequence[str], log: Path) -> int:
        status, number = log.with_suffix(".status"), log.with_suffix(".job")
        job = number.read_text().strip() if number.is_file() else ""
        if not job or not self._is_queued(job):
            status.unlink(missing_ok=True)
            job = self._submitted(name, command, log, status)
            number.write_text(f"{job}\n")
        with self._lock:
            self._jobs.add(job)
        if self._stopped:
            self.stop()
        while self._is_queued(job):
            time.sleep(POLL_SECONDS)
        with self._lock:
            self._jobs.discard(job)
        number.unlink(missing_ok=True)
        return _told(status)

    def _submitted(self, name: str, command: Sequence[str], log: Path, status: Path) -> str:
        script = SCRIPT.format(command=shlex.join(command), status=shlex.quote(str(status.resolve())))
        where = [f"--job-name={name}", f"--output={log.resolve()}", "--open-mode=append"]
        done = subprocess.run(
            ["sbatch", "--parsable", *where, *self.words], input=script, capture_output=True, text=True
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise UserError(f"sbatch refuses '{name}': {said[-1].removeprefix('sbatch: ')}")
        return done.stdout.strip().partition(";")[0]

    def _is_queued(self, job: str) -> bool:
        """Whether it waits or runs, as far as is known: a controller that doesn't answer has lost no job."""
        with self._lock:
            if time.monotonic() - self._asked >= POLL_SECONDS or job not in self._queued:
                done = subprocess.run(["squeue", "-h", "--me", "-o", "%i"], capture_output=True, text=True)
                if done.returncode:
                    return True
                self._asked, self._queued = time.monotonic(), frozenset(done.stdout.split())
            return job in self._queued

    def stop(self) -> None:
        self._stopped = True
        with self._lock:
            jobs = sorted(self._jobs)
        if jobs:
            subprocess.run(["scancel", "--state=PENDING", *jobs], capture_output=True)
            subprocess.run(["scancel", "--full", "--signal=TERM", *jobs], capture_output=True)


def _told(status: Path) -> int:
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        with suppress(OSError, ValueError):
            return settle(int(status.read_text()))
        if time.monotonic() > deadline:
            return LOST
        time.sleep(0.5)


@contextmanager
def opened(resources: Resources) -> Iterator[Backend]:
    for program in ("sbatch", "squeue", "scancel"):
        if shutil.which(program) is None:
            raise UserError(
                f"--backend slurm submits its members by Slurm's own programs, and there is no {program} here: start "
                "the sweep where jobs are submitted, or use --backend local"
            )
    yield Slurm(resources)
