"""A watch over a run: where each rank is, told while others can still hear it, so that a hang has a name.

    sampler    a thread of each process that looks at its main thread's stack, some times a second
    courier    a thread that tells the others where this process is, over a store, and reads where they are
    Watch      the two, what they say (the log, a file per rank, heartbeat.json), and an end to a hang

The store is a connection of its own to where the processes met: it works where disks aren't shared, and whoever can't
reach it is told apart by that.  Neither thread takes part in an exchange, and no number of a run hangs on them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from statistics import median
from types import TracebackType
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist

import gr
from gr.errors import UserError
from gr.launcher import attempt, host
from gr.processes import Processes
from gr.train.environment import PACKAGES, installed_version
from gr.train.folder import RunFolder
from gr.train.preflight import code_digest
from gr.train.standing import Standing, late, slow, told, where
from gr.train.stopping import ToldToEnd, deaf, told_to_end

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
BEAT_SECONDS = 1.0
HEART_SECONDS = 5.0  # between two heartbeat.json
ANSWER_SECONDS = 4.0  # of the store
WINDOW_SECONDS, WINDOW_STEPS = 10.0, 3  # of work, at least, over which ranks are compared
QUIET_SECONDS = 600.0  # before the same rank is called slow again
QUIET_STEP_SECONDS = 60.0  # before another step is
SILENT_BEATS = 4
CERTAIN_SECONDS = (
    8.0  # until the lost have been silent for so many beats, also to one that began to listen just now
)
STOOD_LOOKS = 20  # a look so late: the whole process stood still
SLOW_STEP, SLOW_STEP_SECONDS = 5.0, 3.0  # times the median of the last steps, and at least so long
STEPS_KNOWN, STEPS_KEPT = 5, 50
GRACE_SECONDS = 60.0  # beyond the timeout, before a process that hangs in spite of it is ended
_TIMED_OUT = re.compile(r"timed out (waiting|after)|watchdog caught|(socket|wait) timeout", re.IGNORECASE)
_LOST = re.compile(r"connection (closed|reset) by peer|broken pipe|read error", re.IGNORECASE)
_PEER = re.compile(r"\[([0-9a-fA-F.:]+)\](?=:\d)")
_WATCHES = itertools.count()


class Watch:
    """A context around a run; all processes make it together.  :meth:`at` says what the main thread begins.

    again: what to do after an end that is nobody's fault, as the sentence that names the late or lost says it.
    limit: what sets the time that an exchange may take, for that sentence.
    """

    def __init__(
        self, processes: Processes, again: str = "go on with --resume", limit: str = "train.timeout"
    ) -> None:
        self.processes, self.rank, self.again, self.limit = processes, processes.world.rank, again, limit
        self._parent = os.getppid()
        self.timeout = processes.timeout.total_seconds()
        self.patience = min(30.0, self.timeout / 3)
        self.phase, self.step = "starting", 0
        self.hosts = [host()]
        self._others = _Courier(processes, self) if processes.world.size > 1 else None
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._folder: RunFolder | None = None
        self._file: TextIO | None = None
        self._handlers: list[logging.Handler] = []  # of the logger, as long as this
        self._beat, self._worked, self._stood = 0, 0.0, 0.0
        self._place, self._waits = "", False
        self._waited = Standing()  # the last one that did
        self._last: Standing | None = None  # where training ended in an error
        self._moved, self._reported, self._hearts = time.monotonic(), 0.0, 0.0
        self._steps: list[float] = []
        self._window: tuple[float, dict[int, Standing]] | None = None
        self._named: dict[int, float] = {}
        self._told_slow = -QUIET_STEP_SECONDS
        self._slow_step: tuple[float, int, float, float, dict[int, Standing]] | None = None

    def __enter__(self) -> Watch:
        self._main = threading.get_ident()
        if self._others is not None:
            self.hosts = self.processes.everybodys(host())
            self._others.start()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._others is not None and isinstance(error, RuntimeError | ToldToEnd):
                # torchrun tells the others to end when it misses one, long before who it is is certain
                with deaf():
                    self._explain(error)
        finally:
            self._ended.set()
            if self._thread is not None:
                self._thread.join(2)
            self.phase = "ended" if kind is None else "ended in an error"
            self._write_heart()
            if self._others is not None:
                self._others.end()
                if kind is None:  # nobody asks the store any more, which may end with the first process
                    self.processes.barrier()
            for handler in self._handlers:
                logging.getLogger("gr").removeHandler(handler)
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()

    def at(self, phase: str, step: int) -> None:
        """What is begun, in or after which step."""
        self.phase, self.step = phase, step

    def attach(self, folder: RunFolder, config: str) -> None:
        """Keep heartbeat.json in a run's folder, and with several processes logs/rank-NNNNN.log.  ``config``: the
        digest of the run's."""
        self._folder = folder
        if self._others is None or self._file is not None:
            return
        logs = folder.here / "logs"
        logs.mkdir(exist_ok=True)
        self._file = (logs / f"rank-{self.rank:05d}.log").open("a", buffering=1)
        own, logger = logging.StreamHandler(self._file), logging.getLogger("gr")
        own.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        own.handleError = lambda record: None  # type: ignore[method-assign]  # a logger can never kill a run
        if not logger.hasHandlers() and logging.lastResort is not None:  # it steps aside for any other
            self._handlers.append(logging.lastResort)
        self._handlers.append(own)
        for handler in self._handlers:
            logger.addHandler(handler)
        job, number = attempt()
        versions = {name: installed_version(name) for name in PACKAGES}
        self.note(
            f"rank {self.rank} of {self.processes.world.size} on {host()}, process {os.getpid()}, job {job or '-'}, "
            f"attempt {number}, device {self.processes.device}, config {config}, gr {gr.__version__} {code_digest()}, "
            + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        )

    def note(self, text: str) -> None:
        """A line for this rank's own file, as far as there is room."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(f"{datetime.now().isoformat(' ', 'milliseconds')} {text}\n")

    def standing(self) -> Standing:
        """Of this rank, as it was last looked at."""
        if self._last is not None:
            return self._last
        exchanges = self._others.exchanges() if self._others is not None else 0
        return Standing(
            *(self.phase, self.step, self._place, self._waits, exchanges, round(self._worked, 2)),
            *(round(self._stood, 2), self._beat),
        )

    # -- the sampler ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        previous, looked, began = None, time.monotonic(), time.monotonic()
        step, other_phases = self.step, False
        period = LOOK_SECONDS if self._others is not None else BEAT_SECONDS
        while not self._ended.wait(period):
            now = time.monotonic()
            passed, looked = now - looked, now
            stood = passed - period if passed > STOOD_LOOKS * period else 0.0
            self._stood += stood
            if stood and self._others is not None:  # who couldn't listen has missed what others said
                self._moved = now
                self._others.forget()
            if not self._waits or stood:
                self._worked += passed
            self._place, self._waits = where(sys._current_frames().get(self._main or 0))
            standing = self.standing()
            if standing.waits:
                self._waited = standing
            progress = (standing.exchanges, standing.phase, standing.step)
            if progress != previous:
                if self._reported and self._others is not None:
                    self.note(f"goes on after {now - self._moved:.1f} s")
                previous, self._moved, self._reported = progress, now, 0.0
            other_phases = other_phases or standing.phase not in ("training", "reading")
            if standing.step != step:
                if self.processes.is_main and self._others is not None and not other_phases:
                    self._notice_step(standing.step - 1, (now - began) / max(standing.step - step, 1))
                step, began, other_phases = standing.step, now, False
            self._heart(now)
            if self._others is not None:
                self._look_at_others(self._others, now, standing)

    def _look_at_others(self, others: _Courier, now: float, standing: Standing) -> None:
        stalled = now - self._moved
        others.asked = self.processes.is_main or stalled > self.patience / 2
        if stalled > max(self.patience, 2 * self._reported):
            self._reported = stalled
            self._report(stalled)
        if standing.waits and stalled > self.timeout + max(GRACE_SECONDS, self.timeout / 2):
            self._give_up(stalled)
        if self.processes.is_main:
            self._compare(now, others)
            if self._slow_step is not None and now >= self._slow_step[0]:
                self._judge_step(others)

    def _report(self, stalled: float) -> None:
        """Where everybody is: in each stalled rank's file with its stacks, and once where people look; nothing where
        nobody waits for anybody."""
        seen, silent = self._view()
        if not silent and not any(standing.waits for standing in seen.values()):
            return
        said = f"nothing has moved for {stalled:.0f} s: {self.everybody()}"
        self._dump(said)
        if self._speaks():
            log.warning("%s; %s ends the run after %.0f s", said, self.limit, self.timeout)

    def _speaks(self) -> bool:
        """One of those that wait speaks for all."""
        seen, silent = self._view()
        behind = late(seen, silent)
        return self.rank == min((rank for rank in seen if rank not in behind), default=0)

    def everybody(self) -> str:
        """Who is late, and where everybody is, in words."""
        return told(*self._view(), self.hosts)

    def _view(self) -> tuple[dict[int, Standing], dict[int, float]]:
        """Where everybody is, as far as it is known, and of whom nothing was heard, for how long."""
        assert self._others is not None
        seen, silent = self._others.view()
        return {**seen, self.rank: self.standing()}, silent

    def _dump(self, why: str) -> None:
        if self._file is not None:
            self.note(f"{why}; the stacks of this process:")
            faulthandler.dump_traceback(self._file)

    def _give_up(self, stalled: float) -> NoReturn:
        """An exchange that its own timeout doesn't end: a driver's or a library's fault, and nobody would notice."""
        said = f"rank {self.rank} hangs in spite of {self.limit}, for {stalled:.0f} s: {self.everybody()}"
        self._dump(said)
        print(f"error: {said}; {self.again}", file=sys.stderr, flush=True)
        os._exit(2)

    def _notice_step(self, step: int, seconds: float) -> None:
        """Keep a step that took much longer than others, until everybody has told what it did meanwhile."""
        usual = median(self._steps) if len(self._steps) >= STEPS_KNOWN else None
        self._steps = [*self._steps, seconds][-STEPS_KEPT:]
        if usual is None or self._window is None or time.monotonic() - self._told_slow < QUIET_STEP_SECONDS:
            return
        if seconds > max(SLOW_STEP * usual, SLOW_STEP_SECONDS):
            self._told_slow = time.monotonic()
            due = time.monotonic() + 3 * BEAT_SECONDS
            self._slow_step = (due, step, seconds, usual, self._window[1])

    def _judge_step(self, others: _Courier) -> None:
        """Whose work the slow step was."""
        assert self._slow_step is not None
        _, step, seconds, usual, before = self._slow_step
        self._slow_step = None
        seen, _ = others.view()
        reason = "no rank worked longer than the others, so it was the network"
        if (found := slow(before, seen, seconds)) is not None:
            reason = self._how(*found, before, seen, seconds)
        log.warning(
            "step %d took %.1f s, the median of those before %.2f s: %s", step, seconds, usual, reason
        )

    def _compare(self, now: float, others: _Courier) -> None:
        """Every so often: whose work takes longest, where steps went on meanwhile."""
        if self._window is not None and now - self._window[0] < WINDOW_SECONDS:
            return
        seen, silent = others.view()
        if len(seen) < self.processes.world.size or silent or self.phase not in ("training", "reading"):
            self._window = None
            return
        if self._window is not None and seen[self.rank].step - self._window[1][self.rank].step < WINDOW_STEPS:
            return
        before, self._window = self._window, (now, seen)
        if before is None:
            return
        found = slow(before[1], seen, now - before[0])
        if found is not None and now - self._named.get(found[0], -QUIET_SECONDS) >= QUIET_SECONDS:
            self._named[found[0]] = now
            log.warning("%s: the others wait for it", self._how(*found, before[1], seen, now - before[0]))

    def _how(
        self, rank: int, times: float, before: dict[int, Standing], seen: dict[int, Standing], seconds: float
    ) -> str:
        """What a slow rank did in so many seconds."""
        stood = seen[rank].stood - before[rank].stood
        did = f"works {times:.1f} times as long as the rank in the middle"
        if stood > seconds / 3:
            did = f"stood still for {stood:.1f} s"
        return f"rank {rank} on {self.hosts[rank]} {did}"

    def _heart(self, now: float) -> None:
        """heartbeat.json, new only where something has moved: an old one means a run that stands."""
        if now - self._hearts >= HEART_SECONDS and self._moved >= self._hearts:
            self._hearts = now
            self._write_heart()

    def _write_heart(self) -> None:
        if self._folder is None or not self.processes.is_main:
            return
        file = self._folder.here / "heartbeat.json"
        scratch = file.with_name(".heartbeat.json.writing")
        content = {"time": round(time.time(), 1), "step": self.step, "phase": self.phase, "pid": os.getpid()}
        with contextlib.suppress(OSError):  # a full disk is said where it matters
            scratch.write_text(json.dumps(content) + "\n")
            os.replace(scratch, file)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _explain(self, error: RuntimeError | ToldToEnd) -> None:
        """A timeout, or a lost process, in gloo's, NCCL's or the launcher's words, as a sentence that names who."""
        assert self._others is not None
        text = str(error)
        if isinstance(error, ToldToEnd):
            # an orphan's store, torchrun's, by which others are heard of, is gone
            orphaned = os.getppid() != self._parent
            lost = "" if orphaned else self._lost()
            why = (
                f"after {lost} was lost"
                if lost
                else "with its agent"
                if orphaned
                else f"in {self.standing()}"
            )
            raise UserError(
                f"rank {self.rank} on {self.hosts[self.rank]} was told to end ({text}) {why}: {self.again}",
                everywhere=bool(self.processes.local.rank) if orphaned else not self._speaks(),
            ) from error
        if _TIMED_OUT.search(text):
            self._last = self._waited
            self._others.ask()
            said = f"an exchange took longer than {self.limit}, {self.timeout:.0f} s: {self.everybody()}"
            self._dump(said)
            raise UserError(f"{said}; {self.again}", everywhere=not self._speaks()) from error
        if _LOST.search(text):
            self.note(text.splitlines()[0])
            whom = self._lost() or self._peer(text)
            raise UserError(
                f"rank {self.rank} lost {whom}: it ended, and said why if it could; then {self.again}",
                everywhere=not self._speaks(),
            ) from error

    def _lost(self) -> str:
        """The ranks of which nothing is heard any more, once that is certain; "" where all tell of themselves."""
        assert self._others is not None
        until = time.monotonic() + CERTAIN_SECONDS
        self._others.ask()
        while not (silent := self._view()[1]) and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        named = [f"rank {rank} on {self.hosts[rank]}" for rank in sorted(silent)]
        return ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")

    def _peer(self, text: str) -> str:
        """Whose connection gloo's words are about, as far as an address tells."""
        peer = _PEER.search(text)
        named = [name for name in dict.fromkeys(self.hosts) if peer and f"({peer[1]})" in name]
        return f"a process on {named[0]}" if named and len(set(self.hosts)) > 1 else "another process"


@contextlib.contextmanager
def watching(processes: Processes, limit: str = "train.timeout") -> Iterator[Watch]:
    """A watch over a program that writes its results at its end, and has nothing to save before: with several processes
    SIGTERM, which torchrun sends to all when one is lost, ends this one with a sentence that names the lost."""
    with contextlib.ExitStack() as held:
        if processes.world.size > 1:
            held.enter_context(told_to_end())
        yield held.enter_context(Watch(processes, "start it again", limit))


class _Courier:
    """Tells where this process is, and reads where the others are while that is ``asked``."""

    def __init__(self, processes: Processes, watch: Watch) -> None:
        self.asked = False
        self._size, self._rank, self._watch = processes.world.size, processes.world.rank, watch
        store: Any = dist.PrefixStore(f"watch {next(_WATCHES)}", _connection())
        store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        self._store: Any = store
        self._seen: dict[int, tuple[Standing, float]] = {}
        self._answered = time.monotonic()
        self._ended, self._wake, self._fresh = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> None:
        self._tell()
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(2)
        self._store = None  # with it its end of the connection, and where it is kept

    def exchanges(self) -> int:
        """Begun so far by the group of all processes, on its backends."""
        group: Any = dist.group.WORLD
        count = 0
        for device in dict.fromkeys(("cpu", self._watch.processes.device.type)):
            with contextlib.suppress(AttributeError, RuntimeError):  # the group is gone, or counts nothing
                count += int(group._get_backend(torch.device(device))._get_sequence_number_for_group())
        return count

    def view(self) -> tuple[dict[int, Standing], dict[int, float]]:
        """What is known of everybody, and of whom nothing was heard, for how long."""
        now, seen = time.monotonic(), dict(self._seen)
        silent = {}
        if self.asked:
            heard = {rank: when for rank, (_, when) in seen.items() if rank != self._rank}
            if now - self._answered > ANSWER_SECONDS + 2 and self._rank:  # it is with the first rank
                heard = {0: self._answered}
            silent = {
                rank: now - when for rank, when in heard.items() if now - when > SILENT_BEATS * BEAT_SECONDS
            }
        return {rank: standing for rank, (standing, _) in seen.items()}, silent

    def forget(self) -> None:
        """What was heard, as if nobody had been asked yet."""
        self._seen, self._answered = {}, time.monotonic()

    def ask(self) -> None:
        """Have looked at everybody just now, if the store answers."""
        self.asked = True
        self._fresh.clear()
        self._wake.set()
        self._fresh.wait(ANSWER_SECONDS)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._tell()
                if self.asked:
                    self._read()
                else:  # what was heard some time ago says nothing of now
                    self.forget()
            except Exception:  # the store is gone, or doesn't answer: view() says so
                if not self.asked:
                    return
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _tell(self) -> None:
        self._watch._beat += 1
        self._store.set(str(self._rank), self._watch.standing().told())

    def _read(self) -> None:
        names = [str(rank) for rank in range(self._size)]
        if self._store.has_extended_api():
            found = self._store.multi_get(names)
        else:
            found = [self._store.get(name) for name in names]
        now = time.monotonic()
        for rank, text in enumerate(found):
            standing = Standing.of(text)
            known = self._seen.get(rank)
            if known is None or known[0].beat != standing.beat:
                self._seen[rank] = (standing, now)
        self._answered = now
        self._fresh.set()


def _connection() -> Any:
    """To where the processes met, another one than theirs: nobody waits for an answer to somebody else's question."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()
