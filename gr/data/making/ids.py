"""IdCodes: raw ids numbered as they come, chunk by chunk, and their canonical order.

Memory: the distinct ids, and a table of them: by their values, of integers that lie close together, else a hash table
while a chunk is looked up.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.making.partitions import MOST_TEXT
from gr.errors import UserError

CLOSE, FEW = 8, 2**20
"""Integers lie close together where they span no more than so many values each, or so many in all."""


class IdCodes:
    """Codes 0, 1, ... of raw ids (int64 or string) in order of first appearance."""

    def __init__(self, what: str = "item") -> None:
        self.what = what
        self.ids: pa.Array | None = None
        self._table: _Table | None = None

    def __len__(self) -> int:
        return 0 if self.ids is None else len(self.ids)

    def codes(self, column: pa.Array) -> np.ndarray:
        """int32 codes (n) of the ids in ``column`` (n, no nulls); new ones get the next codes."""
        if (table := self._table_for(column)) is not None:
            return self._looked_up(column, table)
        encoded = column.dictionary_encode()
        local = self._distinct(encoded.dictionary)
        return local[encoded.indices.to_numpy()]

    def add(self, parts: list[pa.Array]) -> None:
        """Number ids that are not to be looked up."""
        if parts:
            known = [] if self.ids is None else [self.ids]
            self.ids = pc.unique(joined([*known, *parts], self.what))

    def _looked_up(self, column: pa.Array, table: _Table) -> np.ndarray:
        places = column.to_numpy() - table.low
        codes = table.codes[places]
        if (new := codes < 0).any():
            ids = column.filter(pa.array(new)).unique()
            table.put(ids)
            self.ids = ids if self.ids is None else joined([self.ids, ids], self.what)
            codes = table.codes[places]
        return codes

    def _table_for(self, column: pa.Array) -> _Table | None:
        """A table with the ids that are known and room for those of ``column``; None where they are no integers that
        lie close together."""
        if not pa.types.is_integer(column.type) or not len(column):
            return None
        ends = [pc.min_max(ids) for ids in (column, self.ids) if ids is not None and len(ids)]
        low, high = min(e["min"].as_py() for e in ends), max(e["max"].as_py() for e in ends)
        if high - low >= max(CLOSE * len(self), FEW):
            self._table = None
        elif self._table is None or self._table.count != len(self) or not self._table.covers(low, high):
            self._table = _Table(low, high)
            if self.ids is not None:
                self._table.put(self.ids)
        return self._table

    def _distinct(self, distinct: pa.Array) -> np.ndarray:
        if self.ids is None:
            self.ids = distinct
            return np.arange(len(distinct), dtype=np.int32)
        found = pc.index_in(distinct, value_set=self.ids)
        if found.null_count == 0:
            return found.to_numpy()
        new = found.is_null()
        codes = pc.fill_null(found, -1).to_numpy().copy()
        is_new = new.to_numpy(zero_copy_only=False)
        codes[is_new] = np.arange(len(self.ids), len(self.ids) + int(is_new.sum()))
        self.ids = joined([self.ids, distinct.filter(new)], self.what)
        return codes

    def order(self) -> np.ndarray:
        """Codes sorted by raw id: integers numerically, strings by their UTF-8 bytes."""
        assert self.ids is not None
        return pc.sort_indices(self.ids).to_numpy().astype(np.int64)


class _Table:
    """Codes of integers by their values from ``low`` to ``high``; -1 for what has none."""

    def __init__(self, low: int, high: int):
        self.low, self.high, self.count = low, high, 0
        self.codes = np.full(high - low + 1, -1, np.int32)

    def covers(self, low: int, high: int) -> bool:
        return self.low <= low and high <= self.high

    def put(self, ids: pa.Array) -> None:
        """Give the next codes to ids that have none."""
        stop = self.count + len(ids)
        self.codes[ids.to_numpy() - self.low] = np.arange(self.count, stop, dtype=np.int32)
        self.count = stop


def joined(parts: list[pa.Array], what: str) -> pa.Array:
    """The ids one after the other; a UserError where they are more text than one array holds."""
    if pa.types.is_string(parts[0].type):
        size = sum(pc.sum(pc.binary_length(part)).as_py() or 0 for part in parts)
        if size > MOST_TEXT:
            raise UserError(
                f"the distinct {what} ids have {size:,} bytes of text, and {MOST_TEXT:,} is the most that is numbered: "
                "write shorter ids, or integers"
            )
    return pa.concat_arrays(parts)


def union(parts: Iterable[pa.Array], what: str = "item") -> IdCodes:
    """Codes of all ids of ``parts``, each of which holds an id once, in the order of first appearance.  What was
    gathered is gone through again whenever it has doubled: the work follows the sizes of the parts."""
    codes, pending, size = IdCodes(what), [], 0
    for part in parts:
        pending.append(part)
        size += len(part)
        if size > len(codes):
            codes.add(pending)
            pending, size = [], 0
    codes.add(pending)
    return codes


def numbering(codes: IdCodes, kept: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """Rows for the kept codes, in the order of raw ids: (codes -> int32 row, -1 where not kept) and the ids by row."""
    assert codes.ids is not None
    order = codes.order()
    order = order[kept[order]]
    rows = np.full(len(codes), -1, dtype=np.int32)
    rows[order] = np.arange(len(order), dtype=np.int32)
    return rows, codes.ids.take(pa.array(order))
