"""Folder: the place of a dataset, a path of this machine or any URL that fsspec knows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.outputs import delivered
from gr.data.ranged import RangedFile, column_ranges
from gr.data.stores import Store, is_url


class Folder:
    """Reads files of a folder, and adds some.

    ``name`` is what messages call it; ``local`` its path on this machine, or None: then it is ``root`` in ``store``.
    Every reading method raises FileNotFoundError where there is no such file and OSError for all else that goes wrong.
    """

    def __init__(self, where: str | os.PathLike):
        text = os.fspath(where)
        self.local: Path | None = None
        self._sizes: dict[str, int] = {}
        if not is_url(text):
            self.name, self.local = text, Path(text)
            return
        self.name = text.rstrip("/")
        self._store, self.root = Store.at(self.name)
        if "file" in self._store.protocols:  # file:///data/set is /data/set
            self.local = Path(self.root)

    @property
    def store(self) -> Store:
        """Of a URL."""
        return self._store

    @property
    def path(self) -> Path | str:
        """The path, or the URL."""
        return self.name if self.local is None else self.local

    def of(self, file: str) -> str:
        """What messages call a file of the folder."""
        return f"{self.name}/{file}"

    def read(self, file: str) -> bytes:
        if self.local is not None:
            return (self.local / file).read_bytes()
        return self.store.read(f"{self.root}/{file}")

    def files(self, folder: str) -> set[str]:
        """Names of the files directly in a folder of this folder."""
        if self.local is not None:
            return {entry.name for entry in os.scandir(self.local / folder) if entry.is_file()}
        sizes = self.store.files(f"{self.root}/{folder}")
        self._sizes.update({f"{folder}/{name}": size for name, size in sizes.items()})
        return set(sizes)

    def mark(self, file: str) -> tuple[int, ...] | None:
        """What changes when a file of this machine is replaced; of a store nothing is asked."""
        if self.local is None:
            return None
        found = os.stat(self.local / file)
        return found.st_ino, found.st_size, found.st_mtime_ns

    @contextmanager
    def parquet(
        self,
        file: str,
        footer: pq.FileMetaData | None = None,
        row_groups: Iterable[int] | None = None,
        columns: Iterable[str] = (),
    ) -> Iterator[pq.ParquetFile]:
        """A Parquet file, opened; its ``footer`` is read where it isn't given.  Of a store the bytes of ``columns`` in
        ``row_groups`` (all without it) are fetched at once."""
        if self.local is not None:
            # a path would be looked at by fsspec first, which takes longer than opening it
            with (
                pa.OSFile(str(self.local / file)) as opened,
                pq.ParquetFile(opened, metadata=footer) as parquet,
            ):
                yield parquet
            return
        source = RangedFile(self.store, f"{self.root}/{file}", self._size(file))
        with pq.ParquetFile(source, metadata=footer) as parquet:
            groups = range(parquet.num_row_groups) if row_groups is None else row_groups
            source.fetch(column_ranges(parquet.metadata, groups, columns))
            yield parquet

    def publish(self, file: str, content: bytes) -> None:
        """Write a file, parents included; a reader sees all of it or nothing (where the storage can't rename, that
        is the storage's promise for one object)."""
        if self.local is None:
            self.store.write(f"{self.root}/{file}", content)
            return
        target = self.local / file
        target.parent.mkdir(exist_ok=True)
        with delivered(target) as scratch:
            scratch.write_bytes(content)

    def _size(self, file: str) -> int:
        """Of a file in the store, asked for once."""
        if file not in self._sizes:
            size = self.store.size(f"{self.root}/{file}")
            if size is None:
                raise OSError("the store doesn't say how large it is")
            self._sizes[file] = size
        return self._sizes[file]
