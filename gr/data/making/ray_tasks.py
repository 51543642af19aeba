"""Tasks of a preparation on a Ray cluster.

A task leaves a folder, made visible by one rename, in a scratch folder that all hosts of the cluster see.  A folder
that is there is done: that is how a preparation that was killed goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

import gr
from gr.data.making.executor import is_no_space, no_space
from gr.errors import UserError, first_line

PLAN = "plan.json"
"""Of the scratch folder: what its content goes by."""
RETRIES = 3
AHEAD = 2
"""Tasks in flight for each core: one works while the other waits for its turn."""
GO_ON = "the same command goes on from here"

Result = tuple[dict[str, Any], dict[str, np.ndarray]]
"""Of a task: values for JSON, and arrays."""


class Unfinished(UserError):
    """What is done stays, and the same command goes on from there."""


class Step(Protocol):
    """What the tasks of a stage do.  It is sent to the workers once."""

    def __call__(self, aside: Path, number: int, given: Any) -> Result:
        """The task ``number`` leaves what is large in the folder ``aside`` and returns what is small."""

    def out_of_memory(self, number: int) -> UserError:
        """What to say when a task had no memory."""


@dataclass(frozen=True)
class Refusal:
    """An error of a task, as a value: what Ray raises loses its class.  ``lasting``: doing it again is of no use."""

    text: str
    lasting: bool


@dataclass(frozen=True)
class Scratch:
    """The folder of all tasks, as they are told of it."""

    folder: str
    out: str
    key: str
    version: str

    def check(self) -> None:
        """Refuse a worker that isn't of this preparation's kind."""
        host = socket.gethostname()
        if self.version != gr.__version__:
            raise UserError(
                f"host '{host}' of the cluster has gr {gr.__version__}, and this is {self.version}: install the same "
                "version on all hosts"
            )
        try:
            key = json.loads((Path(self.folder) / PLAN).read_text())["key"]
        except (OSError, ValueError):
            key = None
        if key != self.key:
            raise UserError(
                f"'{self.folder}' is not there on host '{host}' of the cluster: set scratch to a folder that all hosts "
                "share"
            )


def perform(scratch: Scratch, step: Step, stage: str, number: int, given: Any) -> Result | Refusal:
    """Do a task of a stage, in a worker, unless it is done: its result."""
    pa.set_cpu_count(1)  # Ray counts a task as one core
    try:
        scratch.check()
        done = task_folder(Path(scratch.folder) / stage, number)
        if done.exists():
            return _load(done)
        aside = done.with_name(f".{done.name}-{uuid.uuid4().hex}")
        aside.mkdir()
        try:
            result = step(aside, number, given)
            _save(aside, result)
            _publish(aside, done)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return result
    except UserError as error:
        return Refusal(str(error), lasting=True)
    except OSError as error:
        if is_no_space(error):
            return Refusal(f"{no_space(scratch.out)}; {GO_ON}", lasting=False)
        if error.filename is None:
            raise
        what = f"{error.strerror}: '{error.filename}' on host '{socket.gethostname()}' of the cluster"
        return Refusal(f"{what}; {GO_ON}", lasting=False)
    except MemoryError:
        pass  # the frames that hold the memory must go before the sentence can be made
    return Refusal(f"{step.out_of_memory(number)}; {GO_ON}", lasting=False)


def task_folder(stage: Path, number: int) -> Path:
    return stage / f"{number:06d}"


def _save(folder: Path, result: Result) -> None:
    plain, arrays = result
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (folder / "result.json").write_text(json.dumps(plain))


def _load(folder: Path) -> Result:
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        return json.loads((folder / "result.json").read_text()), dict(arrays)


def _publish(aside: Path, done: Path) -> None:
    try:
        os.rename(aside, done)
    except OSError:  # a worker that was thought lost has done the same
        if not done.exists():
            raise
        shutil.rmtree(aside, ignore_errors=True)


class Tasks:
    """Runs the stages' tasks on the cluster."""

    def __init__(self, ray: Any, scratch: Scratch, most: int | None):
        self.ray, self.scratch = ray, scratch
        cores = int(ray.cluster_resources().get("CPU", 1))
        self.ahead = most or AHEAD * max(cores, 1)
        hosts = [n["Resources"].get("memory", 0) for n in ray.nodes() if n["Alive"]]
        self.largest = max(hosts, default=0)
        self._flying: deque[tuple[int, Any]] = deque()

    def done(self, stage: str) -> set[int]:
        """Numbers of a stage's tasks that are done."""
        folder = Path(self.scratch.folder) / stage
        if not folder.exists():
            return set()
        return {int(name) for name in os.listdir(folder) if name.isdigit()}

    def run(
        self, stage: str, step: Step, given: Iterable[tuple[int, Any]], memory: int
    ) -> Iterator[tuple[int, Result]]:
        """The results of a task for each of ``given`` (number, what it needs), with their numbers, in this order.
        ``memory``: bytes that one needs; a host does no more at a time than it has cores and memory for."""
        if memory > self.largest:
            raise UserError(
                f"a task takes about {memory >> 20:,} MiB of memory, and no host of the cluster has more than "
                f"{int(self.largest) >> 20:,} to give: set memory_mb or chunk_rows to less"
            )
        folder = Path(self.scratch.folder) / stage
        folder.mkdir(exist_ok=True)
        done = self.done(stage)
        task = self.ray.remote(num_cpus=1, max_retries=RETRIES, memory=memory)(perform)
        shared = self.ray.put(step)
        for number, one in given:
            reference = None
            if number not in done:
                reference = task.remote(self.scratch, shared, stage, number, one)
            self._flying.append((number, reference))
            if len(self._flying) >= self.ahead:
                yield self._take(folder)
        while self._flying:
            yield self._take(folder)

    def _take(self, folder: Path) -> tuple[int, Result]:
        number, reference = self._flying[0]
        result = _load(task_folder(folder, number)) if reference is None else self._get(reference)
        self._flying.popleft()
        if isinstance(result, Refusal):
            raise (UserError if result.lasting else Unfinished)(result.text)
        return number, result

    def _get(self, reference: Any) -> Result | Refusal:
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.RayTaskError as error:
            if not isinstance(error.cause, ImportError):
                raise
            raise Unfinished(
                f"a worker of the cluster lacks a package ({first_line(error.cause)}): install gr and what it needs on "
                "all hosts, or set PYTHONPATH before ray start"
            ) from None
        except errors.OutOfMemoryError:
            raise Unfinished(
                "a host of the cluster ran out of memory and Ray ended the task: give less at a time (--tasks), or set "
                f"memory_mb or chunk_rows to less; {GO_ON}"
            ) from None
        except errors.RayError as error:
            raise Unfinished(
                f"the cluster lost a task ({type(error).__name__}: {first_line(error)}): see to its hosts; {GO_ON}"
            ) from None

    def stop(self) -> None:
        """End the tasks that nobody waits for: nothing may write to a folder that is removed."""
        references = [reference for _, reference in self._flying if reference is not None]
        self._flying.clear()
        with contextlib.suppress(Exception):  # a cluster that is gone has no tasks
            for reference in references:
                self.ray.cancel(reference, force=True)
            self.ray.wait(references, num_returns=len(references), timeout=10)
