"""What the tasks of a preparation on a Ray cluster do: steps, which are sent to the workers once a stage.

Shapes: J parts of the log, P partitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gr.data.blocks import BlockWriter
from gr.data.columns import ColumnInfo, canonical, described, from_table, to_table
from gr.data.making import huge
from gr.data.making.executor import Actions
from gr.data.making.ids import IdCodes
from gr.data.making.in_process import blocks, read_into
from gr.data.making.partitions import PIECE_ROWS, partitioned, whole
from gr.data.making.passes import Counting, Found, Sorting, Writing
from gr.data.making.quarantine import Quarantine
from gr.data.making.ray_tasks import Result, task_folder
from gr.data.making.schema import Preparation
from gr.data.manifest import BLOCKS_PER_FILE
from gr.data.sequences import Sequences
from gr.data.writing import BLOCK_ROWS
from gr.errors import UserError


@dataclass(frozen=True)
class Partitions:
    """The partitions in the scratch folder: as the tasks of ``read`` left them, or, with ``replaced``, those of a
    later stage.  rows_JP: actions of part J of the log in partition P.  ``aside``: where ``replace`` writes."""

    folder: str
    rows_JP: np.ndarray
    replaced: str | None = None
    rows_P: np.ndarray | None = None
    aside: str | None = None

    @property
    def rows(self) -> np.ndarray:
        return self.rows_JP.sum(axis=0) if self.rows_P is None else self.rows_P

    def read(self, partition: int) -> pa.Table | None:
        pieces = list(self.pieces(partition))
        return whole(pa.concat_tables(pieces)) if pieces else None

    def pieces(self, partition: int) -> Iterator[pa.Table]:
        root = Path(self.folder)
        if self.replaced is not None:
            file = task_folder(root / self.replaced, partition) / "actions.arrow"
            if file.exists():
                with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as batches:
                    for n in range(batches.num_record_batches):
                        yield pa.Table.from_batches([batches.get_batch(n)])
            return
        partitions = self.rows_JP.shape[1]
        for part in np.flatnonzero(self.rows_JP[:, partition]).tolist():
            file = task_folder(root / "read", part) / "actions.arrow"
            codes = task_folder(root / "codes", part)
            with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as batches:
                for n in range(partition, batches.num_record_batches, partitions):
                    piece = pa.Table.from_batches([batches.get_batch(n)])
                    if piece.num_rows:
                        yield _recoded(piece, codes)

    def replace(self, partition: int, table: pa.Table) -> None:
        assert self.aside is not None
        with (
            pa.OSFile(str(Path(self.aside) / "actions.arrow"), "wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=PIECE_ROWS)


def _recoded(piece: pa.Table, codes: Path) -> pa.Table:
    """Actions with the codes of the whole log in place of those of a part."""
    for column in ("item", "action_type"):
        if column in piece.column_names:
            of_part = np.load(codes / f"{column}.npy", mmap_mode="r")
            index = piece.column_names.index(column)
            piece = piece.set_column(index, column, pa.array(of_part[piece[column].to_numpy()]))
    return piece


class PartWriter:
    """A part's actions: of each chunk a record batch for each partition, so that partition p of P has batches
    p, p + P, ..."""

    def __init__(self, path: Path, bits: int):
        self.path, self.bits = path, bits
        self.rows_P = np.zeros(1 << bits, dtype=np.int64)
        self._file: pa.OSFile | None = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def add(self, table: pa.Table) -> None:
        table, counts = partitioned(table, self.bits)
        if self._writer is None:
            self._file = pa.OSFile(str(self.path), "wb")
            self._writer = pa.ipc.new_file(self._file, table.schema)
        [batch] = table.to_batches()
        start = 0
        for rows in counts.tolist():
            self._writer.write_batch(batch.slice(start, rows))
            start += rows
        self.rows_P += counts

    def close(self) -> None:
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.close()


@dataclass(frozen=True)
class ReadPart:
    """Reads a part of the log."""

    out: str
    actions: Actions
    options: Preparation
    bits: int

    def __call__(self, aside: Path, number: int, given: Any) -> Result:
        actions, options = self.actions.only(given), self.options
        quarantine = Quarantine(aside / "quarantine" if options.on_bad_rows == "quarantine" else None)
        ids = {"item": IdCodes("item"), "action_type": IdCodes("action type")}
        writer = PartWriter(aside / "actions.arrow", self.bits)
        read_into(
            writer.add, actions, options, quarantine, ids["item"], ids["action_type"], lambda rows: None
        )
        writer.close()
        quarantine.close()
        for name, codes in ids.items():
            if codes.ids is not None:
                table = pa.table({"id": codes.ids})
                with (
                    pa.OSFile(str(aside / f"{name}.arrow"), "wb") as file,
                    pa.ipc.new_file(file, table.schema) as w,
                ):
                    w.write_table(table)
        bad = {"rows": quarantine.rows, "reasons": dict(quarantine.reasons)}
        return {"seen": actions.seen(), "bad": bad}, {"rows_P": writer.rows_P}

    def out_of_memory(self, number: int) -> UserError:
        return huge.out_of_memory_reading(self.out, self.options.chunk_rows)


def part_ids(folder: Path, name: str) -> pa.Array | None:
    """The ids that a task of ``read`` found; None if it found no action."""
    file = folder / f"{name}.arrow"
    if not file.exists():
        return None
    with pa.OSFile(str(file)) as source, pa.ipc.open_file(source) as batches:
        return batches.read_all()["id"].combine_chunks()


@dataclass(frozen=True)
class CodePart:
    """Finds the codes of a part's ids."""

    folder: str
    items: IdCodes
    types: IdCodes

    def __call__(self, aside: Path, number: int, given: Any) -> Result:
        part = task_folder(Path(self.folder) / "read", number)
        for name, codes in (("item", self.items), ("action_type", self.types)):
            ids = part_ids(part, name)
            if ids is not None:
                np.save(aside / f"{name}.npy", codes.codes(ids))
        return {}, {}

    def out_of_memory(self, number: int) -> UserError:
        return UserError(
            f"out of memory for the distinct items ({len(self.items):,}) at '{self.folder}': give it more memory"
        )


@dataclass(frozen=True)
class OnPartition:
    """A pass over one partition."""

    out: str
    step: Sorting | Counting | Writing
    partitions: Partitions
    row_bytes: int

    def __call__(self, aside: Path, number: int, given: Any) -> Result:
        step, store = self.step, replace(self.partitions, aside=str(aside))
        found = Found.nothing(step.catalogue if isinstance(step, Writing) else step.items)
        made = step(store, number, found)
        plain, arrays = found.packed()
        if isinstance(made, Sequences):
            plain["columns"] = [asdict(info) for info in described(canonical(made))] if len(made) else []
            _write_sequences(aside / "sequences.arrow", made)
        return plain, arrays

    def out_of_memory(self, number: int) -> UserError:
        options = self.step.options
        return huge.out_of_memory(self.out, self.partitions, number, self.row_bytes, options.memory_mb)


def _write_sequences(path: Path, rows: Sequences) -> None:
    """A record batch for each BLOCK_ROWS users."""
    writer = None
    with pa.OSFile(str(path), "wb") as file:
        for block in blocks(canonical(rows)):
            [batch] = to_table(block).to_batches()
            writer = writer or pa.ipc.new_file(file, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()


def _read_sequences(path: Path, infos: list[ColumnInfo], start: int, stop: int) -> Iterator[Sequences]:
    """Users ``start`` to ``stop`` (exclusive) of what :func:`_write_sequences` wrote."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as batches:
        for n in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            rows = from_table(pa.Table.from_batches([batches.get_batch(n)]), infos, 0)
            base = n * BLOCK_ROWS
            yield rows.slice(max(start - base, 0), min(stop - base, len(rows)))


@dataclass(frozen=True)
class WriteFile:
    """Writes a file of the dataset.  sums_P1: users of the partitions before each."""

    folder: str
    sequences: str
    sums_P1: np.ndarray
    columns: list[ColumnInfo]

    def __call__(self, aside: Path, number: int, given: Any) -> Result:
        writer = BlockWriter(aside, BLOCK_ROWS, first=number * BLOCKS_PER_FILE)
        for partition, start, stop in shares(self.sums_P1, number):
            file = task_folder(Path(self.folder) / self.sequences, partition) / "sequences.arrow"
            for rows in _read_sequences(file, self.columns, start, stop):
                writer.add(rows)
        return writer.finish().as_json(), {}

    def out_of_memory(self, number: int) -> UserError:
        return UserError(
            f"out of memory at file {number} of the dataset: set max_user_actions, or give it more memory"
        )


def shares(sums_P1: np.ndarray, number: int) -> Iterator[tuple[int, int, int]]:
    """(partition, first, stop) of the users that lie in file ``number`` of a dataset, in their order."""
    first = number * BLOCKS_PER_FILE * BLOCK_ROWS
    stop = min(first + BLOCKS_PER_FILE * BLOCK_ROWS, int(sums_P1[-1]))
    for partition in range(int(np.searchsorted(sums_P1, first, "right")) - 1, len(sums_P1) - 1):
        base, end = int(sums_P1[partition]), int(sums_P1[partition + 1])
        if base >= stop:
            return
        if end > base:
            yield partition, max(first - base, 0), min(stop, end) - base
