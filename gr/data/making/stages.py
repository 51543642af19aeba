"""What each stage of preparing left: actions, users, items."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from gr.data.making.partitions import Grouped


@dataclass(frozen=True)
class StageCount:
    """What is left after a stage."""

    stage: str
    actions: int
    users: int | None = None
    items: int | None = None


@dataclass
class Counts:
    """Sums over the partitions: what each policy left."""

    stages: dict[str, list[int]] = field(default_factory=dict)
    item_counts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, stage: str, grouped: Grouped, items: int) -> None:
        lengths = grouped.lengths_R
        sums = self.stages.setdefault(stage, [0, 0])
        sums[0] += int(lengths.sum())
        sums[1] += int((lengths > 0).sum())
        counts = self.item_counts.setdefault(stage, np.zeros(items, dtype=np.int64))
        counts += np.bincount(grouped.items_A, minlength=items)

    def add_read(self, table: pa.Table, items: int) -> None:
        """Part of what was read; its users are counted by :meth:`add_users`."""
        sums = self.stages.setdefault("read", [0, 0])
        sums[0] += table.num_rows
        counts = self.item_counts.setdefault("read", np.zeros(items, dtype=np.int64))
        counts += np.bincount(table["item"].to_numpy(), minlength=items)

    def add_users(self, users: int) -> None:
        self.stages["read"][1] += users

    def merge(self, stages: dict[str, list[int]], item_counts: dict[str, np.ndarray]) -> None:
        """Take in the sums over other partitions."""
        for stage, more in stages.items():
            sums = self.stages.setdefault(stage, [0, 0])
            sums[0] += more[0]
            sums[1] += more[1]
        for stage, counts in item_counts.items():
            if stage not in self.item_counts:
                self.item_counts[stage] = np.zeros(len(counts), dtype=np.int64)
            self.item_counts[stage] += counts

    def rows(self) -> list[StageCount]:
        return [
            StageCount(stage, actions, users, int((self.item_counts[stage] > 0).sum()))
            for stage, (actions, users) in self.stages.items()
        ]
