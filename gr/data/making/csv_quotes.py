"""Quotes of CSV: a line that doesn't close what it opens would swallow the lines after it without a word."""

from __future__ import annotations

import io
import re

import numpy as np
import pyarrow as pa

PIECE_BYTES = 2**20
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
        self._broken: dict[int, bytes] = {}
        self._count = 0
        self._rest = self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        parts, missing = [], float("inf") if size is None or size < 0 else size
        while missing > 0 and (self._ready or not self._ended):
            if not self._ready:
                self._next()
                continue
            part = self._ready if len(self._ready) <= missing else self._ready[: int(missing)]
            self._ready = self._ready[len(part) :]
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._source.close()
        super().close()

    def original(self, text: str) -> str | None:
        """The line in whose place ``text`` came; None if that is a line of its own."""
        if not text.startswith(MARK):
            return None
        number = int(text[1:].partition(chr(self._delimiter))[0])
        return self._broken.pop(number).decode("utf-8", errors="backslashreplace")

    def _next(self) -> None:
        more = self._source.read(PIECE_BYTES)
        self._ended = not more
        content = self._rest + more
        cut = len(content) if self._ended else max(content.rfind(b"\n"), content.rfind(b"\r")) + 1
        self._rest = content[cut:]
        self._ready = self._mended(content[:cut])

    def _mended(self, lines: bytes) -> bytes:
        if self._quote not in lines and (self._escape is None or self._escape not in lines):
            return lines
        around = np.frombuffer(b"\n" + lines + b"\n", np.uint8)
        bytes_N = around[1:-1]
        quotes = np.flatnonzero(bytes_N == self._quote)
        ends = np.flatnonzero((bytes_N == ord("\n")) | (bytes_N == ord("\r")))
        escaped = self._escape is not None and self._escape in lines
        # every other quote opens, if no line leaves one open; lines are looked at one by one only if that is not so
        open_at_end = (np.searchsorted(quotes, np.append(ends, len(lines))) & 1).any()
        before, after = self._edge[around[quotes[0::2]]], self._edge[around[quotes[1::2] + 2]]
        if before.all() and after.all() and not open_at_end and not escaped:
            return lines
        doubted = self._doubted(around, quotes, ends)
        parts, done = [], 0
        for number in doubted:
            start = int(ends[number - 1]) + 1 if number else 0
            stop = int(ends[number]) if number < len(ends) else len(lines)
            if self._whole.fullmatch(lines, start, stop) is None:
                self._broken[self._count] = lines[start:stop]
                parts += [lines[done:start], f"{MARK}{self._count}".encode()]
                parts.append(bytes([self._delimiter]) * self._columns)
                self._count, done = self._count + 1, stop
        return b"".join([*parts, lines[done:]]) if parts else lines

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
