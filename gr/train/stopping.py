"""A signal is a reason to stop before the end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

REPEATED_S = 1.0


class ToldToEnd(BaseException):
    """SIGTERM came; like KeyboardInterrupt nothing but the outermost catches it."""


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM raises :class:`ToldToEnd` in the main thread, once: what ends by it isn't interrupted again."""

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise ToldToEnd(signal.Signals(number).name)

    with _on_sigterm(handle):
        yield


@contextmanager
def deaf() -> Iterator[None]:
    """Nothing happens at a SIGTERM, for the seconds that a last word takes."""
    with _on_sigterm(signal.SIG_IGN):
        yield


@contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Outside of the main thread the signal stays as it is."""
    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopSignal:
    """Remembers SIGTERM, SIGINT, and SIGHUP (a connection that is lost; not with nohup), so that the step in hand can
    finish and be saved.

    Another SIGINT interrupts at once, unless it comes within a second of the first: torchrun sends a Ctrl-C on to
    processes that had it from the terminal already.
    """

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread (a notebook's worker): signals stay as they are
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received, self._when = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when > REPEATED_S:
            raise KeyboardInterrupt
