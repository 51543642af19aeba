"""Quotes of CSV: a line that doesn't close what it opens would swallow the lines after it without a word."""

from __future__ import annotations

import io
import re
from collections import deque

import numpy as np
import pyarrow as pa

PIECE_BYTES = 2**20
LONGEST = 2**25
"""Bytes of a line that is looked at; Arrow refuses one of more than two of its blocks."""
MARK = "\0"
"""Starts what stands in the place of a broken line."""


class ClosedQuotes(io.RawIOBase):
    """``source`` (UTF-8), of whose lines each closes the quotes that it opens, and has nothing but a delimiter after a
    closing one.  In the place of one that doesn't a line with more than ``columns`` columns comes, which whoever reads
    CSV gives back; :meth:`original` has it as it was."""

    def __init__(self, source: pa.NativeFile, delimiter: str, quote: str, escape: str, columns: int):
        self._source, self._columns = source, columns
        self._delimiter, self._quote = ord(delimiter), ord(quote)
        self._escape = ord(escape) if escape else None
        self._edge = np.zeros(256, bool)
        """Bytes that may be outside of a value's quotes beside them."""
        self._edge[[self._delimiter, self._quote, ord("\n"), ord("\r")]] = True
        self._whole = _line(*(re.escape(text) for text in (delimiter, quote, escape)))
        self._broken: dict[str, bytes] = {}
        """By what came in their places."""
        self._count = 0
        self._rest = b""
        self._ready: deque[memoryview] = deque()
        self._ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(PIECE_BYTES), b""))
        return self.read_buffer(size).to_pybytes()

    def read_buffer(self, size: int) -> pa.Buffer:
        """What Arrow reads by.  The memory is its own, used again: new pages cost more than the check."""
        buffer, filled = pa.allocate_buffer(size), 0
        room = memoryview(buffer).cast("B")
        while filled < size and (self._ready or not self._ended):
            if not self._ready:
                self._next()
                continue
            part = self._ready.popleft()
            taken = part[: size - filled]
            room[filled : filled + len(taken)] = taken
            filled += len(taken)
            if len(taken) < len(part):
                self._ready.appendleft(part[len(taken) :])
        return buffer.slice(0, filled)

    def close(self) -> None:
        self._source.close()
        super().close()

    def original(self, text: str) -> str | None:
        """The line in whose place ``text`` came; None if that is a line of its own."""
        line = self._broken.pop(text, None)
        return None if line is None else line.decode("utf-8", errors="backslashreplace")

    def _next(self) -> None:
        more = self._source.read(PIECE_BYTES)
        self._ended = not more
        cut = max(more.rfind(b"\n"), more.rfind(b"\r")) + 1
        if not (cut or self._ended or len(self._rest) > LONGEST):
            self._rest += more
            return
        lines = [memoryview(self._rest), memoryview(more)[:cut]]
        marks = [self._quote] if self._escape is None else [self._quote, self._escape]
        if any(mark in part for mark in marks for part in (self._rest, more)):
            lines = self._mended(lines)
        self._ready.extend(part for part in lines if part)
        self._rest = more[cut:]

    def _mended(self, parts: list[memoryview]) -> list[memoryview]:
        """Whole lines, with others in the place of broken ones."""
        whole = b"".join([b"\n", *parts, b"\n"])
        around, lines = np.frombuffer(whole, np.uint8), memoryview(whole)[1:-1]
        bytes_N = around[1:-1]
        marked = (bytes_N == self._quote) | (bytes_N == ord("\n"))
        if b"\r" in whole:
            marked |= bytes_N == ord("\r")
        places = np.flatnonzero(marked)
        is_quote = bytes_N[places] == self._quote
        quotes, at_ends = places[is_quote], np.flatnonzero(~is_quote)
        # every other quote opens, if no line leaves one open; lines are looked at one by one only if that is not so
        left_open = len(quotes) % 2 or ((at_ends - np.arange(len(at_ends))) & 1).any()
        before, after = self._edge[around[quotes[0::2]]], self._edge[around[quotes[1::2] + 2]]
        escaped = self._escape is not None and self._escape in whole
        if before.all() and after.all() and not left_open and not escaped:
            return [lines]
        mended, done, ends = [], 0, places[at_ends]
        for number in self._doubted(around, quotes, ends):
            start = int(ends[number - 1]) + 1 if number else 0
            stop = int(ends[number]) if number < len(ends) else len(lines)
            if self._whole.fullmatch(lines, start, stop) is None:
                instead = f"{MARK}{self._count}{chr(self._delimiter) * self._columns}"
                self._broken[instead] = bytes(lines[start:stop])
                mended += [lines[done:start], memoryview(instead.encode())]
                self._count, done = self._count + 1, stop
        return [*mended, lines[done:]]

    def _doubted(self, around: np.ndarray, quotes: np.ndarray, ends: np.ndarray) -> list[int]:
        """Numbers of the lines that may be broken: these and a few more.  ``around``: the bytes, a line's end before
        and after; ``quotes``, ``ends``: where these are."""
        line = np.searchsorted(ends, quotes)
        first = np.diff(line, prepend=-1) > 0
        count = np.arange(len(quotes))
        opens = (count - np.maximum.accumulate(np.where(first, count, 0))) % 2 == 0
        doubtful = ~self._edge[np.where(opens, around[quotes], around[quotes + 2])]
        doubtful |= opens & np.append(first[1:], True)  # left open at the line's end
        doubted = [line[doubtful]]
        if self._escape is not None:  # before a quote, or a line's end
            escapes = np.flatnonzero(around[1:-1] == self._escape)
            doubted.append(np.searchsorted(ends, escapes[self._edge[around[escapes + 2]]]))
        return np.unique(np.concatenate(doubted)).tolist()


def _line(delimiter: str, quote: str, escape: str) -> re.Pattern[bytes]:
    """A line of values, in quotes or without; a quote inside of one without is a character like any other."""
    any_escaped = f"|{escape}." if escape else ""
    quoted = f"{quote}(?:[^{quote}{escape}]|{quote}{quote}{any_escaped})*+{quote}"
    plain = f"(?:[^{quote}{delimiter}{escape}]{any_escaped})(?:[^{delimiter}{escape}]{any_escaped})*+"
    value = f"(?:{quoted}|{plain}|)"
    return re.compile(f"{value}(?:{delimiter}{value})*+".encode(), re.DOTALL)
