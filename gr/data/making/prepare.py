"""Action log -> sequence dataset, in one process and bounded memory.

1. The log is read in chunks, checked, and cut by the high bits of hash64(user) into partitions on disk.
2. Each partition is sorted by (user, time, original order); where a policy needs it, repeats are dropped and users
   and items counted.
3. Items are numbered in the order of their raw ids, and the partitions are written one after the other: since users
   are stored in the order of their hash, that is the dataset's order.

Memory: a chunk, one partition (``memory_mb``; a single user's actions are cut by nothing but ``max_user_actions``) and
tables of the distinct items; it does not grow with the number of actions.  Disk: the partitions take
about 20 bytes an action with integer ids, beside OUT or in ``scratch``, until the dataset is complete.  The result does
not depend on the chunk size, the number of partitions, or how the log is cut into files.

Shapes: R users of a partition, A their actions, I items.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from gr.data.dataset import BLOCK_ROWS, DatasetWriter, SequenceDataset
from gr.data.making import huge
from gr.data.making.described import join
from gr.data.making.ids import IdCodes, numbering
from gr.data.making.partitions import (
    Grouped,
    PartitionStore,
    choose_bits,
    duplicates,
    group,
    grouped_before,
)
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import Preparation
from gr.data.making.stages import Counts, StageCount
from gr.data.sequences import Sequences
from gr.errors import UserError
from gr.progress import Progress

# working bytes of a partition's action while it is sorted and written, measured (benchmarks/data/prepare.py)
ROW_BYTES, TEXT_BYTES, FIELD_BYTES = 120, 80, 32


Described = Callable[[bool], pa.Table]
"""integer_ids -> the items that a catalogue describes: ``item_id`` (int64 or string) and further columns."""


class Actions(Protocol):
    """A log as preparing sees it: :class:`gr.data.making.log.LogReader`, or a source with a format of its own."""

    rows_read: int
    estimated_rows: int

    @property
    def has_times(self) -> bool: ...

    @property
    def ticks_per_second(self) -> int: ...

    def tables(self, chunk_rows: int, quarantine: Quarantine) -> Iterator[pa.Table]:
        """Checked tables (see gr.data.making.log) in the log's order."""

    def remarks(self) -> list[str]:
        """What to tell the user and was not told before: asked for before and after reading."""

    def facts(self) -> dict[str, Any]:
        """How the log was read, for the manifest: asked for after reading."""


def prepare(
    actions: Actions,
    out: str | Path,
    name: str,
    options: Preparation,
    *,
    described: Described | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: dict[str, Any] | None = None,
) -> SequenceDataset:
    """Write the sequence dataset ``out``.

    The manifest's provenance carries ``stages``, the counts left by each stage, and ``quarantined``, the reasons.
    Raises UserError: bad rows (policy ``fail``), nothing left, ``out`` exists.
    """
    check_options(actions, options, described)
    writer = DatasetWriter(out, name, overwrite=overwrite)
    return Work(actions, writer, options, described, progress or Progress()).done(provenance or {})


def check_options(actions: Actions, options: Preparation, described: Described | None) -> None:
    """Refuse policies that this log, or what is known of its items, has nothing for."""
    if options.duplicates == "drop_exact" and not actions.has_times:
        raise UserError(
            "duplicates=drop_exact compares times, and this log has none: map columns.time, or keep them"
        )
    if options.items == "listed" and described is None:
        raise UserError("items=listed needs a catalogue: name its file in the schema, or say items=seen")


class Work:
    """One preparation: its stages in the order of ``run``."""

    def __init__(
        self,
        actions: Actions,
        writer: DatasetWriter,
        options: Preparation,
        described: Described | None,
        progress: Progress,
    ):
        out = writer.path
        self.actions, self.out, self.options, self.progress = actions, out, options, progress
        self.described_by, self.writer = described, writer
        scratch = Path(options.scratch) if options.scratch else out.parent
        scratch.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.preparing-", dir=scratch))
        self.quarantine = Quarantine(
            self.scratch / "quarantine" if options.on_bad_rows == "quarantine" else None
        )
        self.items, self.types = IdCodes(), IdCodes()
        self.store: PartitionStore | None = None
        self.partition: int | None = None  # the last one that was begun
        self.sorted = False
        self.capped = options.max_user_actions is None
        self.capped_users = self.capped_actions = 0
        self.counts = Counts()
        self.written_users = self.written_actions = 0

    def done(self, provenance: dict[str, Any]) -> SequenceDataset:
        """The dataset, or a UserError and nothing written."""
        try:
            try:
                return self.run(provenance)
            except MemoryError:
                pass  # the frames that hold the memory must go before the sentence can be made
            if self.partition is None or self.store is None:
                raise huge.out_of_memory_reading(self.out, self.options.chunk_rows)
            raise huge.out_of_memory(
                self.out, self.store, self.partition, self.row_bytes, self.options.memory_mb
            )
        except BaseException:
            self.writer.abandon()
            raise
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def run(self, provenance: dict[str, Any]) -> SequenceDataset:
        self.say()
        self.cut()
        self.say()
        assert self.store is not None
        if self.options.max_user_actions is None:
            for remark in huge.who_is_huge(self.store, self.row_bytes, self.options.memory_mb):
                self.progress.note(remark)
        described = self.describe()
        kept = self.apply_policies()
        if described is not None and self.options.items == "listed":
            kept[self.listed] = True
        rows, ids = numbering(self.items, kept)
        counts = self.write(rows, len(ids))
        catalogue, unlisted = join(ids, pa.array(counts), described)
        if self.capped_users:
            self.progress.note(
                f"max_user_actions {self.options.max_user_actions}: {self.capped_users:,} users had more, of whom "
                f"{self.capped_actions:,} earlier actions were left out"
            )
        if unlisted:
            self.progress.note(
                f"{unlisted:,} of {len(ids):,} items are not in the catalogue: their columns are null"
            )
        dataset = self.writer.finish(
            catalogue,
            {
                **provenance,
                **self.actions.facts(),
                "stages": [asdict(s) for s in self.stages(len(ids))],
                "quarantined": dict(sorted(self.quarantine.reasons.items())),
                "items_not_described": unlisted,
                **(
                    {"capped": {"users": self.capped_users, "actions": self.capped_actions}}
                    if self.options.max_user_actions is not None
                    else {}
                ),
            },
        )
        self.quarantine.publish(self.out / "quarantine")
        return dataset

    def say(self) -> None:
        for remark in self.actions.remarks():
            self.progress.note(remark)

    def cut(self) -> None:
        """Read the log into partitions; items and action types become codes."""
        options, self.rows, store = self.options, 0, None
        with self.progress.stage("reading", self.actions.estimated_rows) as stage:
            for table in _chunks(
                self.actions.tables(options.chunk_rows, self.quarantine), options.chunk_rows
            ):
                if store is None:
                    bits = choose_bits(
                        self.actions.estimated_rows,
                        _row_bytes(table.schema),
                        options.memory_mb,
                        options.partitions,
                    )
                    self.row_bytes = _row_bytes(table.schema)
                    store = self.store = PartitionStore(self.scratch / "partitions", bits)
                coded = {"user": table["user"], "item": self.items.codes(table["item"].combine_chunks())}
                for column in table.column_names:
                    if column == "action_type":
                        coded[column] = self.types.codes(table[column].combine_chunks())
                    elif column not in coded:
                        coded[column] = table[column]
                store.add(pa.table(coded))
                self.rows += table.num_rows
                stage.advance(table.num_rows)
        self.quarantine.close()
        if store is None:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.quarantine.reasons.items())
            raise UserError(
                f"the log for '{self.out}' has no valid action ({reasons or 'it is empty'}): "
                "check the source and the schema"
            )
        store.close()

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
        """Sort, drop repeats, count; leaves the minimum counts' verdict and returns the items kept (codes, bool)."""
        filter, items = self.options.filter, len(self.items)
        self.item_alive = np.ones(items, dtype=bool)
        self.user_minimum = filter.min_user_count
        counted = filter.min_item_count > 1 or filter.min_user_count > 1
        if self.options.duplicates == "keep" and not counted and self.capped:
            return np.arange(items) < self.seen  # the codes of listed items that nobody touched come after
        counts = np.zeros(items, dtype=np.int64)
        with self.progress.stage("counting", self.rows) as stage:
            for partition, grouped in self.partitions(stage):
                self.count_read(grouped)
                if self.options.duplicates == "drop_exact":
                    grouped = grouped.filter(~duplicates(grouped))
                    self.counts.add("duplicates dropped", grouped, items)
                counts += np.bincount(grouped.items_A, minlength=items)
                assert self.store is not None
                self.store.replace(partition, grouped.table())
        self.sorted = self.capped = True
        self.item_alive = counts >= filter.min_item_count
        if filter.mode == "core":
            self.peel()
        counts = np.zeros(items, dtype=np.int64)
        with self.progress.stage("filtering", int(self.rows)) as stage:
            for _, grouped in self.partitions(stage):
                counts += np.bincount(self.minimum_counts(grouped).items_A, minlength=items)
        return counts > 0

    def peel(self) -> None:
        """k-core: take items and users below their minimum away until none is.  Users have no table: whether one
        stays follows from the items that stay."""
        items, alive = len(self.items), -1
        while alive != (alive := int(self.item_alive.sum())):
            counts = np.zeros(items, dtype=np.int64)
            with self.progress.stage(f"core of {alive:,} items", self.rows) as stage:
                for _, grouped in self.partitions(stage):
                    counts += np.bincount(self.minimum_counts(grouped).items_A, minlength=items)
            self.item_alive &= counts >= self.options.filter.min_item_count

    def minimum_counts(self, grouped: Grouped) -> Grouped:
        """Drop rare items, and users with few actions: counted before that (once) or after it (core)."""
        kept = grouped
        if not self.item_alive.all():
            kept = grouped.filter(self.item_alive[grouped.items_A])
        counted = grouped if self.options.filter.mode == "once" else kept
        enough = (counted.lengths_R >= self.user_minimum) & (kept.lengths_R > 0)
        return kept if enough.all() else kept.filter_users(enough)

    def write(self, rows: np.ndarray, items: int) -> np.ndarray:
        """Write the sequences; ``rows``: item code -> row.  Returns the actions of each item (I)."""
        names, type_codes = self.action_types()
        self.writer.action_type_names = names
        counts = np.zeros(items, dtype=np.int64)
        filtered = self.options.filter != type(self.options.filter)()
        with self.progress.stage("writing", self.rows) as stage:
            for _, grouped in self.partitions(stage):
                if not self.sorted:
                    self.count_read(grouped)
                if filtered:
                    grouped = self.minimum_counts(grouped)
                    self.counts.add("minimum counts", grouped, len(self.items))
                    grouped = grouped.filter_users(grouped.lengths_R >= self.options.filter.min_length)
                    self.counts.add("minimum length", grouped, len(self.items))
                items_A = rows[grouped.items_A]
                self.written_users += len(grouped.users_R)
                self.written_actions += len(items_A)
                counts += np.bincount(items_A, minlength=items)
                for block in blocks_of(self.sequences(grouped, items_A, type_codes)):
                    self.writer.add(block)
        return counts

    def sequences(self, grouped: Grouped, items_A: np.ndarray, type_codes: np.ndarray) -> Sequences:
        columns = {name.removeprefix("field."): _numpy(column) for name, column in grouped.columns.items()}
        times, types = columns.pop("time", None), columns.pop("action_type", None)
        columns["item"] = items_A
        return Sequences.of(
            _numpy(grouped.users_R),
            grouped.offsets_R1,
            time=None if times is None else times // self.actions.ticks_per_second,
            type=None if types is None else type_codes[types],
            **columns,
        )

    def action_types(self) -> tuple[list[str], np.ndarray]:
        """Names in the order of the raw values, and code -> position in it."""
        if not len(self.types):
            return [], np.zeros(0, dtype=np.int32)
        positions, names = numbering(self.types, np.ones(len(self.types), dtype=bool))
        return [str(n) for n in names.to_pylist()], positions

    def partitions(self, stage) -> Iterator[tuple[int, Grouped]]:
        """The partitions that hold actions, sorted; ``stage`` advances by what was read."""
        assert self.store is not None
        for partition in range(self.store.partitions):
            self.partition, rows = partition, int(self.store.rows[partition])
            table = self.store.read(partition) if self.capped else self.cap(partition)
            if table is not None and table.num_rows:
                grouped = (grouped_before if self.sorted else group)(table)
                del table  # not held while the partition is worked on
                yield partition, grouped
                stage.advance(rows)

    def cap(self, partition: int) -> pa.Table | None:
        """The partition's actions without those before the last ``max_user_actions`` of their user."""
        assert self.store is not None and self.options.max_user_actions is not None
        capped, read = huge.Capped(self.options.max_user_actions), 0
        for piece in self.store.pieces(partition):
            self.counts.add_read(piece, len(self.items))
            read += piece.num_rows
            capped.add(piece)
        table = capped.table()
        self.capped_users += len(capped.users)
        self.capped_actions += read - (table.num_rows if table is not None else 0)
        return table

    def count_read(self, grouped: Grouped) -> None:
        """Counts of what was read, or, where that was counted before it was capped, of what the cap left."""
        if self.capped:
            self.counts.add("read", grouped, len(self.items))
        else:
            self.counts.add_users(len(grouped.users_R))
            self.counts.add("latest of each user", grouped, len(self.items))

    def stages(self, items: int) -> list[StageCount]:
        """The table of counts by stage."""
        rows = [StageCount("rows of the log", self.actions.rows_read)]
        if self.quarantine.rows:
            rows.append(StageCount("quarantined", self.actions.rows_read - self.quarantine.rows))
        return [
            *rows,
            *self.counts.rows(),
            StageCount("dataset", self.written_actions, self.written_users, items),
        ]


def _chunks(tables: Iterator[pa.Table], chunk_rows: int) -> Iterator[pa.Table]:
    """Small tables joined to about ``chunk_rows`` rows: the cost of a chunk is not paid for every small file."""
    pending: list[pa.Table] = []
    rows = 0
    for table in tables:
        pending.append(table)
        rows += table.num_rows
        if rows >= chunk_rows:
            yield pa.concat_tables(pending).combine_chunks()
            pending, rows = [], 0
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def blocks_of(rows: Sequences) -> Iterator[Sequences]:
    """Consecutive parts of at most a block's rows, without copies: the writer joins only what it needs."""
    for first in range(0, len(rows), BLOCK_ROWS):
        yield rows.slice(first, min(first + BLOCK_ROWS, len(rows)))


def _row_bytes(schema: pa.Schema) -> int:
    text = sum(pa.types.is_string(field.type) for field in schema)
    return (
        ROW_BYTES + TEXT_BYTES * text + FIELD_BYTES * sum(name.startswith("field.") for name in schema.names)
    )


def _numpy(column: pa.Array) -> np.ndarray:
    """int64 or float64 as they are, text as an array of str objects."""
    return column.to_numpy(zero_copy_only=False)
