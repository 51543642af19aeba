"""Writing a sequence dataset (gr/data/dataset.py has the layout): it appears at its place whole, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.blocks import BlockWriter, Written
from gr.data.columns import checksum
from gr.data.dataset import SequenceDataset
from gr.data.folder import Folder
from gr.data.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    fingerprint,
    read_manifest,
    suffix,
    to_json,
)
from gr.data.outputs import scratch_of
from gr.data.sequences import Sequences
from gr.data.stores import Store, all_shown, remedy
from gr.errors import UserError, first_line

BLOCK_ROWS = 1024
UPLOADING = ".uploading-"


class DatasetWriter:
    """Writes a sequence dataset; nothing is visible at ``path`` until :meth:`finish`.

    Rows must arrive in the dataset's order, all with the same columns.  Memory: one block of pending rows.
    ``scratch``: the folder that the dataset is put together in, for a path of this machine on the same filesystem;
    without it a hidden one beside it, or among the machine's temporary files.
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
        scratch: Path | None = None,
        after: Manifest | None = None,
    ):
        """``after``: what stands at ``path``, a folder of this machine, where this is to be its next generation."""
        if after is None:
            check_output(path, overwrite)
        self.place = Folder(path)
        self._after = after
        self._earlier = [] if after is None else [*after.earlier, after.generation]
        self.name, self.row_order, self.block_rows, self.overwrite = name, row_order, block_rows, overwrite
        self.action_type_names = action_type_names or []
        local = self.place.local
        if local is not None:
            local.parent.mkdir(parents=True, exist_ok=True)
        if scratch is not None:
            self.scratch = scratch
        elif local is None:
            self.scratch = Path(tempfile.mkdtemp(prefix="gr-writing-"))
        else:
            self.scratch = scratch_of(local)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._writer = BlockWriter(
            self.scratch, block_rows, hashed=row_order == "hash", earlier=len(self._earlier)
        )
        self._adopted = Written(in_order=row_order == "hash")

    @property
    def generation(self) -> int:
        """Generations before the one that is written."""
        return len(self._earlier)

    def add(self, rows: Sequences) -> None:
        """Append rows (their ``ordinals_R`` are ignored: the writer numbers them)."""
        self._writer.add(rows)

    def adopt(self, folder: Path, written: Written) -> None:
        """Append whole files that a :class:`gr.data.blocks.BlockWriter` wrote in ``folder``; they stay there, too."""
        for file in dict.fromkeys(block.file for block in written.blocks):
            try:
                os.link(folder / file, self.scratch / file)
            except OSError:  # another filesystem, or one without links
                shutil.copyfile(folder / file, self.scratch / file)
        self._adopted.append(written)

    def finish(self, catalogue: pa.Table, provenance: dict[str, Any] | None = None) -> SequenceDataset:
        """Write what is pending, the catalogue and the manifest, and make the dataset visible: by one rename, or in a
        store by its manifest, which is written last."""
        written = self._adopted
        written.append(self._writer.finish())
        if not written.blocks:
            raise UserError(
                f"no sequence is left to write to '{self.place.name}': check the filters and the log"
            )
        catalogue_file = self.scratch / f"catalogue{suffix(len(self._earlier))}.parquet"
        pq.write_table(catalogue, catalogue_file)
        with pq.ParquetFile(catalogue_file) as parquet:  # which doesn't keep every type as it is
            stored = parquet.read(use_threads=False)
        digests = [block.digest for block in written.blocks]
        identity = (self.row_order, self.block_rows, catalogue.num_rows, digests)
        manifest = Manifest(
            name=self.name,
            schema_version=SCHEMA_VERSION,
            row_order=self.row_order,
            block_rows=self.block_rows,
            users=written.users,
            items=catalogue.num_rows,
            actions=written.actions,
            columns=written.columns,
            first_time=min(written.times, default=None),
            last_time=max(written.times, default=None),
            action_type_names=self.action_type_names,
            catalogue={n: checksum(stored[n].combine_chunks()) for n in stored.column_names},
            fingerprint=fingerprint(*identity),
            generation=fingerprint(*identity, _some_at_a_time(catalogue["item_id"])),
            blocks=written.manifest_blocks(),
            digest="",
            provenance=all_shown(provenance or {}),
            earlier=self._earlier,
        )
        (self.scratch / MANIFEST).write_text(to_json(manifest))
        local = self.place.local
        if self._after is None:  # another one may have been made there meanwhile
            check_output(self.place.path, self.overwrite)
        if local is None:
            publish(self.scratch, self.place)
            shutil.rmtree(self.scratch)
        elif self._after is not None:
            self._replace_manifest(local, self._after)
        else:
            if local.exists():
                shutil.rmtree(local)
            os.replace(self.scratch, local)
        return SequenceDataset(self.place.path)

    def _replace_manifest(self, path: Path, after: Manifest) -> None:
        """Put the new generation's files beside the old one's, then its manifest in the place of the old one: whoever
        opens the dataset sees one or the other.  Files of the generation before the old one go."""
        if read_manifest(self.place).generation != after.generation:
            raise UserError(f"'{path}' was changed while it was appended to: append again")
        old = len(after.earlier)
        for entry in [e for e in self.scratch.iterdir() if e.name != MANIFEST]:
            _remove_path(path / entry.name)  # of an append that was killed
            os.replace(entry, path / entry.name)
        shutil.copyfile(path / MANIFEST, self.scratch / "kept")
        os.replace(self.scratch / "kept", path / f"manifest-{old}.json")
        os.replace(self.scratch / MANIFEST, path / MANIFEST)
        shutil.rmtree(self.scratch)
        if old:
            for name in (
                f"manifest-{old - 1}.json",
                f"sequences{suffix(old - 1)}",
                f"catalogue{suffix(old - 1)}.parquet",
            ):
                _remove_path(path / name)

    def abandon(self) -> None:
        """Remove what was written so far."""
        with suppress(OSError):  # the disk may be full
            self._writer.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def check_output(path: str | os.PathLike, overwrite: bool) -> None:
    """Refuse to write a dataset to ``path`` if something would be lost that may not be."""
    where = Folder(path)
    there = _entries(where)
    if there is not None and not overwrite:
        raise UserError(f"'{where.name}' exists: choose another --out, or say --overwrite")
    if there is not None and not all(map(OURS.fullmatch, there)):
        raise UserError(
            f"'{where.name}' is not a dataset that could be overwritten: choose another --out, or move it away"
        )
    if there is not None and where.local is not None and Path.cwd().is_relative_to(where.local.resolve()):
        raise UserError(
            f"'{where.name}' is the folder that you are in, which can't be replaced: run it from another one"
        )


def _some_at_a_time(column: pa.ChunkedArray) -> Iterator[list]:
    """Its values: as Python's own they take many times the column's memory."""
    some = 1 << 16
    return (column.slice(start, some).to_pylist() for start in range(0, len(column), some))


OURS = re.compile(
    r"counts|tokens|vectors|(sequences|quarantine)(-\d+)?|catalogue(-\d+)?\.parquet|manifest(-\d+)?\.json"
)
"""Names of what a dataset's folder holds."""


def _entries(place: Folder) -> set[str] | None:
    """What is at a place: names in the folder, or ``""`` where that is no folder; None where nothing is."""
    if place.local is None:
        names = {name.partition("/")[0] for name in place.store.tree(place.root)}
        return {name for name in names if not name.startswith(UPLOADING)} or None
    if place.local.is_symlink() or (place.local.exists() and not place.local.is_dir()):
        return {""}
    return {entry.name for entry in place.local.iterdir()} if place.local.exists() else None


def publish(folder: Path, place: Folder) -> None:
    """Bring a complete dataset from ``folder`` to a place in a store.

    The manifest comes last: what has none is no dataset.  One that is there stays as it is until the new one has been
    uploaded beside it (``.uploading-...``), and is replaced within the store.  Whatever ends this before the end: what
    was uploaded is removed again.
    """
    store, root = place.store, place.root
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = [name for name in files if name != MANIFEST] + [MANIFEST]
    before = store.tree(root)
    aside = f"{root}/{UPLOADING}{secrets.token_hex(4)}" if before else root
    replacing = False
    try:
        for name in names:
            if name == MANIFEST:
                _check_uploaded(
                    store, aside, {n: f.stat().st_size for n, f in files.items() if n != MANIFEST}
                )
            store.upload(files[name], f"{aside}/{name}")
        if aside != root:
            replacing = True
            for name in sorted(before, key=lambda name: name != MANIFEST):
                store.remove(f"{root}/{name}")
            for name in names:
                store.copy(f"{aside}/{name}", f"{root}/{name}")
    except BaseException as error:
        if aside == root or replacing:
            _remove(store, root, names)
        if not isinstance(error, OSError):
            raise
        lost = ", and the dataset that was there is gone" if replacing else ""
        raise UserError(
            f"cannot write the dataset to '{place.name}' ({first_line(error)}){lost}: "
            f"{remedy(error, 'see to the store and your access to it, and run it again')}"
        ) from error
    finally:
        if aside != root:
            _remove(store, aside, names)


def _check_uploaded(store: Store, root: str, sizes: dict[str, int]) -> None:
    there = store.tree(root)
    for name, size in sizes.items():
        if there.get(name) != size:
            raise OSError(f"{name} has {there.get(name, 0):,} bytes there, not {size:,}")


def _remove(store: Store, root: str, names: list[str]) -> None:
    """As far as it can be done: the store may be the reason why."""
    for name in reversed(names):
        with suppress(OSError):
            store.remove(f"{root}/{name}")


def _remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
