"""What a backend is, and the table of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

LOST = -9
"""The exit status of a command that has ended without leaving one: its node failed, its time was up."""


@dataclass(frozen=True)
class Resources:
    """cpus, gpus: of a member, where a backend hands them out.  sbatch: further words for Slurm's sbatch.  ray: the
    address of a Ray cluster that runs; without one, a cluster of this machine is started."""

    cpus: int = 1
    gpus: int = 0
    sbatch: tuple[str, ...] = ()
    ray: str | None = None


class Backend(ABC):
    """Every method may be called from several threads.  The folders of a sweep must be seen from wherever commands
    run, and the interpreter and gr be there under the same paths."""

    shares_cores = False
    """Whether members share this machine's cores, so that each has to be told its part."""

    @abstractmethod
    def run(self, name: str, command: Sequence[str], log: Path) -> int:
        """The exit status of ``command``, less than 0 where a signal ended it; what it prints goes behind what is in
        ``log``."""

    @abstractmethod
    def stop(self) -> None:
        """Ask all that run to save and leave, and begin nothing that waits."""


BACKENDS = {
    "local": "gr.train.sweep.backends.local",
    "slurm": "gr.train.sweep.backends.slurm",
    "ray": "gr.train.sweep.backends.ray_tasks",
}
"""Modules with a function ``opened(resources)``, a context that gives the backend."""


@contextmanager
def opened(name: str, resources: Resources) -> Iterator[Backend]:
    """The backend ``name``.  Raises UserError where it can't be had."""
    with import_module(BACKENDS[name]).opened(resources) as backend:
        yield backend


def settle(process_status: int) -> int:
    """A shell's status of a command as a Python parent would see it: 128 + n is signal n."""
    return 128 - process_status if process_status > 128 else process_status
