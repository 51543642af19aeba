"""Action log -> sequence dataset, in bounded memory, in this process or on a Ray cluster.

1. The log is read in chunks, checked, and cut by the high bits of hash64(user) into partitions on disk.
2. Each partition is sorted by (user, time, original order); where a policy needs it, repeats are dropped and users
   and items counted.
3. Items are numbered in the order of their raw ids, and the partitions are written one after the other: since users
   are stored in the order of their hash, that is the dataset's order.

What is done with a partition, and in which order, stands here and in gr/data/making/passes.py; who does it is an
executor: gr/data/making/in_process.py or gr/data/making/on_ray.py.

Memory: a chunk, one partition (``memory_mb``; a single user's actions are cut by nothing but ``max_user_actions``) and
tables of the distinct items, in each process; it does not grow with the number of actions.  Disk: the partitions take
about 20 bytes an action with integer ids, beside OUT or in ``scratch``, until the dataset is complete.  The result does
not depend on the executor, the chunk size, the number of partitions, or how the log is cut into files.

Shapes: C codes of items, I rows of the catalogue.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from gr.data.dataset import SequenceDataset
from gr.data.making import huge
from gr.data.making.described import join
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.executor import Actions, Executor, saying_no_space
from gr.data.making.ids import numbering
from gr.data.making.in_process import InProcess
from gr.data.making.partitions import row_bytes
from gr.data.making.passes import Counting, Found, Sorting, Writing
from gr.data.making.schema import Preparation
from gr.data.making.stages import Counts, StageCount
from gr.data.making.user_fields import UserFields
from gr.data.writing import DatasetWriter, check_output
from gr.errors import UserError
from gr.progress import Progress

Described = Callable[[bool], pa.Table]
"""integer_ids -> the items that a catalogue describes: ``item_id`` (int64 or string) and further columns; or likewise
users: ``user_id``."""


def prepare(
    actions: Actions,
    out: str | os.PathLike,
    name: str,
    options: Preparation,
    *,
    described: Described | None = None,
    described_users: Described | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: dict[str, Any] | None = None,
    engine: Engine = IN_PROCESS,
) -> SequenceDataset:
    """Write the sequence dataset ``out``.  described: of the items; described_users: of the users, each of the log's.

    The manifest's provenance carries ``stages``, the counts left by each stage, and ``quarantined``, the reasons.
    Raises UserError: bad rows (policy ``fail``), nothing left, ``out`` exists, a full disk.
    """
    out, progress = os.fspath(out), progress or Progress()
    check_options(actions, options, described)
    check_output(out, overwrite)
    with saying_no_space(out), executor(engine, actions, out, options, progress) as work:
        of_users = None
        if described_users is not None:
            integer = pa.types.is_integer(actions.table_schema.field("user").type)
            of_users = UserFields.of_table(described_users(integer), actions.table_schema.names)
        writer = DatasetWriter(out, name, overwrite=overwrite, scratch=work.dataset)
        todo = Work(work, actions, out, options, described, progress, writer, of_users)
        return todo.done(provenance or {})


def check_options(actions: Actions, options: Preparation, described: Described | None) -> None:
    """Refuse policies that this log, or what is known of its items, has nothing for."""
    if options.duplicates == "drop_exact" and not actions.has_times:
        raise UserError(
            "duplicates=drop_exact compares times, and this log has none: map columns.time, or keep them"
        )
    if options.items == "listed" and described is None:
        raise UserError("items=listed needs a catalogue: name its file in the schema, or say items=seen")


def executor(
    engine: Engine, actions: Actions, out: str, options: Preparation, progress: Progress
) -> Executor:
    """Who does the work."""
    if engine.name == "process":
        return InProcess(actions, out, options, progress)
    from gr.data.making.on_ray import OnRay

    return OnRay(actions, out, options, progress, engine.address, engine.tasks)


class Work:
    """One preparation: its stages in the order of ``run``."""

    def __init__(
        self,
        executor: Executor,
        actions: Actions,
        out: str,
        options: Preparation,
        described: Described | None,
        progress: Progress,
        writer: DatasetWriter,
        of_users: UserFields | None = None,
    ):
        self.executor, self.actions, self.out, self.options = executor, actions, out, options
        self.described_by, self.progress, self.writer = described, progress, writer
        self.raw = True  # whether the partitions are as they were read
        self.alive_C: np.ndarray | None = None
        self.counts = Counts()
        self.capped_users = self.capped_actions = 0
        self.of_users = of_users

    def done(self, provenance: dict[str, Any]) -> SequenceDataset:
        """The dataset, or a UserError and nothing written."""
        try:
            return self.run(provenance)
        except MemoryError:
            pass  # the frames that hold the memory must go before the sentence can be made
        except BaseException:
            self.writer.abandon()
            raise
        self.writer.abandon()
        raise self.executor.out_of_memory()

    def run(self, provenance: dict[str, Any]) -> SequenceDataset:
        options = self.options
        self.say()
        self.read()
        self.say()
        if options.max_user_actions is None:
            bytes = row_bytes(self.actions.table_schema)
            for remark in huge.who_is_huge(self.executor.store, bytes, options.memory_mb):
                self.progress.note(remark)
        described = self.describe()
        kept = self.apply_policies()
        if described is not None and options.items == "listed":
            kept[self.listed] = True
        rows_C, ids = numbering(self.items, kept)
        written = self.write(rows_C, len(ids))
        catalogue, unlisted = join(ids, pa.array(written.items_C), described)
        if self.capped_users:
            self.progress.note(
                f"max_user_actions {options.max_user_actions}: {self.capped_users:,} users had more, of whom "
                f"{self.capped_actions:,} earlier actions were left out"
            )
        self.say_undescribed(unlisted, len(ids))
        quarantine = self.executor.quarantine
        quarantine.publish(self.writer.scratch / "quarantine")
        return self.writer.finish(
            catalogue,
            {
                **provenance,
                **self.actions.facts(),
                "stages": [asdict(s) for s in self.stages(written, len(ids))],
                "quarantined": dict(sorted(quarantine.reasons.items())),
                "items_not_described": unlisted,
                **(
                    {"capped": {"users": self.capped_users, "actions": self.capped_actions}}
                    if options.max_user_actions is not None
                    else {}
                ),
            },
        )

    def say_undescribed(self, items: int, of: int) -> None:
        if items:
            self.progress.note(f"{items:,} of {of:,} items are not in the catalogue: their columns are null")

    def say(self) -> None:
        for remark in self.actions.remarks():
            self.progress.note(remark)

    def read(self) -> None:
        """Read the log into partitions; items and action types become codes."""
        with self.progress.stage("reading", self.actions.estimated_rows) as stage:
            self.items, self.types = self.executor.read(stage)
        if not self.executor.store.rows.sum():
            reasons = self.executor.quarantine.reasons
            shown = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
            raise UserError(
                f"the log for '{self.out}' has no valid action ({shown or 'it is empty'}): "
                "check the source and the schema"
            )

    def describe(self) -> pa.Table | None:
        """The catalogue that was given; listed items get codes too."""
        self.seen = len(self.items)
        if self.described_by is None:
            return None
        assert self.items.ids is not None
        described = self.described_by(pa.types.is_integer(self.items.ids.type))
        if self.options.items == "listed":
            self.listed = self.items.codes(described["item_id"].combine_chunks())
        return described

    def apply_policies(self) -> np.ndarray:
        """Sort, drop repeats, count; leaves the minimum counts' verdict and returns the items kept (C, bool)."""
        options, filter = self.options, self.options.filter
        counted = filter.min_item_count > 1 or filter.min_user_count > 1
        if options.duplicates == "keep" and not counted and options.max_user_actions is None:
            # the codes of listed items that nobody touched come after
            return np.arange(len(self.items)) < self.seen
        found = self.go("counting", Sorting)
        self.raw = False
        self.alive_C = found.items_C >= filter.min_item_count
        if filter.mode == "core":
            self.peel()
        return self.go("filtering", Counting).items_C > 0

    def peel(self) -> None:
        """k-core: take items and users below their minimum away until none is.  Users have no table: whether one
        stays follows from the items that stay."""
        assert self.alive_C is not None
        alive = -1
        while alive != (alive := int(self.alive_C.sum())):
            found = self.go(f"core of {alive:,} items", Counting)
            self.alive_C &= found.items_C >= self.options.filter.min_item_count

    def go(self, name: str, kind: type[Sorting] | type[Counting]) -> Found:
        step = kind(self.options, len(self.items), self.raw, self.alive_C)
        found = self.executor.go(name, step, Found.nothing(len(self.items)))
        self.take(found)
        return found

    def write(self, rows_C: np.ndarray, items: int) -> Found:
        """Write the sequences; ``rows_C``: item code -> row."""
        names, types = self.action_types()
        self.writer.action_type_names = names
        step = Writing(
            self.options,
            len(self.items),
            self.raw,
            self.alive_C,
            rows_C=rows_C,
            types=types,
            catalogue=items,
            ticks_per_second=self.actions.ticks_per_second,
            of_users=self.of_users,
        )
        found = self.executor.write(step, Found.nothing(items), self.writer)
        self.take(found)
        return found

    def take(self, found: Found) -> None:
        self.counts.merge(found.counts.stages, found.counts.item_counts)
        self.capped_users += found.capped_users
        self.capped_actions += found.capped_actions

    def action_types(self) -> tuple[list[str], np.ndarray]:
        """Names in the order of the raw values, and code -> position in it."""
        if not len(self.types):
            return [], np.zeros(0, dtype=np.int32)
        positions, names = numbering(self.types, np.ones(len(self.types), dtype=bool))
        return [str(n) for n in names.to_pylist()], positions

    def stages(self, written: Found, items: int) -> list[StageCount]:
        """The table of counts by stage."""
        rows = [StageCount("rows of the log", self.actions.rows_read)]
        if bad := self.executor.quarantine.rows:
            rows.append(StageCount("quarantined", self.actions.rows_read - bad))
        return [
            *rows,
            *self.counts.rows(),
            StageCount("dataset", written.actions, written.users, items),
        ]
