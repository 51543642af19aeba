"""SequenceDataset: the prepared form of an action log on disk.

    DIR/sequences/part-00000.parquet   a row a user, list columns; one row group a block of ``block_rows`` users
    DIR/catalogue.parquet              a row an item, in row order: item_id, count, then whatever is known of it
    DIR/manifest.json                  schema version, counts, block digests, fingerprint, provenance

The layout is canonical: the same actions give the same blocks, digests and fingerprint, whoever wrote them.
Rows are users sorted by (hash64(id), id), or in the log's own order for a stream (``row_order: stream``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.sequences import Sequences
from gr.errors import UserError

SCHEMA_VERSION = 1
BLOCK_ROWS = 1024
BLOCKS_PER_FILE = 256
_OPTIONAL = ("timestamps", "action_types", "values")


@dataclass(frozen=True)
class Block:
    """One row group: the unit of reading and of shuffling."""

    file: str
    row_group: int
    rows: int
    actions: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.  ``columns``: the optional list columns present; ``provenance``: free for people.

    ``fingerprint``: of the sequences; the order of training hangs on it.  ``generation``: of the sequences and the
    raw ids that the item rows stand for; a run goes on with the generation that it began with.
    """

    name: str
    schema_version: int
    row_order: str
    block_rows: int
    users: int
    items: int
    actions: int
    columns: list[str]
    fields: list[str]
    action_type_names: list[str]
    fingerprint: str
    generation: str
    blocks: list[Block]
    provenance: dict[str, Any] = field(default_factory=dict)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the sequence dataset at ``path``; a UserError where there is none that this gr can read."""
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(
            f"no sequence dataset at '{path}' (manifest.json is missing): "
            "make one with python -m gr prepare, or set data.path to one"
        )
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"'{file}' is damaged, it is not JSON ({error}): prepare the dataset again"
        ) from error
    if not isinstance(raw, dict):
        raise UserError(f"'{file}' is not a manifest that gr wrote: prepare the dataset again")
    difference = _difference_from_ours(raw)
    if difference:
        raise UserError(
            f"the dataset at '{path}' was prepared by another version of gr (manifest.json: {difference}): "
            "prepare it again"
        )
    return Manifest(**{**raw, "blocks": [Block(**block) for block in raw["blocks"]]})


def _difference_from_ours(raw: dict[str, Any]) -> str:
    """What sets a manifest's keys apart from those of this version, "" when nothing does."""
    version = raw.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        return f"schema version {version}, where this gr reads {SCHEMA_VERSION}"
    difference = _difference_in_keys(Manifest, raw)
    if difference:
        return difference
    if not isinstance(raw["blocks"], list):
        return "'blocks' is no list"
    for number, block in enumerate(raw["blocks"]):
        difference = _difference_in_keys(Block, block) if isinstance(block, dict) else "no table of keys"
        if difference:
            return f"block {number}: {difference}"
    return ""


def _difference_in_keys(kind: type[Manifest] | type[Block], raw: dict[str, Any]) -> str:
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in raw]
    unknown = [name for name in raw if name not in {f.name for f in fields(kind)}]
    parts = (("missing", missing), ("unknown", unknown))
    return ", ".join(f"{what} {', '.join(map(repr, names))}" for what, names in parts if names)


class SequenceDataset:
    """A sequence dataset opened for reading; blocks are read when asked for."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)

    users = property(lambda self: self.manifest.users)
    items = property(lambda self: self.manifest.items)
    actions = property(lambda self: self.manifest.actions)

    @property
    def has_timestamps(self) -> bool:
        return "timestamps" in self.manifest.columns

    def first_ordinal(self, block: int) -> int:
        return block * self.manifest.block_rows

    def read_block(self, block: int) -> Sequences:
        entry = self.manifest.blocks[block]
        file = self.path / entry.file
        try:
            table = pq.ParquetFile(file).read_row_group(entry.row_group)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read row group {entry.row_group} of '{file}' ({error}): prepare the dataset again"
            ) from error
        if table.num_rows != entry.rows:
            raise UserError(
                f"row group {entry.row_group} of '{file}' has {table.num_rows} rows, the manifest says {entry.rows}: "
                "the files were changed after preparing; prepare the dataset again"
            )
        return _from_table(table, self.manifest, self.first_ordinal(block))

    def read_rows(self, start: int, stop: int) -> Sequences:
        """Users ``start`` to ``stop`` (exclusive) of the dataset's order."""
        rows = self.manifest.block_rows
        parts = []
        for block in range(start // rows, -(-stop // rows)):
            base = self.first_ordinal(block)
            whole = self.read_block(block)
            parts.append(whole.take(np.arange(max(start - base, 0), min(stop - base, len(whole)))))
        return Sequences.concatenate(parts)

    @cached_property
    def catalogue(self) -> pa.Table:
        """The items in row order: ``item_id``, ``count`` (actions in the log), then optional columns."""
        file = self.path / "catalogue.parquet"
        try:
            return pq.read_table(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"cannot read '{file}' ({error}): prepare the dataset again") from error


class DatasetWriter:
    """Writes a sequence dataset; nothing is visible at ``path`` until :meth:`finish`.

    Rows must arrive in the dataset's order.  Memory: one block of pending rows.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        name: str,
        *,
        row_order: str = "hash",
        block_rows: int = BLOCK_ROWS,
        action_type_names: list[str] | None = None,
        overwrite: bool = False,
    ):
        self.path = Path(path)
        if self.path.exists() and not overwrite:
            raise UserError(f"'{self.path}' exists: choose another --out, or say --overwrite")
        if self.path.exists() and not _replaceable(self.path):
            raise UserError(
                f"'{self.path}' is not a dataset that could be overwritten: choose another --out, or move it away"
            )
        self.name, self.row_order, self.block_rows = name, row_order, block_rows
        self.action_type_names = action_type_names or []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = self.path.with_name(f".{self.path.name}.writing-{os.getpid()}")
        shutil.rmtree(self._scratch, ignore_errors=True)
        (self._scratch / "sequences").mkdir(parents=True)
        self._pending: list[Sequences] = []
        self._pending_rows = 0
        self._blocks: list[Block] = []
        self._writer: pq.ParquetWriter | None = None
        self._columns: list[str] = []
        self._fields: list[str] = []
        self.users = self.actions = 0

    def add(self, rows: Sequences) -> None:
        """Append rows (their ``ordinals_R`` are ignored: the writer numbers them)."""
        self._pending.append(rows)
        self._pending_rows += len(rows)
        while self._pending_rows >= self.block_rows:
            joined = Sequences.concatenate(self._pending)
            self._write(joined.take(np.arange(self.block_rows)))
            rest = joined.take(np.arange(self.block_rows, len(joined)))
            self._pending, self._pending_rows = [rest], len(rest)

    def finish(self, catalogue: pa.Table, provenance: dict[str, Any] | None = None) -> SequenceDataset:
        """Write what is pending, the catalogue and the manifest, and make the dataset visible by one rename."""
        if self._pending_rows:
            self._write(Sequences.concatenate(self._pending))
        if self._writer is None:
            raise UserError(f"no sequence is left to write to '{self.path}': check the filters and the log")
        self._writer.close()
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.row_order, self.block_rows, catalogue.num_rows, *(b.digest for b in self._blocks)):
            digest.update(f"{part};".encode())
        fingerprint = digest.hexdigest()
        digest.update("\n".join(map(str, catalogue["item_id"].to_pylist())).encode())
        pq.write_table(catalogue, self._scratch / "catalogue.parquet")
        manifest = Manifest(
            name=self.name,
            schema_version=SCHEMA_VERSION,
            row_order=self.row_order,
            block_rows=self.block_rows,
            users=self.users,
            items=catalogue.num_rows,
            actions=self.actions,
            columns=self._columns,
            fields=self._fields,
            action_type_names=self.action_type_names,
            fingerprint=fingerprint,
            generation=digest.hexdigest(),
            blocks=self._blocks,
            provenance=provenance or {},
        )
        (self._scratch / "manifest.json").write_text(
            json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"
        )
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self._scratch, self.path)
        return SequenceDataset(self.path)

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self._writer is not None:
            self._writer.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _write(self, rows: Sequences) -> None:
        table = _to_table(rows)
        number, row_group = divmod(len(self._blocks), BLOCKS_PER_FILE)
        file = f"sequences/part-{number:05d}.parquet"
        if row_group == 0:
            if self._writer is not None:
                self._writer.close()
            self._writer = pq.ParquetWriter(self._scratch / file, table.schema, compression="zstd")
            self._columns = [c for c in _OPTIONAL if c in table.column_names]
            self._fields = [c.removeprefix("field.") for c in table.column_names if c.startswith("field.")]
        assert self._writer is not None
        self._writer.write_table(table, row_group_size=len(rows))
        actions = len(rows.items_A)
        self._blocks.append(Block(file, row_group, len(rows), actions, _digest(rows)))
        self.users += len(rows)
        self.actions += actions


def _replaceable(path: Path) -> bool:
    """Whether nothing but a dataset is lost with the folder."""
    if path.is_symlink() or not path.is_dir():
        return False
    ours = {"sequences", "catalogue.parquet", "manifest.json", "quarantine"}
    return {entry.name for entry in path.iterdir()} <= ours


def _to_table(rows: Sequences) -> pa.Table:
    # rows cut from a larger batch start at a non-zero offset nowhere: Sequences are always compact
    offsets = pa.array(rows.offsets_R1.astype(np.int32))
    users = pa.array(rows.users_R.tolist() if rows.users_R.dtype == object else rows.users_R)
    columns: dict[str, pa.Array] = {
        "user_id": users,
        "items": pa.ListArray.from_arrays(offsets, rows.items_A),
    }
    for name in _OPTIONAL:
        if (column := getattr(rows, f"{name}_A")) is not None:
            columns[name] = pa.ListArray.from_arrays(offsets, column)
    for name, column in (rows.fields_A or {}).items():
        columns[f"field.{name}"] = pa.ListArray.from_arrays(
            offsets, pa.array(column.tolist() if column.dtype == object else column)
        )
    return pa.table(columns)


def _from_table(table: pa.Table, manifest: Manifest, first_ordinal: int) -> Sequences:
    def values(name: str) -> np.ndarray:
        return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)

    lists = table.column("items").combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return Sequences(
        users_R=table.column("user_id").to_numpy(),
        ordinals_R=np.arange(first_ordinal, first_ordinal + table.num_rows),
        offsets_R1=offsets - offsets[0],
        items_A=values("items"),
        timestamps_A=values("timestamps") if "timestamps" in manifest.columns else None,
        action_types_A=values("action_types") if "action_types" in manifest.columns else None,
        values_A=values("values") if "values" in manifest.columns else None,
        fields_A={name: values(f"field.{name}") for name in manifest.fields} or None,
    )


def _digest(rows: Sequences) -> str:
    """Digest of a block's content, whatever its encoding on disk: little-endian arrays, ids as text."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\n".join(map(str, rows.users_R.tolist())).encode())
    for array, dtype in (
        (rows.offsets_R1, "<i8"),
        (rows.items_A, "<i4"),
        (rows.timestamps_A, "<i8"),
        (rows.action_types_A, "<i4"),
        (rows.values_A, "<f4"),
    ):
        digest.update(b"|" if array is None else np.ascontiguousarray(array, dtype=dtype).tobytes())
    for name, column in sorted((rows.fields_A or {}).items()):
        digest.update(f"|{name}|{column.tolist()!r}".encode())
    return digest.hexdigest()
