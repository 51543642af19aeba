"""Reasons to stop before the end: a signal, a loss that is not a number, no progress on the validation split."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Remembers SIGTERM (and SIGINT), so that the step in hand can finish and be saved.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread (a notebook's worker): signals stay as they are
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
