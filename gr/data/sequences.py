"""Sequences: rows of a sequence dataset in memory, jagged numpy columns.

Shapes: R rows (users), A actions of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Sequences:
    """R users' whole sequences, each in time order.

    users_R: raw user ids (int64 or str objects).  ordinals_R: int64, rows' numbers in the dataset's order.
    offsets_R1: int64.  items_A: int32 catalogue rows.
    timestamps_A: int64 seconds or None.  action_types_A: int32 codes or None.  values_A: float32 or None.
    fields_A: extra per-action columns by name.
    """

    users_R: np.ndarray
    ordinals_R: np.ndarray
    offsets_R1: np.ndarray
    items_A: np.ndarray
    timestamps_A: np.ndarray | None = None
    action_types_A: np.ndarray | None = None
    values_A: np.ndarray | None = None
    fields_A: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.users_R)

    @property
    def lengths_R(self) -> np.ndarray:
        return np.diff(self.offsets_R1)

    def take(self, rows: np.ndarray, first: np.ndarray | None = None, stop: np.ndarray | None = None) -> Sequences:
        """The given rows, each cut to its actions ``first[i]:stop[i]`` (counted within the sequence)."""
        base = self.offsets_R1[rows]
        begin = base if first is None else base + first
        end = self.offsets_R1[rows + 1] if stop is None else base + stop
        lengths = np.maximum(end - begin, 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # action j of the result's row i comes from begin[i] + j: one arange, shifted row by row
        source = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)

        def pick(column):
            return None if column is None else column[source]

        return Sequences(
            users_R=self.users_R[rows],
            ordinals_R=self.ordinals_R[rows],
            offsets_R1=offsets,
            items_A=self.items_A[source],
            timestamps_A=pick(self.timestamps_A),
            action_types_A=pick(self.action_types_A),
            values_A=pick(self.values_A),
            fields_A=None if self.fields_A is None else {k: v[source] for k, v in self.fields_A.items()},
        )

    @staticmethod
    def concatenate(parts: Iterable[Sequences]) -> Sequences:
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]

        def join(name):
            columns = [getattr(p, name) for p in parts]
            return None if columns[0] is None else np.concatenate(columns)

        lengths = np.concatenate([p.lengths_R for p in parts])
        joined = {name: join(name) for name in ("users_R", "ordinals_R", "items_A", "timestamps_A")}
        extra = parts[0].fields_A
        fields = None if extra is None else {k: np.concatenate([(p.fields_A or {})[k] for p in parts]) for k in extra}
        return replace(
            parts[0],
            **joined,
            offsets_R1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            action_types_A=join("action_types_A"),
            values_A=join("values_A"),
            fields_A=fields,
        )
