"""What a rank is doing, and what follows from what all of them do: who is late, who holds up the others.

A rank's stack says where it is without a mark in the code: whether it waits for others (in an exchange), in which, and
from which function of gr.  The number of exchanges that it has begun tells who hasn't come yet: ranks that wait in the
n-th have begun n, a late one fewer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from types import FrameType

import gr

PACKAGE = os.path.dirname(gr.__file__) + os.sep
EXCHANGES = re.compile(
    r"/torch/distributed/(distributed_c10d|utils)\.py$|/torch/nn/parallel/distributed\.py$"
    r"|/torchrec/distributed/(dist_data|comm_ops|types)\.py$"
)
"""Files whose functions end when others have come too."""
DEPTH = 6  # frames between such a function and what it called, hooks and wrappers
PASSED_OVER = "processes.py"  # all of gr exchanges through it
SLOW = 2.0  # times the work of the rank in the middle
WORKING = 0.3  # of the time, at least: who does little holds up nobody


@dataclass(frozen=True)
class Standing:
    """phase: in words.  step: the last one begun.  place: the innermost function of gr, and the exchange if it
    ``waits`` in one.  exchanges: how many it has begun.  worked, stood: seconds so far outside of exchanges, and those
    of them in which the whole process stood still.  beat: how often it has told."""

    phase: str = "starting"
    step: int = 0
    place: str = ""
    waits: bool = False
    exchanges: int = 0
    worked: float = 0.0
    stood: float = 0.0
    beat: int = 0

    def __str__(self) -> str:
        step = f" of step {self.step}" if self.phase == "training" else f" after step {self.step}"
        return f"{self.phase}{step if self.step else ''}{f', in {self.place}' if self.place else ''}"

    def told(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(told: str | bytes) -> Standing:
        return Standing(**json.loads(told))


def where(frame: FrameType | None) -> tuple[str, bool]:
    """(place, waits) of a stack."""
    exchange, inner = "", ""
    for depth, at in enumerate(_outwards(frame)):
        file = at.f_code.co_filename
        if depth < DEPTH and EXCHANGES.search(file):
            exchange = at.f_code.co_name  # the outermost of them is the one that was called
        elif file.startswith(PACKAGE) and (name := file.removeprefix(PACKAGE)) != PASSED_OVER:
            inner = f"{at.f_code.co_name} ({name}:{at.f_lineno})"
            break
    return " of ".join(filter(None, (exchange, inner))), bool(exchange)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def late(standings: Mapping[int, Standing], silent: Mapping[int, float]) -> list[int]:
    """The ranks for which the others wait; none where all wait alike, and what is late is the network's.

    silent: rank -> seconds since it last told of itself, of those that should have."""
    if silent:
        return sorted(silent)
    if working := sorted(rank for rank, standing in standings.items() if not standing.waits):
        return working if len(working) < len(standings) else []
    most = max((standing.exchanges for standing in standings.values()), default=0)
    return sorted(rank for rank, standing in standings.items() if standing.exchanges < most)


def told(standings: Mapping[int, Standing], silent: Mapping[int, float], hosts: Sequence[str]) -> str:
    """Who is late and what it does, and where the others are: one clause."""
    behind = late(standings, silent)
    waiting = sorted(set(standings) - set(behind))
    others = _spread(standings, waiting)
    if not behind:
        known = len(standings) == len(hosts)
        return f"{'all ranks are there and wait for the network' if known else 'others have not told yet'}: {others}"
    rank = behind[0]
    doing = f"{standings[rank]}" if rank in standings else "unknown"
    more = f" (and {len(behind) - 1} more)" if len(behind) > 1 else ""
    said = f"late is rank {rank} on {hosts[rank]}{more}: {doing}"
    if rank in silent:
        said = (
            f"nothing is heard of rank {rank} on {hosts[rank]}{more} since {silent[rank]:.0f} s (its process stands "
            f"still, or its host can't be reached), last {doing}"
        )
    return f"{said}; {others}" if waiting else said


def _spread(standings: Mapping[int, Standing], ranks: Sequence[int]) -> str:
    """Where ``ranks`` are, those at one place together."""
    places: dict[str, list[int]] = {}
    for rank in ranks:
        places.setdefault(str(standings[rank]), []).append(rank)
    shown = [
        f"rank {', '.join(map(str, of[:4]))}{f' and {len(of) - 4} more' if len(of) > 4 else ''}: {place}"
        for place, of in sorted(places.items(), key=lambda entry: -len(entry[1]))
    ]
    return "; ".join(shown[:3] + [f"others at {len(shown) - 3} more places"] * (len(shown) > 3))


def slow(
    before: Mapping[int, Standing], after: Mapping[int, Standing], seconds: float
) -> tuple[int, float] | None:
    """The rank that worked longest between two looks so many seconds apart, and how many times as long as the one in
    the middle; None where they are level."""
    worked = {rank: after[rank].worked - before[rank].worked for rank in after.keys() & before.keys()}
    if len(worked) < 2:
        return None
    rank = max(worked, key=lambda rank: worked[rank])
    times = worked[rank] / max(median_low(worked.values()), 0.01 * seconds)
    return (rank, times) if times >= SLOW and worked[rank] >= WORKING * seconds else None
