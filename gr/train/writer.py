"""Who writes a run's checkpoints: training itself, or a thread of each process while training goes on.

A thread writes what training would have written, and exchanges what it has to on a group of its own.  What of the
state moves on is copied before it does (gr.train.snapshot): training stands still for that long.  One checkpoint at a
time: the next one waits for the one before.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from threading import Thread
from types import TracebackType
from typing import Any

from torch import Tensor

from gr.config import RunConfig, to_dict
from gr.processes import Processes
from gr.train import checkpoint
from gr.train.aside import Aside
from gr.train.cursor import Cursor
from gr.train.engines.engine import Engine
from gr.train.folder import RunFolder
from gr.train.slices import shared_out
from gr.train.snapshot import release, snapshot


class CheckpointWriter:
    """A context: at its end nothing is being written any more.  All processes call its methods together.

    say: gives a line to whoever watches.  noted: of what the model is made of and no checkpoint holds
    (:func:`gr.train.frozen.noted`).
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        processes: Processes,
        say: Callable[[str], None],
        noted: Mapping[str, Any] | None = None,
    ) -> None:
        self.noted = noted
        self.folder, self.config, self.processes, self.say = folder, config, processes, say
        self._apart = processes
        self._held = ExitStack()
        self._thread: Thread | None = None
        self._engine: Engine | None = None
        self._error: BaseException | None = None
        self._report = ""
        self._said_in_step = False

    def __enter__(self) -> CheckpointWriter:
        if self.config.checkpoint.asynchronous:
            self._held.enter_context(checkpoint.quiet())
            self._apart = self._held.enter_context(self.processes.apart())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            self.join()
            if kind is None:
                self.wait()

    @property
    def failed(self) -> bool:
        """Whether this process knows of a checkpoint that couldn't be written: :meth:`wait` raises it."""
        return self._error is not None

    def save(self, engine: Engine, cursor: Cursor) -> None:
        """Write the state as it is now, the checkpoint of ``cursor``; now, or soon."""
        started = time.perf_counter()
        self.wait()
        tensors = engine.tensors()
        taken = self._taken(tensors, engine)
        if taken is None:
            self._write(tensors, cursor, self.processes)
            return
        self._engine, cursor = engine, copy.deepcopy(cursor)
        stalled = time.perf_counter() - started
        self._thread = Thread(
            target=self._run, args=(*taken, cursor, stalled), name="checkpoint", daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Say what has been written meanwhile."""
        if self._thread is not None and not self._thread.is_alive() and not self.failed:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; raises what kept the last checkpoint from it."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._report:
            report, self._report = self._report, ""
            self.say(report)

    def join(self) -> None:
        """Until nothing is being written, come of it what may."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._engine is not None:
            release(self._engine.row_optimizers.values())
            self._engine = None

    def _taken(self, tensors: Mapping[str, Tensor], engine: Engine) -> tuple[dict[str, Tensor], Aside] | None:
        """The state of this moment for a thread; None if there is to be none.  The same on all processes."""
        config = self.config.checkpoint
        if not config.asynchronous:
            return None
        optimizers = list(engine.row_optimizers.values())
        # each copies its share alone of what all have
        taken = snapshot(shared_out(tensors, self.processes.world), optimizers, config.copy_mib << 20)
        (refused,) = self.processes.world.maximum([int(taken is None)])
        if not refused:
            return taken
        release(optimizers)
        if not self._said_in_step:
            self._said_in_step = True
            self.say(
                "checkpoints are written while training waits: copies would take more than checkpoint.copy_mib, "
                f"{config.copy_mib:,} MiB"
            )
        return None

    def _run(self, tensors: dict[str, Tensor], aside: Aside, cursor: Cursor, stalled: float) -> None:
        started = time.perf_counter()
        try:
            self._write(tensors, cursor, self._apart)
        except BaseException as error:
            self._error = error
            return
        finally:
            aside.end()
        took, stalled = time.perf_counter() - started, stalled + aside.waited
        self._report = (
            f"checkpoint of step {cursor.step}: stalled {1000 * stalled:,.0f} ms, written in {took:.1f} s"
        )

    def _write(self, tensors: Mapping[str, Tensor], cursor: Cursor, processes: Processes) -> None:
        folder, keep = self.folder.checkpoints, self.config.checkpoint.keep
        if processes.is_main:
            self.folder.sync_metrics()
        checkpoint.save(folder, tensors, cursor, to_dict(self.config), processes, self.noted)
        if processes.is_main:
            best = cursor.best.get("step")
            checkpoint.prune(folder, keep, cursor.step, None if best is None else int(best))
