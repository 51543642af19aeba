"""Every kind of exchange between the processes, tried with known numbers and timed: what a cluster can do before a run
counts on it.

Shapes: W processes, n numbers a process.  Bandwidth is that of the links, as NCCL's tests count it: what a process
sends of a message, over the time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from gr.errors import UserError
from gr.processes import Processes

REPEATS = 5
CLOCK_TRIES = 8
SIZES = {"cpu": (1 << 10, 1 << 17, 1 << 22), "cuda": (1 << 12, 1 << 20, 1 << 26)}
"""Bytes a process."""


@dataclass(frozen=True)
class Timed:
    """seconds: of the slowest process, the median of some tries.  gb_per_s: 10^9 bytes; None where there are none."""

    kind: str
    device: str
    bytes: int
    seconds: float
    gb_per_s: float | None


def timed_exchanges(processes: Processes) -> list[Timed]:
    """All kinds, on the devices that a run exchanges on.  UserError, on all: one brought wrong numbers."""
    found = []
    for device in dict.fromkeys(("cpu", processes.device.type)):
        for kind, (exchange, check, share) in KINDS.items():
            for size in SIZES[device] if kind != "barrier" else (0,):
                n = max(size // 4 // processes.world.size, 1) * processes.world.size
                tensor = torch.full(
                    (n,),
                    float(processes.world.rank + 1),
                    device=processes.device if device != "cpu" else "cpu",
                )
                seconds = _tried(processes, kind, exchange, check, tensor)
                moved = share(processes.world.size) * n * 4
                found.append(
                    Timed(
                        kind, device, n * 4 if size else 0, seconds, moved / seconds / 1e9 if size else None
                    )
                )
    return found


def _tried(
    processes: Processes,
    kind: str,
    exchange: Callable[[Tensor, int], Tensor],
    check: Callable[[Tensor, int, int], bool],
    tensor: Tensor,
) -> float:
    world = processes.world
    took = []
    for _ in range(REPEATS + 1):  # the first one connects
        given = tensor.clone()
        dist.barrier()
        started = time.perf_counter()
        out = exchange(given, world.size)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        took.append(time.perf_counter() - started)
    wrong = [
        rank
        for rank, right in enumerate(processes.everybodys(check(out, world.rank, world.size)))
        if not right
    ]
    if wrong:
        raise UserError(
            f"{kind} on {tensor.device.type} brought wrong numbers to rank {', '.join(map(str, wrong))}: look at the "
            "network's driver and at the backend's versions, nothing can be trained so",
            everywhere=True,
        )
    (slowest,) = world.maximum_of(torch.tensor([median(took[1:])], dtype=torch.float64)).tolist()
    return slowest


def _all_reduce(x: Tensor, size: int) -> Tensor:
    dist.all_reduce(x)
    return x


def _all_gather(x: Tensor, size: int) -> Tensor:
    out = [torch.empty_like(x[: len(x) // size]) for _ in range(size)]
    dist.all_gather(out, x[: len(x) // size].contiguous())
    return torch.cat(out)


def _reduce_scatter(x: Tensor, size: int) -> Tensor:
    out = torch.empty_like(x[: len(x) // size])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it
        dist.reduce_scatter_tensor(out, x)
    return out


def _all_to_all(x: Tensor, size: int) -> Tensor:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def _broadcast(x: Tensor, size: int) -> Tensor:
    dist.broadcast(x, 0)
    return x


def _barrier(x: Tensor, size: int) -> Tensor:
    dist.barrier()
    return x


def _sum_of_all(x: Tensor, rank: int, size: int) -> bool:
    return bool((x == size * (size + 1) / 2).all())


def _one_of_each(x: Tensor, rank: int, size: int) -> bool:
    wanted = torch.arange(1, size + 1, device=x.device, dtype=x.dtype).repeat_interleave(len(x) // size)
    return bool((x == wanted).all())


# name -> (exchange, whether what came is right, bytes through a link for each byte of the message, by W)
KINDS: dict[
    str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int, int], bool], Callable[[int], float]]
] = {
    "all-reduce": (_all_reduce, _sum_of_all, lambda w: 2 * (w - 1) / w),
    "all-gather": (_all_gather, _one_of_each, lambda w: (w - 1) / w),
    "reduce-scatter": (_reduce_scatter, _sum_of_all, lambda w: (w - 1) / w),
    "all-to-all": (_all_to_all, _one_of_each, lambda w: (w - 1) / w),
    "broadcast": (_broadcast, lambda x, rank, size: bool((x == 1).all()), lambda w: 1.0),
    "barrier": (_barrier, lambda x, rank, size: True, lambda w: 0.0),
}


def clock_offsets(processes: Processes) -> list[float]:
    """Seconds by which each rank's clock is ahead of the first one's: half the shortest way there and back is how much
    they may be wrong."""
    world = processes.world
    offset = 0.0
    for rank in range(1, world.size):
        if world.rank not in (0, rank):
            continue
        best = float("inf")
        box = torch.zeros(1, dtype=torch.float64)
        for _ in range(CLOCK_TRIES):
            if world.rank == 0:
                dist.recv(box, rank)
                box[0] = time.time()
                dist.send(box, rank)
            else:
                sent = time.time()
                dist.send(box, 0)
                dist.recv(box, 0)
                back = time.time()
                if back - sent < best:
                    best, offset = back - sent, (sent + back) / 2 - float(box[0])
    return processes.everybodys(offset)
