"""Encoded pictures by name, an item's id or what a column says: in a folder, a zip, a tar, a Parquet file or an LMDB.

What isn't an LMDB may lie behind any URL of fsspec.  Pictures are read as they are asked for.
"""

from __future__ import annotations

import logging
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from weakref import WeakValueDictionary

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr.errors import UserError, first_line

log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MOST_BYTES = 1 << 26
"""A file that has more is not read: a small archive can hold one that fills the memory."""
READERS = 8
"""Files of a folder that are read at a time: a store answers each after a while."""

BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
"""Kinds of a column of pictures."""

Content = bytes | Exception
"""A picture as it is encoded, or why it can't be had."""


class PictureFiles(ABC):
    """``names``: those that are there."""

    names: frozenset[str]

    @abstractmethod
    def read(self, names: Sequence[str]) -> list[Content]:
        """Of names that are there.  What is wrong with one picture is found at its place; raises whatever a file or a
        store does where it isn't with a picture."""


def open_pictures(path: str) -> PictureFiles:
    """A folder, a .zip or a .tar with NAME.jpg (or another ending), a .parquet with item_id and image (bytes), or
    an LMDB with pictures by name."""
    import fsspec

    try:
        system, where = fsspec.core.url_to_fs(path)
        if system.isdir(where):
            if system.exists(f"{where}/data.mdb"):
                return _Lmdb(where, folder=True)
            return _Folder(system, where)
        if not system.exists(where):
            raise UserError(
                f"no pictures at '{path}': give a folder, a .zip, .tar or .parquet file, or an LMDB"
            )
        if where.endswith((".lmdb", ".mdb")):
            return _Lmdb(where, folder=False)
        if where.endswith(COMPRESSED):
            raise UserError(
                f"'{path}' is a compressed tar, in which nothing can be found without reading all before it: write a "
                "plain .tar (pictures are compressed already)"
            )
        kind = {".zip": _Zip, ".tar": _Tar}.get(PurePosixPath(where).suffix, _Parquet)
        return kind(system.open(where, "rb"))
    except UserError:
        raise
    except Exception as error:  # a store's own too, such as that it has no key to it
        raise UserError(
            f"the pictures at '{path}' can't be read ({first_line(error)}): give a folder, a zip, a tar, Parquet or an "
            "LMDB"
        ) from None


Where = TypeVar("Where")


def _by_stem(files: Iterable[str]) -> dict[str, str]:
    pictures = sorted(file for file in files if file.lower().endswith(ENDINGS))
    return _by_name((PurePosixPath(file).stem, file) for file in pictures)


def _by_name(pairs: Iterable[tuple[str, Where]]) -> dict[str, Where]:
    """Where the picture of each name is; a line where there are several of one."""
    found: dict[str, Where] = {}
    again: set[str] = set()
    for name, where in pairs:
        if name in found:
            again.add(name)
        found[name] = where
    if again:
        said = "%s names have several pictures each ('%s' is one): the last one counts"
        log.warning(said, f"{len(again):,}", min(again))
    return found


def _too_large(size: int | None) -> ValueError | None:
    return None if size is None or size <= MOST_BYTES else ValueError(f"it has {size:,} bytes")


class _Folder(PictureFiles):
    def __init__(self, system: Any, folder: str) -> None:
        self.system = system
        self.sizes = {entry["name"]: entry.get("size") for entry in system.ls(folder, detail=True)}
        self.files = _by_stem(self.sizes)
        self.names = frozenset(self.files)

    def read(self, names: Sequence[str]) -> list[Content]:
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self._one, names))

    def _one(self, name: str) -> Content:
        file = self.files[name]
        try:
            return _too_large(self.sizes[file]) or self.system.cat_file(file)
        except (FileNotFoundError, IsADirectoryError) as gone:
            return gone


class _Zip(PictureFiles):
    def __init__(self, file: BinaryIO) -> None:
        self.zip = zipfile.ZipFile(file)
        self.files = _by_stem(self.zip.namelist())
        self.names = frozenset(self.files)

    def read(self, names: Sequence[str]) -> list[Content]:
        return [self._one(self.files[name]) for name in names]

    def _one(self, file: str) -> Content:
        try:
            return _too_large(self.zip.getinfo(file).file_size) or self.zip.read(file)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
        ) as damage:  # the last one: it is encrypted
            return damage


class _Tar(PictureFiles):
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = {m.name: (m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()}
        self.place = {stem: members[name] for stem, name in _by_stem(members).items()}
        self.names = frozenset(self.place)

    def read(self, names: Sequence[str]) -> list[Content]:
        return [self._one(*self.place[name]) for name in names]

    def _one(self, offset: int, size: int) -> Content:
        if (problem := _too_large(size)) is not None:
            return problem
        self.file.seek(offset)
        return self.file.read(size)  # of a tar that was cut off a part, which no decoder takes for a picture


class _Parquet(PictureFiles):
    """``image``: bytes, or as some write them a struct with ``bytes``.  Row groups are read one at a time, each once a
    call, the last one kept."""

    def __init__(self, file: BinaryIO) -> None:
        self.parquet = pq.ParquetFile(file)
        schema = self.parquet.schema_arrow
        if missing := {"item_id", "image"} - set(schema.names):
            raise ValueError(f"it has no column {min(missing)}, and item_id and image (bytes) are wanted")
        kind = inner = schema.field("image").type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            inner = kind.field("bytes").type
        if not any(is_kind(inner) for is_kind in BYTES):
            raise ValueError(f"column image is of type {kind}, and bytes, or a struct with bytes, are wanted")
        self.place = _by_name(self._places())
        self.names = frozenset(self.place)
        self._kept: tuple[int, pa.ChunkedArray] | None = None

    def read(self, names: Sequence[str]) -> list[Content]:
        found: dict[str, Content] = {}
        for name in sorted(names, key=self.place.__getitem__):
            group, row = self.place[name]
            if self._kept is None or self._kept[0] != group:
                self._kept = group, self._images(group)
            found[name] = self._kept[1][row].as_py() or ValueError("it is empty")
        return [found[name] for name in names]

    def _places(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for group in range(self.parquet.num_row_groups):
            ids = self.parquet.read_row_group(group, columns=["item_id"])["item_id"].to_pylist()
            yield from ((str(item), (group, row)) for row, item in enumerate(ids))

    def _images(self, group: int) -> pa.ChunkedArray:
        images = self.parquet.read_row_group(group, columns=["image"])["image"]
        return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images


_LMDBS: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()
"""Those that are open, by device and number of the file: a process can't open one twice, and two runs in it may read
the same pictures."""


class _Lmdb(PictureFiles):
    """Keys are names in UTF-8, values encoded pictures: nothing is unpickled."""

    def __init__(self, path: str, folder: bool) -> None:
        try:
            import lmdb
        except ModuleNotFoundError as error:
            if error.name != "lmdb":
                raise
            raise UserError(
                f"'{path}' is an LMDB, and the package 'lmdb' isn't installed: pip install 'gr[lmdb]'"
            ) from None
        data = Path(path, "data.mdb") if folder else Path(path)
        try:
            said = data.stat()
            if (store := _LMDBS.get((said.st_dev, said.st_ino))) is None:
                store = lmdb.open(path, subdir=folder, readonly=True, lock=False, readahead=False)
                _LMDBS[said.st_dev, said.st_ino] = store
            self.store = store
            used = (store.info()["last_pgno"] + 1) * store.stat()["psize"]
            if said.st_size < used:  # reading behind its end would end the process
                raise OSError(f"it has {said.st_size:,} bytes of {used:,}: it was cut off")
            with store.begin() as asked:
                keys = [bytes(key) for key in asked.cursor().iternext(values=False)]
        except lmdb.Error as error:
            raise OSError(str(error)) from None
        self.names = frozenset(key.decode("utf-8", "replace") for key in keys)

    def read(self, names: Sequence[str]) -> list[Content]:
        with self.store.begin() as asked:
            return [asked.get(name.encode()) or ValueError("it is empty") for name in names]
