"""Engines of ingest that read in the training process: every rank reads its windows' blocks, keeps its share of each
global batch and forgets the rest.

Memory is two windows of blocks at most (the one being cut and the one being read).
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from gr.config import ComponentConfig
from gr.data.batches import GlobalBatch, Plan, blocks_ahead, epoch_batches
from gr.data.dataset import SequenceDataset

if TYPE_CHECKING:
    from gr.processes import Processes

T = TypeVar("T")

WORTH_A_THREAD = 0.1
"""The part of the time of producing that a reader has to be away for a thread to be worth its hand-overs."""


class InProcess:
    """What the engines of this file share.  With pin_memory batches lie in memory from which a GPU copies without
    being waited for.  ``prefetch``: batches ready before they are asked for, if the engine ``reads_ahead``."""

    reads_ahead = True

    def __init__(
        self,
        config: ComponentConfig,
        dataset: SequenceDataset,
        plan: Plan,
        *,
        rank: int = 0,
        ranks: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ):
        self.config, self.dataset, self.plan = config, dataset, plan
        self.rank, self.ranks, self.prefetch, self.pin_memory = rank, ranks, prefetch, pin_memory

    @property
    def epochs(self) -> int | None:
        return self.plan.epochs

    def in_epoch(self, epoch: int) -> int:
        return self.plan.in_epoch(epoch)

    @contextmanager
    def opened(self, processes: Processes) -> Iterator[None]:
        yield

    def _epoch(self, epoch: int, start: int) -> Generator[GlobalBatch]:
        ahead = self.dataset.ahead if self.reads_ahead else 0
        read = blocks_ahead(self.plan, self.dataset, epoch, start, ahead)
        yield from pinned(
            epoch_batches(self.plan, read, epoch, start, self.rank, self.ranks), self.pin_memory
        )


class Arrow(InProcess):
    """Reads ahead in a thread beside the training step."""

    class Config(ComponentConfig):
        name: Literal["arrow"] = "arrow"

    def epoch(self, epoch: int, start: int = 0) -> Generator[GlobalBatch]:
        yield from read_ahead(self._epoch(epoch, start), self.prefetch)


class Direct(InProcess):
    """Reads when a batch is asked for, without a thread: for profiles, and where threads may not be."""

    reads_ahead = False

    class Config(ComponentConfig):
        name: Literal["direct"] = "direct"

    def epoch(self, epoch: int, start: int = 0) -> Generator[GlobalBatch]:
        return self._epoch(epoch, start)


def pinned(batches: Iterator[GlobalBatch], pin: bool) -> Iterator[GlobalBatch]:
    """``batches``, in memory from which a GPU copies without being waited for if ``pin``."""
    for batch in batches:
        yield replace(batch, share=batch.share.pin_memory()) if pin else batch


def read_ahead(items: Iterator[T], depth: int) -> Generator[T]:
    """``items``, produced in a thread at most ``depth`` ahead; its errors are raised here.

    Whoever comes to find nothing ready produces the next one itself: handing it over would cost more than it spares.
    So would a thread beside a reader that comes back at once: it goes on only where the reader stays away.
    """
    ready: deque[tuple[T | None, BaseException | None]] = deque()
    producing = threading.Lock()
    room = threading.Semaphore(depth)
    stop = threading.Event()
    produced_s = away_s = 0.0
    worth_it, owed = True, 0  # owed: places in ``ready`` that the thread hasn't been told of

    def produce() -> tuple[T | None, BaseException | None]:
        nonlocal produced_s
        begun = time.perf_counter()
        try:
            return next(items), None
        except BaseException as error:
            stop.set()
            return None, error
        finally:
            produced_s += time.perf_counter() - begun

    def produce_ahead() -> None:
        while room.acquire() and not stop.is_set():
            with producing:
                if not stop.is_set():
                    ready.append(produce())

    def taken() -> tuple[T | None, BaseException | None]:
        nonlocal owed
        if not ready:
            with producing:
                if not ready:
                    return produce()
        owed += 1
        return ready.popleft()

    thread = threading.Thread(target=produce_ahead, name="gr-read-ahead", daemon=True)
    thread.start()

    def finish() -> None:
        stop.set()
        room.release()
        thread.join()

    # A daemon thread inside a torch operation when the interpreter ends aborts the process (SIGABRT, "terminate
    # called without an active exception"): none may outlive its reader, nor what still holds one at exit.
    atexit.register(finish)
    try:
        while True:
            item, error = taken()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            if owed and worth_it:
                room.release(owed)
                owed = 0
            left = time.perf_counter()
            yield item  # type: ignore[misc]
            away_s += time.perf_counter() - left
            worth_it = away_s > WORTH_A_THREAD * produced_s
    finally:
        finish()
        atexit.unregister(finish)
