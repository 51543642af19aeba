"""Files of a store that are read in ranges: the columns and row groups that are wanted, in few requests."""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow.parquet as pq

from gr.data.stores import LARGEST_RANGE, Store

HOLE = 1 << 18
"""Bytes between two wanted ranges that are read along rather than asking twice: about what a request costs."""


class RangedFile(io.RawIOBase):
    """A file of a store, opened for reading: ranges that are fetched beforehand come from memory, others are asked for
    when they are read, ``ahead`` bytes at least.  Not for several threads at once."""

    def __init__(self, store: Store, path: str, size: int, ahead: int = 0):
        self.store, self.path, self.size, self.ahead = store, path, size, ahead
        self._starts: list[int] = []
        self._contents: list[bytes] = []
        self._position = 0

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have these ranges in memory, in place of those before: neighbours are one request."""
        wanted = list(_cut(_joined(ranges)))
        self._contents = self.store.ranges(self.path, wanted)
        self._starts = [start for start, _ in wanted]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        )
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start = self._position
        stop = self.size if size is None or size < 0 else min(start + size, self.size)
        parts = []
        while self._position < stop:
            parts.append(self._some(stop))
            self._position += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self.read()

    def _some(self, stop: int) -> bytes:
        """Bytes from the position on, up to ``stop``."""
        start = self._position
        at = bisect.bisect_right(self._starts, start) - 1
        if at >= 0 and start < self._starts[at] + len(self._contents[at]):
            first = self._starts[at]
            return self._contents[at][start - first : stop - first]
        end = min(max(stop, start + self.ahead), self.size)
        if not self.ahead:
            after = self._starts[at + 1] if at + 1 < len(self._starts) else end
            return self.store.ranges(self.path, [(start, min(end, after))])[0]
        self.fetch([(start, end)])
        return self._contents[0][: stop - start]


def column_ranges(
    footer: pq.FileMetaData, row_groups: Iterable[int], columns: Iterable[str]
) -> list[tuple[int, int]]:
    """Where the bytes of ``columns`` are in the row groups of a Parquet file."""
    names = tuple(columns)
    ranges = []
    for number in row_groups:
        group = footer.row_group(number)
        for n in range(group.num_columns):
            chunk = group.column(n)
            if any(chunk.path_in_schema == c or chunk.path_in_schema.startswith(f"{c}.") for c in names):
                start = chunk.data_page_offset
                if chunk.dictionary_page_offset:
                    start = min(start, chunk.dictionary_page_offset)
                ranges.append((start, start + chunk.total_compressed_size))
    return ranges


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, with neighbours that are close in one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= HOLE:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _cut(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, stop in ranges:
        for first in range(start, stop, LARGEST_RANGE):
            yield first, min(first + LARGEST_RANGE, stop)
