"""StorePath: a place in a store (S3, GCS, ...), with as much of pathlib's ways as runs and checkpoints need."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import torch.distributed.checkpoint as dcp

from gr.data.folder import Folder
from gr.data.ranged import RangedFile
from gr.data.stores import Store, is_url

AHEAD_BYTES = 1 << 23
WHOLE_BYTES = 1 << 26
"""Files up to so many bytes are read whole."""
LAST = "complete.json"
"""What makes a folder of files one: removed first, written last."""


class StorePath:
    """``url/name``.  Folders are parts of names: there is one where there is a file in it."""

    def __init__(self, url: str):
        folder = Folder(url)
        if folder.local is not None:
            raise ValueError(f"{url} is a path of this machine")
        self._url, self._store, self._root = folder.name, folder.store, folder.root

    @property
    def store(self) -> Store:
        return self._store

    @property
    def root(self) -> str:
        """The path in the store."""
        return self._root

    @property
    def name(self) -> str:
        return self._url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> StorePath:
        return self._like(self._url.rpartition("/")[0], self._root.rpartition("/")[0])

    def with_name(self, name: str) -> StorePath:
        return self.parent / name

    def resolve(self) -> StorePath:
        return self

    def __truediv__(self, name: str | os.PathLike) -> StorePath:
        return self._like(f"{self._url}/{name}", f"{self._root}/{name}")

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"StorePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __reduce__(self) -> tuple[type[StorePath], tuple[str]]:
        return StorePath, (self._url,)  # another process has a client of its own

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._store.is_file(self._root)

    def is_dir(self) -> bool:
        return bool(self.tree())

    def iterdir(self) -> Iterator[StorePath]:
        for name in dict.fromkeys(name.partition("/")[0] for name in self.tree()):
            yield self / name

    def tree(self) -> dict[str, int]:
        """Name -> bytes of all files below."""
        return self._store.tree(self._root)

    def stat(self) -> Any:
        """Its ``st_size`` alone."""
        return SimpleNamespace(st_size=self._store.size(self._root))

    def open(self, mode: str = "rb") -> io.BufferedIOBase:
        """For reading bytes."""
        if mode != "rb":
            raise ValueError(f"a file of a store is not opened as {mode}")
        size = self._store.size(self._root)
        if size is None or size <= WHOLE_BYTES:
            return io.BytesIO(self._store.read(self._root))
        return io.BufferedReader(RangedFile(self._store, self._root, size, AHEAD_BYTES), 1 << 16)

    def read_text(self) -> str:
        return self._store.read(self._root).decode()

    def write_text(self, text: str) -> None:
        self._store.write(self._root, text.encode())

    def touch(self) -> None:
        self._store.write(self._root, b"")

    def unlink(self) -> None:
        self._store.remove(self._root)

    def remove_tree(self) -> None:
        """All files below, ``complete.json`` first."""
        for name in sorted(self.tree(), key=lambda name: name != LAST):
            self._store.remove(f"{self._root}/{name}")

    def copy_tree(self, other: StorePath) -> None:
        """All files below, ``complete.json`` last."""
        for name in sorted(self.tree(), key=lambda name: name == LAST):
            self._store.copy(f"{self._root}/{name}", f"{other._root}/{name}")

    def upload(self, file: Path, name: str) -> None:
        """A file of this machine, as ``name`` in this folder."""
        self._store.upload(file, f"{self._root}/{name}")

    def download(self, name: str, file: Path) -> None:
        """``name`` of this folder to this machine."""
        self._store.download(f"{self._root}/{name}", file)

    def _like(self, url: str, root: str) -> StorePath:
        other = object.__new__(StorePath)
        other._url, other._store, other._root = url, self._store, root
        return other


AnyPath = Path | StorePath


def place(where: str | os.PathLike | StorePath) -> AnyPath:
    """A path of this machine, or a place in a store."""
    if isinstance(where, StorePath):
        return where
    text = os.fspath(where)
    if not is_url(text):
        return Path(text)
    local = Folder(text).local
    return StorePath(text) if local is None else local


def files_in(folder: AnyPath) -> dict[str, int]:
    """Name -> bytes of the files directly in a folder; empty where there is none."""
    if isinstance(folder, StorePath):
        return folder.store.files(folder.root)
    if not folder.is_dir():
        return {}
    return {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}


def parquet_file(file: AnyPath) -> pq.ParquetFile:
    """A Parquet file, opened where it is.  Raises FileNotFoundError, OSError, pyarrow's ArrowException."""
    return pq.ParquetFile(file.open() if isinstance(file, StorePath) else file)


def remove_tree(path: AnyPath) -> None:
    """A folder with all in it, on this machine's disk or in a store."""
    if isinstance(path, StorePath):
        path.remove_tree()
    else:
        shutil.rmtree(path)


class StoreReader(dcp.FileSystemReader):
    """Reads a checkpoint where it is, the tensors that are asked for."""

    def __init__(self, path: AnyPath) -> None:
        super().__init__(path if isinstance(path, Path) else "/")
        if not isinstance(path, Path):
            self.fs, self.path = _Files(), path  # type: ignore[assignment]


class _Files(dcp.filesystem.FileSystem):
    """As far as reading goes."""

    def create_stream(self, path: Any, mode: str) -> Any:
        return path.open(mode)

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path
