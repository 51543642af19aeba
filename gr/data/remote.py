"""The engine of ingest that reads on a Ray cluster: windows are made by tasks on its nodes, and each rank fetches its
share of them.

    window    a task: a window's blocks -> each rank's shares of the global batches in it, and the pieces at its edges
    seam      a task: the pieces of a global batch that lies in several windows -> each rank's share
    Windows   the one actor of a run: has windows made, a few ahead of those that are read, and hands out references
    Ray       a rank's end

Every result is a pure function of (plan, dataset, number), made by the functions of ``gr.data.batches``.  So the actor
is a cache: it holds no position, and when it dies it is made again and asked again.

A *unit* is a window of an epoch, numbered through all epochs.  A *place* says where a result lies: a reference, and the
row of the block behind it (None: the object itself).
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa

from gr.config import POSITIVE, ComponentConfig
from gr.data import cluster
from gr.data.batches import (
    GlobalBatch,
    Plan,
    Shares,
    collated,
    parted,
    read_samples,
    shares,
    window,
    windows_from,
)
from gr.data.dataset import SequenceDataset
from gr.data.loader import InProcess, pinned, read_ahead
from gr.data.sequences import Sequences, Stretches
from gr.errors import UserError, first_line

if TYPE_CHECKING:  # a node's worker does without torch
    from gr.processes import Processes

Place = tuple[Any, int | None]
LOOK_SECONDS = 1.0  # between looks at whether anybody still waits for what is waited for
START_SECONDS = 120  # for the actor, at least
AGAIN_SECONDS = 0.2  # before something lost is asked for again
LEAST_UNITS = 16  # of a pipeline


class Refusal(NamedTuple):
    """In the place of a result: what a task refused, for the rank that asks for it."""

    said: str


@dataclass(frozen=True)
class Work:
    """What the tasks of a run make, for ``ranks``.  ``path``: the dataset's, absolute or a URL; ``name``: what messages
    call it; ``generation``: which one it is."""

    path: str
    name: str
    generation: str
    plan: Plan
    ranks: int

    @property
    def results(self) -> int:
        """Of a window: each rank's shares, then the pieces at its edges."""
        return self.ranks + 2

    def window(self, unit: int) -> list[Any]:
        """The results of a window; where it can't be made each is a :class:`Refusal`."""
        try:
            pa.set_cpu_count(1)  # a task has one core
            dataset = _opened(self.path, self.name, self.generation)
            return self.made(unit, partial(read_samples, self.plan, dataset, unit // self.plan.order.windows))
        except UserError as error:
            return [Refusal(str(error))] * self.results

    def made(self, unit: int, read: Callable[[int], Stretches]) -> list[Any]:
        """The results of a window.  ``read``: block number -> the block's samples."""
        epoch, number = divmod(unit, self.plan.order.windows)
        rows = window(self.plan, read, epoch, number)
        before, index, whole, after = parted(self.plan, epoch, number, rows)
        return [*shares(self.plan, epoch, index, whole, self.ranks), before.copied(), after.copied()]

    def seam(self, unit: int, pieces: list[Sequences | Refusal]) -> list[Any]:
        """Each rank's share of the global batch that ends in a window and began in another one."""
        refusals = [piece for piece in pieces if isinstance(piece, Refusal)]
        if refusals:
            return refusals[:1] * self.ranks
        epoch, number = divmod(unit, self.plan.order.windows)
        seam = self.plan.seam(epoch, number)
        assert seam is not None
        rows = Stretches.concatenate(Stretches.of(piece) for piece in pieces)  # type: ignore[arg-type]
        return list(shares(self.plan, epoch, seam[0], rows, self.ranks))

    def seam_of(self, unit: int) -> range | None:
        """The units that the global batch lies in that ends in ``unit`` and began before; None where there is none."""
        seam = self.plan.seam(*divmod(unit, self.plan.order.windows))
        return None if seam is None else range(unit - unit % self.plan.order.windows + seam[1], unit + 1)

    def needed(self, unit: int) -> int:
        """The first unit that is still needed where none before ``unit`` is asked for any more: a global batch that
        goes on after ``unit`` may have begun earlier."""
        epoch, number = divmod(unit, self.plan.order.windows)
        if number + 1 == self.plan.order.windows:
            return unit
        return min(unit, epoch * self.plan.order.windows + self.plan.began(epoch, number + 1))


@lru_cache(maxsize=2)
def _opened(path: str, name: str, generation: str) -> SequenceDataset:
    """The dataset, opened once by a worker."""
    where = f"on node {os.uname().nodename} of the Ray cluster"
    try:
        dataset = SequenceDataset(path, generation)
    except UserError as error:
        raise UserError(
            f"{where}: {error}; every node must be able to read data.path (shared storage, or a URL)"
        ) from None
    if dataset.manifest.generation != generation:
        raise UserError(
            f"'{path}' is another dataset {where} (generation {dataset.manifest.generation}, here {generation}): "
            "every node must read the same one"
        )
    dataset.folder.name = name
    return dataset


def _window(work: Work, unit: int) -> list[Any]:
    return work.window(unit)


def _seam(work: Work, unit: int, rows: list[int | None], *objects: Any) -> Any:
    found = work.seam(unit, [taken(found, row) for found, row in zip(objects, rows, strict=True)])
    return found[0] if work.ranks == 1 else found  # as many returns as ranks, and one is no list


def taken(found: Any, row: int | None) -> Any:
    """The result at a place whose reference was resolved to ``found``."""
    return found if row is None else pickle.loads(found["result"][row].as_buffer())


class Tasks:
    """Windows made by Ray Core, a task each, ``ahead`` of the one that is asked for."""

    def __init__(self, work: Work, shared: Any, ahead: int):
        import ray

        self.shared, self.ahead = shared, ahead
        self.task: Any = ray.remote(
            num_cpus=1, max_retries=3, num_returns=work.results, scheduling_strategy="SPREAD"
        )(_window)

    def start(self, unit: int) -> list[Place]:
        return [(reference, None) for reference in self.task.remote(self.shared, unit)]


class Pipeline:
    """Windows made by Ray Data, a block of a pipeline each, in order; it runs ahead by its own rules."""

    ahead = 0

    def __init__(self, work: Work, ahead: int):
        self.work, self.concurrency = work, ahead + 1
        self.next = -1  # the unit whose results ``places`` are about to give
        self.places: Iterator[Place] = iter(())

    def start(self, unit: int) -> list[Place]:
        places = list(islice(self.places, self.work.results)) if unit == self.next else []
        if not places:  # asked for something else than what comes next, or at the pipeline's end
            self.places = self._run(unit)
            places = list(islice(self.places, self.work.results))
        self.next = unit + 1
        return places

    def _run(self, first: int) -> Iterator[Place]:
        """The results of the units from ``first`` to the end of their epoch, LEAST_UNITS at least."""
        import ray.data

        work, windows = self.work, self.work.plan.order.windows
        count = max(windows - first % windows, LEAST_UNITS)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False

        def block(batch: dict[str, np.ndarray]) -> pa.Table:
            results = work.window(
                first + int(batch["id"][0])
            )  # a refusal in it: Ray Data would hide an exception
            return pa.table(
                {"result": pa.array([pickle.dumps(result, 5) for result in results], pa.large_binary())}
            )

        made = ray.data.range(count, override_num_blocks=count).map_batches(
            block, batch_size=None, num_cpus=1, concurrency=self.concurrency
        )
        for bundle in made.iter_internal_ref_bundles():
            for entry in bundle.blocks:  # one, or several of a large window
                for row in range(entry.metadata.num_rows):
                    yield entry.ref, row


class Windows:
    """The actor of a run.  ``consumers``: how many ranks ask; what all of them have passed is let go of."""

    def __init__(self, work: Work, executor: Literal["core", "data"], ahead: int, consumers: int):
        import ray

        self.work = work
        self.shared = ray.put(work)  # a split's table of periods may be large: not with every task
        core = executor == "core"
        self.maker: Tasks | Pipeline = Tasks(work, self.shared, ahead) if core else Pipeline(work, ahead)
        self.join = ray.remote(num_cpus=1, max_retries=3, num_returns=work.ranks)(_seam)
        self.windows: dict[int, list[Place]] = {}
        self.seams: dict[int, list[Place]] = {}
        self.asked = [0] * consumers

    def ready(self) -> None:
        """Answers once the actor is there."""

    def places(self, unit: int, rank: int, consumer: int) -> list[Place]:
        """Where the shares of ``rank`` lie of the global batches that end in ``unit``, in order."""
        for number in range(unit, unit + 1 + self.maker.ahead):
            self._seam(number)
            self._window(number)
        found = [self.seams[unit][rank]] if unit in self.seams else []
        found.append(self.windows[unit][rank])
        self.asked[consumer] = unit
        passed = min(self.asked)
        needed = self.work.needed(passed)
        self.seams = {number: places for number, places in self.seams.items() if number >= passed}
        self.windows = {number: places for number, places in self.windows.items() if number >= needed}
        return found

    def _window(self, unit: int) -> list[Place]:
        if unit not in self.windows:
            self.windows[unit] = self.maker.start(unit)
        return self.windows[unit]

    def _seam(self, unit: int) -> None:
        units = self.work.seam_of(unit)
        if units is None or unit in self.seams:
            return
        # of the window in which the batch began the piece at its end, of later ones that at their beginning
        pieces = [self._window(number)[-1 if number == units[0] else -2] for number in units]
        found = self.join.remote(
            self.shared, unit, [row for _, row in pieces], *(reference for reference, _ in pieces)
        )
        self.seams[unit] = [(reference, None) for reference in (found if self.work.ranks > 1 else [found])]


class Ray(InProcess):
    """Reads on a Ray cluster, ``ahead`` windows ahead of the one that is trained on."""

    class Config(ComponentConfig):
        """executor: "core", tasks of Ray Core; "data", a pipeline of Ray Data.  address: of a cluster that runs ("auto"
        or HOST:PORT); without it one is started on this machine, with ``cpus`` and ``store_mib``, Ray's own choice
        without them.  ahead: windows made beyond the one that is read.  timeout: seconds to wait for a window."""

        name: Literal["ray"] = "ray"
        executor: Literal["core", "data"] = "core"
        address: str | None = None
        ahead: POSITIVE = 2
        timeout: POSITIVE = 600
        cpus: POSITIVE | None = None
        store_mib: POSITIVE | None = None

        def idle(self) -> dict[str, str]:
            why = f"the cluster at data.ingest.address ({self.address}) runs already"
            return {} if self.address is None else {"cpus": why, "store_mib": why}

    config: Config
    _source: Source | None = None

    @contextmanager
    def opened(self, processes: Processes) -> Iterator[None]:
        config, world = self.config, processes.world
        with cluster.shared(config.address, processes, cpus=config.cpus, store_mib=config.store_mib):
            name = processes.broadcast(f"windows-{uuid4().hex}")
            self._source = processes.together(lambda: self.source(name, world.rank, world.size))
            try:
                yield
            finally:
                self._source = None

    def source(self, name: str, consumer: int = 0, consumers: int = 1) -> Source:
        """Where this rank gets its shares from: the actor called ``name``, made if it isn't there."""
        folder = self.dataset.folder
        path = folder.name if folder.local is None else str(folder.local.resolve())
        work = Work(path, folder.name, self.dataset.manifest.generation, self.plan, self.ranks)
        return Source(self.config, work, name, self.rank, consumer, consumers)

    def epoch(self, epoch: int, start: int = 0) -> Generator[GlobalBatch]:
        if self._source is None:
            raise RuntimeError("read inside of opened(processes)")
        return self.read(self._source, epoch, start)

    def read(self, source: Source, epoch: int, start: int = 0) -> Generator[GlobalBatch]:
        """Batches ``start``, ``start + 1``, ... of an epoch from ``source``."""
        left = threading.Event()
        batches = pinned(self._collated(source, epoch, start, left.is_set), self.pin_memory)
        with closing(read_ahead(batches, self.prefetch)) as ready:
            try:
                yield from ready
            finally:
                left.set()  # before its threads are waited for

    def _collated(
        self, source: Source, epoch: int, start: int, left: Callable[[], bool]
    ) -> Iterator[GlobalBatch]:
        if start >= self.in_epoch(epoch):
            return
        first = epoch * self.plan.order.windows
        numbers = (number for number, _ in windows_from(self.plan, epoch, start * self.plan.global_batch))
        fetched = (source.shares(first + number, left) for number in numbers)
        for found in read_ahead(fetched, 1):
            for given in found:
                yield from collated(self.plan, given, start)


class Source:
    """A rank's connection to the actor, which it makes if nobody has."""

    def __init__(self, config: Ray.Config, work: Work, name: str, rank: int, consumer: int, consumers: int):
        import ray

        self.ray, self.config, self.work, self.rank, self.consumer = ray, config, work, rank, consumer
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Windows)
        self.actor: Any = actor.options(name=name, namespace=cluster.NAMESPACE, get_if_exists=True).remote(
            work, config.executor, config.ahead, consumers
        )
        timeout = max(config.timeout, START_SECONDS)
        self._asked("no actor came", lambda get: get(self.actor.ready.remote()), lambda: False, timeout)

    def shares(self, unit: int, left: Callable[[], bool] = lambda: False) -> list[Shares]:
        """This rank's shares of the global batches that end in ``unit``, in order; none if ``left()`` meanwhile."""
        epoch, number = divmod(unit, self.work.plan.order.windows)

        def fetched(get: Callable[[Any], Any]) -> list[Shares | Refusal]:
            places = get(self.actor.places.remote(unit, self.rank, self.consumer))
            return [taken(get(reference), row) for reference, row in places]

        what = f"window {number} of epoch {epoch} did not come"
        found = self._asked(what, fetched, left, self.config.timeout) or []
        for given in found:
            if isinstance(given, Refusal):
                raise UserError(given.said)
        return found

    def _asked(
        self,
        failure: str,
        ask: Callable[[Callable[[Any], Any]], Any],
        left: Callable[[], bool],
        timeout: int,
    ) -> Any:
        """What ``ask(get)`` returns, where ``get`` waits for a reference; None if ``left()`` meanwhile.  ``failure``:
        what there is to say where the cluster gives nothing."""
        errors = self.ray.exceptions
        deadline = time.monotonic() + timeout

        def get(reference: Any) -> Any:
            while not left():
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise UserError(
                        f"{failure} from the Ray cluster within {timeout} s (data.ingest.timeout): look at "
                        "its nodes (ray status), give it more CPUs, or lower data.window_blocks"
                    )
                try:
                    return self.ray.get(reference, timeout=min(LOOK_SECONDS, rest))
                except errors.GetTimeoutError:
                    continue
            raise _Left

        while True:
            try:
                return ask(get)
            except _Left:
                return None
            except (errors.ObjectLostError, errors.ActorUnavailableError):
                time.sleep(AGAIN_SECONDS)  # the actor died, with what it owned: a new one makes it again
            except errors.RayTaskError as error:
                if not isinstance(error.cause, ImportError):
                    raise
                raise UserError(
                    f"{failure} from the Ray cluster ({first_line(error.cause)}): every node needs the packages of "
                    "this environment, gr among them"
                ) from None
            except errors.RayError as error:
                raise UserError(
                    f"{failure} from the Ray cluster ({_last_line(error)}): look at its nodes (ray status); then go on "
                    "with --resume"
                ) from None


class _Left(Exception):
    """Nobody waits any more."""


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
