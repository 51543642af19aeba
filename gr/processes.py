"""The processes of a run and their axes: one process, or as many as torchrun (or another launcher) started.

Processes stand on a mesh with two named axes: along ``data`` each has other samples, along ``context`` each has
another part of the same sequences.  Code asks for the axis that it means, never for a bare rank; ``world`` is all of
them, for what is done once a run.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import os
import re
import resource
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from gr.errors import UserError
from gr.launcher import Launched, host, launched

TIMEOUT = timedelta(minutes=10)
T = TypeVar("T")
_GROUPS = itertools.count()  # a process may join more than once, one run after another
_LOST = re.compile("connection (closed|reset) by peer|broken pipe", re.IGNORECASE)  # gloo's words


@dataclass(frozen=True)
class Axis:
    """This process's place among the ``size`` processes that differ along one axis."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def bounds(self, rows: int) -> list[int]:
        """Where ``rows`` are dealt out evenly, rank r has those from ``bounds[r]`` to ``bounds[r + 1]`` (exclusive)."""
        return [rank * rows // self.size for rank in range(self.size + 1)]

    def own(self, rows: int) -> range:
        """This process's stretch of them."""
        return range(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def sum(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list:
        """Element-wise sums over the axis, exchanged between hosts."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=dtype)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def maximum(self, values: Sequence[int]) -> list[int]:
        """Element-wise maxima over the axis, exchanged between hosts."""
        return self.maximum_of(torch.tensor(values)).tolist() if self.size > 1 else list(values)

    def maximum_of(self, tensor: Tensor) -> Tensor:
        """``tensor``'s maxima over the axis, in place, NaN where anybody has NaN."""
        if self.size > 1:
            broken = tensor.isnan().to(torch.uint8) if tensor.is_floating_point() else None
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
            if broken is not None:  # a maximum may lose a NaN
                dist.all_reduce(broken, dist.ReduceOp.MAX, group=self.group)
                tensor.masked_fill_(broken.bool(), torch.nan)
        return tensor

    def add_up(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over the axis, in place, on its own device."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' ``rows`` (n, ...), n as each has them, rank after rank, on this one's device."""
        if self.size == 1:
            return rows
        own = [len(rows) if rank == self.rank else 0 for rank in range(self.size)]
        counts = self.sum(own, dtype=torch.int64)
        # to one length, and without a look at the rows: a device isn't waited for
        padded = F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def exchange(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Send ``counts[r]`` of the leading rows of ``rows`` (n, ...) to each rank r, in order; what came, rank after
        rank, and how many of each."""
        if self.size == 1:
            return rows, list(counts)
        sent = torch.tensor(counts, dtype=torch.int64)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        arriving = received.tolist()
        out = rows.new_empty(sum(arriving), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), arriving, list(counts), group=self.group)
        return out, arriving

    def swap(self, sent: Tensor, to: int, received: Tensor, source: int) -> Callable[[], None]:
        """Begin to send contiguous rows to process ``to``, and to receive others from ``source``; what waits for both.
        Both sides know how many there are, and nothing is sent where there are none."""
        operations = []
        if sent.numel():
            operations.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=to))
        if received.numel():
            operations.append(dist.P2POp(dist.irecv, received, group=self.group, group_peer=source))
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()
            operations.clear()  # which kept the rows until now

        return wait


@dataclass(frozen=True)
class Processes:
    """This process among all of the run's.  ``local``: its place on its machine.  ``timeout``: of an exchange, which
    then raises on who waited."""

    device: torch.device
    world: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    context: Axis = field(default_factory=Axis)
    local: Axis = field(default_factory=Axis)
    timeout: timedelta = TIMEOUT

    @property
    def is_main(self) -> bool:
        return self.world.rank == 0

    @contextlib.contextmanager
    def apart(self) -> Iterator[Processes]:
        """The same processes with a group of their own, on which a thread of each exchanges what it has to while the
        others go on as they were.  All processes make it together, and all end it."""
        if self.world.size == 1:
            yield self
            return
        group = dist.new_group(backend="gloo", timeout=self.timeout)
        _end_threads_at_exit()
        try:
            yield replace(self, world=replace(self.world, group=group))
        finally:
            dist.destroy_process_group(group)

    def of_whole_sequences(self) -> Processes:
        """The same processes where nobody shares a sequence: each has its own along the data axis."""
        return replace(self, data=self.world, context=Axis())

    def barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier(self.world.group)

    def broadcast(self, value: T) -> T:
        """The main process's ``value`` on every process."""
        if self.world.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.world.group)
        return box[0]

    def everybodys(self, value: T) -> list[T]:
        """The ``value`` of every process, by rank."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self.world.group)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """``action()`` on every process; where one refuses (UserError) all do, and none goes on alone."""
        if self.world.size == 1:
            return action()
        result, refusal = None, None
        try:
            result = action()
        except UserError as error:
            refusal = str(error)
        refusals = self.everybodys(refusal)
        refused = [rank for rank, text in enumerate(refusals) if text is not None]
        if refused:
            some = len(refused) < self.world.size and refused != [0]
            where = f"on rank {', '.join(map(str, refused))}: " if some else ""
            raise UserError(f"{where}{refusals[refused[0]]}", everywhere=True)
        return result  # type: ignore[return-value]

    def check_shared(self, folder: Any, key: str) -> None:
        """Refuse a ``folder`` (a path, or a place in a store) that is not the same one for all processes: on machines
        with disks of their own each would keep a part of every checkpoint, and none could be read."""
        if self.world.size == 1:
            return
        mark = self.broadcast(folder / f".shared-{uuid.uuid4().hex}")
        if self.is_main:
            mark.touch()
        self.barrier()
        seen = self.everybodys((mark.exists(), host()))
        blind = [f"{rank} ({where})" for rank, (sees, where) in enumerate(seen) if not sees]
        if self.is_main:
            mark.unlink()
        if blind:
            raise UserError(
                f"{key} '{folder}' is not the same folder on rank {', '.join(blind)} as on rank 0 "
                f"({seen[0][1]}): put it on a file system that all machines share",
                everywhere=True,
            )


@contextlib.contextmanager
def processes(
    device: str = "auto", threads: int | None = None, context: int = 1, timeout: timedelta = TIMEOUT
) -> Iterator[Processes]:
    """Join the processes of the run (or be the only one), with this one's device and threads.

    Who they are is known from torch.distributed where it is initialised, else from the launcher's variables (RANK,
    WORLD_SIZE, ...).  ``context``: how many processes share a sequence.  ``timeout``: of an exchange, where the
    group is made here.  The number of threads is as it was afterwards, and a process group that was made here is gone.
    """
    joined = dist.is_initialized()
    rank, ranks, local_rank, local_ranks = launched() if not joined else Launched()
    if joined:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        local_rank, local_ranks = _place_on_machine(rank, ranks)
    started = ranks > 1 and not joined
    chosen = _device(device, local_rank)
    if started:
        _allow_connections(ranks)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=_store(rank, ranks),
            rank=rank,
            world_size=ranks,
            timeout=timeout,
        )
        _end_threads_at_exit()
    previous_threads = torch.get_num_threads()
    held = contextlib.ExitStack()
    try:
        if started:
            held.enter_context(_of_all_groups(timeout))
        torch.set_num_threads(threads or max(_cores() // local_ranks, 1))
        yield replace(_on_mesh(chosen, rank, ranks, context, Axis(local_rank, local_ranks)), timeout=timeout)
    except RuntimeError as error:
        if not started or not _LOST.search(str(error)):
            raise
        raise UserError(
            f"rank {rank} lost another process, which ended, and said why if it could: then start again (a training "
            "with --resume)"
        ) from error
    finally:
        torch.set_num_threads(previous_threads)
        held.close()
        # made above, or for a table that can't do without one
        if not joined and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _of_all_groups(timeout: timedelta) -> Iterator[None]:
    """Groups that others make (a mesh, TorchRec, DeepSpeed) without a word about time have this timeout too, not half
    an hour."""
    module: Any = dist.distributed_c10d
    names = [name for name in ("default_pg_timeout", "default_pg_nccl_timeout") if hasattr(module, name)]
    before = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, timeout)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _allow_connections(ranks: int) -> None:
    """gloo connects each process with each other one, in every group; a thousand files are few for that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 8 * ranks if ranks > 64 else soft
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def with_group(device: torch.device) -> None:
    """Have a process group, for what can't do without one where there is one process only; it goes with the run."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        _end_threads_at_exit()


def _end_threads_at_exit() -> None:
    """Let gloo's threads end before the interpreter does: one that then still has a Python object to let go of aborts
    the process (SIGABRT).  They live as long as their group, and cycles keep groups beyond destroy_process_group."""
    atexit.unregister(gc.collect)
    atexit.register(gc.collect)


def _place_on_machine(rank: int, ranks: int) -> tuple[int, int]:
    """(rank, ranks) among the processes of this machine."""
    machines: list[str] = [""] * ranks
    dist.all_gather_object(machines, socket.gethostname())
    here = [other for other, machine in enumerate(machines) if machine == machines[rank]]
    return here.index(rank), len(here)


def _store(rank: int, ranks: int) -> dist.Store | None:
    """A store of this attempt's own.  torchrun keeps one for all attempts of a job, and gloo would find the addresses
    of the processes that died in it."""
    kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not kept_by_agent,
        timeout=TIMEOUT,
    )
    meeting = dist.PrefixStore(f"group {next(_GROUPS)}", store)
    # where rank 0 has just made the store there is nothing to tell apart
    return dist.PrefixStore(_agreed(meeting, rank, ranks), meeting) if kept_by_agent else meeting


def _agreed(store: dist.Store, rank: int, ranks: int) -> str:
    """A word for this attempt, the same on all processes and another one than in any attempt before, of which the store
    knows all that was said.  (Agents count their attempts for themselves, and differ.)

    The first process says a new word, the others answer it with a mark of their own, and it is agreed when the first
    has all marks: whoever has read the word of an earlier attempt doesn't find its mark, and reads again.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("word", own)
        marks = {other: f"{own}/{other}" for other in range(1, ranks)}
        try:
            store.wait([*marks.values()], TIMEOUT)
        except dist.DistStoreError as error:
            missing = [str(other) for other, mark in marks.items() if not store.check([mark])]
            raise UserError(
                f"rank {', '.join(missing[:8])}{' and more' * bool(missing[8:])} of {ranks} didn't come in "
                f"{TIMEOUT.total_seconds():.0f} s: look at what they say, and start all again"
            ) from error
        store.set(f"{own}/all", " ".join(store.get(mark).decode() for mark in marks.values()))
        return own
    answered, pause, until = "", 0.02, time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < until:
        word = store.get("word").decode()
        if word != answered:
            store.set(f"{word}/{rank}", own)
            answered = word
        if store.check([f"{word}/all"]) and own in store.get(f"{word}/all").decode().split():
            return word
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    raise UserError(
        f"rank {rank} waited {TIMEOUT.total_seconds():.0f} s for all processes to come: start them again"
    )


def _on_mesh(device: torch.device, rank: int, ranks: int, context: int, local: Axis) -> Processes:
    if ranks % context:
        raise UserError(
            f"{ranks} processes can't be cut into groups of {context} that share a sequence (train.context): start a "
            "multiple, or change it",
            everywhere=True,
        )
    if ranks == 1:
        return Processes(device, local=local)
    world = Axis(rank, ranks, dist.group.WORLD)
    if context == 1:  # the mesh's axes are everybody and nobody else: no further groups are made
        return Processes(device, world, world, Axis(), local)
    mesh = dist.device_mesh.init_device_mesh(
        device.type, (ranks // context, context), mesh_dim_names=("data", "context")
    )
    data, shared = (
        Axis(mesh.get_local_rank(name), mesh[name].size(), mesh.get_group(name))
        for name in ("data", "context")
    )
    # NCCL connects a group in its first operation, where all must be; later ones may be between two of them
    shared.add_up(torch.zeros(1, device=device))
    return Processes(device, world, data, shared, local)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
