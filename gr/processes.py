"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gr.errors import UserError

TIMEOUT = timedelta(minutes=10)
T = TypeVar("T")
_LOST = re.compile("connection (closed|reset) by peer|broken pipe", re.IGNORECASE)  # gloo's words


@dataclass(frozen=True)
class Parallel:
    """This process among all of the run's."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def sum(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list:
        """Element-wise sums over all ranks, exchanged on the CPU group."""
        if self.ranks == 1:
            return list(values)
        total = torch.tensor(values, dtype=dtype)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, rows_S: Tensor) -> Tensor:
        """All ranks' 1-D int64 rows, rank after rank, on this rank's device."""
        if self.ranks == 1:
            return rows_S
        own = [len(rows_S) if rank == self.rank else 0 for rank in range(self.ranks)]
        counts = self.sum(own, dtype=torch.int64)
        # to one length, and without a look at the rows: a device isn't waited for
        padded_S = F.pad(rows_S, (0, max(counts) - len(rows_S)))
        parts = [torch.empty_like(padded_S) for _ in counts]
        dist.all_gather(parts, padded_S)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, value: object) -> object:
        """Rank 0's ``value`` on every rank."""
        if self.ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def together(self, action: Callable[[], T]) -> T:
        """``action()`` on every rank; where one refuses (UserError) all do, and none goes on alone."""
        if self.ranks == 1:
            return action()
        result, refusal = None, None
        try:
            result = action()
        except UserError as error:
            refusal = str(error)
        refusals: list[str | None] = [None] * self.ranks
        dist.all_gather_object(refusals, refusal)
        refused = [rank for rank, text in enumerate(refusals) if text is not None]
        if refused:
            some = len(refused) < self.ranks and refused != [0]
            where = f"on rank {', '.join(map(str, refused))}: " if some else ""
            raise UserError(f"{where}{refusals[refused[0]]}", everywhere=True)
        return result  # type: ignore[return-value]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward also averages gradients over ranks."""
        if self.ranks == 1:
            return model
        # Looking for unused parameters keeps DDP from rebuilding its buckets after the first step: with other
        # buckets a ring of three or more ranks adds in another order, and a resumed run would lose its bits.
        # (Two ranks add a and b either way.)
        return DistributedDataParallel(
            model, find_unused_parameters=self.ranks > 2, gradient_as_bucket_view=True
        )

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around each micro-batch: gradients are exchanged with the last one alone."""
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()


@contextlib.contextmanager
def processes(device: str = "auto", threads: int | None = None) -> Iterator[Parallel]:
    """Join the processes that torchrun started (or be the only one), with this one's device and threads."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(cores // local_ranks, 1))
    chosen = _device(device, local_rank)
    started = ranks > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Parallel(rank, ranks, chosen)
    except RuntimeError as error:
        if not started or not _LOST.search(str(error)):
            raise
        raise UserError(
            f"rank {rank} lost the other processes: one of them ended and said why; then go on with --resume"
        ) from error
    finally:
        if started:
            dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device is cuda, and torch sees no GPU: use train.device=cpu, or ask python -m gr doctor"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own (this machine has {torch.cuda.device_count()}): "
            "lower --nproc-per-node, or use train.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
