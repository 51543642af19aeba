"""Groups of processes for tests: made by hand, as a program of one's own does it, or by a launcher's variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from gr.launcher import launched

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def in_group(
    work: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, by_hand: bool = True
) -> list[Any]:
    """What ``work(*arguments)``, a function of a module, returns on each of ``ranks`` new processes, by rank.

    by_hand: torch.distributed is initialised, with a file to meet at, and no variable says anything; else the
    variables of a launcher are set and the rest is left to gr.  Results are tensors and plain values.
    """
    folder.mkdir(parents=True)
    port = None if by_hand else free_port()
    preload()
    multiprocessing.start_processes(
        _process, (work, ranks, str(folder), port, arguments), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def preload() -> None:
    """Processes are forked from one that has imported what they need, which takes longer than most tests."""
    multiprocessing.set_forkserver_preload(["tests.distributed.preloaded"])


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher on one machine tells a process."""
    values = (rank, ranks, rank, ranks, "127.0.0.1", port)
    return dict(zip(VARIABLES, map(str, values), strict=True))


def _process(
    rank: int, work: Callable[..., Any], ranks: int, folder: str, port: int | None, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    for name in VARIABLES:
        os.environ.pop(name, None)
    if port is not None:
        os.environ.update(variables(rank, ranks, port))
        result = work(*arguments)
    else:
        assert launched().ranks == 1
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
        result = work(*arguments)
        assert dist.is_initialized(), "a group that was made here is not gr's to end"
        dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
