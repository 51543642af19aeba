"""What the launcher says of this process: torchrun, or another one that sets the same variables."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

from gr.errors import UserError

_TOGETHER = ("RANK", "WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_SIGNAL_OF_PARENTS_DEATH = 1  # prctl's PR_SET_PDEATHSIG
_REMEDY = "start with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset them all"


class Launched(NamedTuple):
    """This process's number among ``ranks``, and among the ``local_ranks`` of its machine."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1


class Attempt(NamedTuple):
    """The ``job`` by its scheduler's name (GR_JOB), or else torchrun's (its --rdzv-id, a random one with --standalone),
    and how often torchrun, or the scheduler that starts it (GR_RESTART), has started it again."""

    job: str | None = None
    number: int = 0


def attempt(environment: Mapping[str, str] | None = None) -> Attempt:
    """Of which job this process is a part, by torchrun's variables.

    (On several machines a process may be told a smaller number than others: agents count for themselves.)"""
    given = os.environ if environment is None else environment
    counts = (name for name in ("TORCHELASTIC_RESTART_COUNT", "GR_RESTART") if name in given)
    job = given.get("TORCHELASTIC_RUN_ID")
    if job is not None:
        job = given.get("GR_JOB", job)
    return Attempt(job, sum(_count(given, name) for name in counts))


def host() -> str:
    """What people know this machine by: its name, and the address under which the other processes reach it."""
    name, meeting = socket.gethostname(), os.environ.get("MASTER_ADDR")
    try:
        found = socket.getaddrinfo(meeting, 9, type=socket.SOCK_DGRAM) if meeting else []
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as probe:  # of no consequence: nothing is sent
                probe.connect(place)
                address = probe.getsockname()[0]
            return name if address in ("127.0.0.1", "::1") else f"{name} ({address})"
    except OSError:
        pass
    return name


def end_with_agent() -> None:
    """Be told like by a scheduler (SIGTERM: save and leave) when torchrun's agent dies, on Linux.

    Its processes live on otherwise, hold devices and ports, and write into a run that somebody else may go on with."""
    if attempt().job is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM)


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """This process among those started together; the only one where no variable speaks of others.

    environment: os.environ without it.  Raises UserError where the variables contradict each other or leave out
    where the processes meet: torch would raise from its depths, or wait for them.
    """
    given = os.environ if environment is None else environment
    missing = [name for name in _TOGETHER if name not in given]
    if len(missing) == len(_TOGETHER):
        return Launched()
    if missing:
        (there,) = set(_TOGETHER) - set(missing)
        raise UserError(f"{there} is set ({given[there]}) and {missing[0]} isn't: {_REMEDY}")
    rank, ranks = (_count(given, name) for name in _TOGETHER)
    if not rank < ranks:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {ranks}, ranks count from 0: {_REMEDY}")
    if ranks > 1 and (unknown := [name for name in _MEETING if not given.get(name)]):
        raise UserError(
            f"RANK ({rank}) and WORLD_SIZE ({ranks}) are set and {' and '.join(unknown)} "
            f"{'is' if len(unknown) == 1 else 'are'} not: {_REMEDY}"
        )
    local_rank = _count(given, "LOCAL_RANK") if "LOCAL_RANK" in given else 0
    local_ranks = _count(given, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in given else 1
    return Launched(rank, ranks, local_rank, max(local_ranks, 1))


def _count(given: Mapping[str, str], name: str) -> int:
    if not given[name].strip().isdecimal():
        raise UserError(f"{name} is '{given[name]}', not a whole number: {_REMEDY}")
    return int(given[name])
