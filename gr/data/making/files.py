"""Files by path, glob, folder or URL (anything fsspec knows), in the order of the numbers in their names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from gr.data.ranged import RangedFile, column_ranges
from gr.data.stores import AHEAD, Store, in_order, is_url, remedy, shown
from gr.errors import UserError, first_line, nearest

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv", ".txt", ".dat")
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
COMPRESSED = tuple(CODECS)
PACKED = (".xz", ".lzma", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".lzo", ".snappy", ".z")
"""Endings of files that somebody has to unpack first."""
READ_BUFFER, READ_BUFFER_OF_A_STORE = 2**20, 2**23
WHOLE_ROW_GROUP = 2**27
"""Bytes of a row group that are fetched from a store at once; a larger one is read through buffers."""
ROW_GROUPS_AHEAD = 2
FOOTERS_KEPT = 2**28
"""Bytes of memory for the footers of a store's files, each of which costs two requests."""
MISSING_IN_PATH = "__HIVE_DEFAULT_PARTITION__"
TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
VERSION = (
    "size",
    "mtime",
    "ino",
    "LastModified",
    "last_modified",
    "updated",
    "ETag",
    "etag",
    "md5Hash",
    "generation",
)
"""Keys of fsspec's ``info`` that tell one content of a file from another, whichever filesystem has them."""
PART = re.compile(r"\.c\d+$")  # part-00000-4f1c.c000: Spark's counter is no ending
FOLDER_MARK = "_$folder$"
"""Ends the names of objects by which Hadoop has folders in a store; others have empty names."""
LISTED = 3


class Files(LocalFileSystem):
    """This machine's files.  A link to a folder is that folder: fsspec's own passes over it without a word."""

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        found = super().ls(path, detail=detail, **kwargs)
        for info in found if detail else ():
            if info["islink"] and os.path.isdir(info["name"]):
                if _lies_in(os.path.realpath(path), os.path.realpath(info["name"])):
                    raise UserError(
                        f"'{info['name']}' is a link to a folder that it lies in: remove it, or name the files by a "
                        "glob"
                    )
                info["type"] = "directory"
        return found


class Footers(dict[str, tuple[int, pq.FileMetaData]]):
    """Path -> (bytes of the file, its footer), of files in a store: as many as memory is meant for."""

    room = FOOTERS_KEPT

    def keep(self, path: str, size: int, footer: pq.FileMetaData) -> None:
        bytes = 4 * footer.serialized_size  # about, in memory
        if bytes <= self.room:
            self.room -= bytes
            self[path] = size, footer

    def __reduce__(self) -> tuple[type[Footers], tuple[()]]:
        return Footers, ()  # another process reads its own


@dataclass(frozen=True)
class DataFile:
    """One file; ``name`` is what messages call it."""

    filesystem: Any
    path: str
    format: str
    footers: Footers = field(default_factory=Footers, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.path if self.local else shown(self.filesystem.unstrip_protocol(self.path))

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def size(self) -> int:
        """Bytes, as stored."""
        return self._store.size(self.path) or 0

    @property
    def version(self) -> list[str]:
        """Its size, and what the storage knows that changes with the content: time of writing, tag."""
        info = self.filesystem.info(self.path)
        return [f"{key} {info[key]}" for key in VERSION if info.get(key) is not None]

    def open(self) -> pa.NativeFile:
        """The content, decompressed where the name says that it is compressed."""
        codec = CODECS.get(Path(self.path.lower()).suffix)
        if self.local:
            return pa.input_stream(self.path, codec)
        size = self._store.size(self.path)
        if size is None:  # a server that sends all or nothing
            return pa.input_stream(self.filesystem.open(self.path, "rb"), codec)
        return pa.input_stream(RangedFile(self._store, self.path, size, READ_BUFFER_OF_A_STORE), codec)

    @property
    def folder_columns(self) -> dict[str, str | None]:
        """Columns in the names of the folders, ``dt=2024-01-31/hour=07/``; None is a missing value."""
        columns: dict[str, str | None] = {}
        for folder in self.path.split("/")[:-1]:
            name, sign, value = folder.partition("=")
            if sign and name:
                columns[unquote(name)] = None if value in ("", MISSING_IN_PATH) else unquote(value)
        return columns

    def parquet(self) -> pq.ParquetFile:
        """Opened for streaming: column chunks are read through a small buffer, not whole.

        INT96 times (Spark, Impala) are read as microseconds: as nanoseconds, Arrow's own choice, all but the years
        1678 to 2261 would wrap around to other times."""
        try:
            if self.local:
                return _opened(self.path, READ_BUFFER)
            source, footer = self._source()
            parquet = _opened(source, READ_BUFFER_OF_A_STORE, footer)
            if footer is None:
                self.footers.keep(self.path, source.size, parquet.metadata)
            return parquet
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read '{self.name}' as Parquet ({first_line(error)}): {remedy(error, 'check the file')}"
            ) from None

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of a Parquet file, whole."""
        with self.parquet() as parquet:
            try:
                if self.local:
                    return parquet.read(columns=columns)
                source, footer = self._source()
                source.fetch(column_ranges(parquet.metadata, range(parquet.num_row_groups), columns))
                return _opened(source, READ_BUFFER_OF_A_STORE, footer).read(columns=columns)
            except (OSError, pa.ArrowInvalid) as error:
                raise UserError(
                    f"cannot read '{self.name}' ({first_line(error)}): {remedy(error, 'write the file again')}"
                ) from None

    def row_group(
        self, parquet: pq.ParquetFile, group: int, columns: Sequence[str], most: int = WHOLE_ROW_GROUP
    ) -> pq.ParquetFile:
        """What the row group's ``columns`` are read from: the opened file itself, or, of a store, another one that has
        their bytes in memory, if they are no more than ``most``."""
        if self.local:
            return parquet
        source, _ = self._source()
        ranges = column_ranges(parquet.metadata, [group], columns)
        if sum(stop - start for start, stop in ranges) <= most:
            source.fetch(ranges)
        return _opened(source, READ_BUFFER_OF_A_STORE, parquet.metadata)

    def row_groups(
        self, parquet: pq.ParquetFile, columns: Sequence[str], groups: Iterable[int]
    ) -> Generator[pq.ParquetFile, None, None]:
        """:meth:`row_group` of each; of a store the next ones are on their way meanwhile."""
        ahead = 0 if self.local else ROW_GROUPS_AHEAD
        return in_order(lambda group: self.row_group(parquet, group, columns), groups, ahead)

    @property
    def _store(self) -> Store:
        return Store(self.filesystem)

    def _source(self) -> tuple[RangedFile, pq.FileMetaData | None]:
        """The file in its store, and its footer where that is known."""
        size, footer = self.footers.get(self.path, (None, None))
        if size is None:
            size = self._store.size(self.path)
        if size is None:
            raise OSError("its store doesn't say how large it is")
        return RangedFile(self._store, self.path, size), footer


def opened_parquet(files: Sequence[DataFile]) -> Iterator[pq.ParquetFile]:
    """Each file, opened, in order: of a store several at the same time."""
    return in_order(DataFile.parquet, files, 0 if not files or files[0].local else AHEAD)


def _opened(source: Any, buffer: int, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    return pq.ParquetFile(
        source,
        metadata=footer,
        buffer_size=buffer,
        pre_buffer=False,
        coerce_int96_timestamp_unit="us",
        page_checksum_verification=True,  # of pages that have one, as Spark writes them
    )


def find_files(
    source: str,
    format: str = "auto",
    *,
    key: str | None = "format",
    note: Callable[[str], None] | None = None,
) -> list[DataFile]:
    """The files that ``source`` names, in natural order (:func:`natural`); hidden ones and those that start with '_'
    are not data.

    ``format``: parquet or csv; auto goes by the names, and in a folder leaves out what they don't tell; ``key``: what
    the schema calls it, if it may be set there.  ``note`` is told of files in a folder that are left out.
    """
    store, path = _place(source)
    filesystem, source = store.filesystem, shown(source)

    def find() -> tuple[list[str], list[str]]:
        filesystem.invalidate_cache()
        if _is_glob(filesystem, path):
            return _by_glob(filesystem, path, source, format)
        if filesystem.isdir(path):
            return _in_folder(filesystem, path, source, format)
        return ([path], []) if filesystem.exists(path) else ([], [])

    try:
        paths, left_out = store.asked(find, path)
    except OSError as error:
        raise UserError(
            f"cannot open '{source}' ({first_line(error)}): {remedy(error, 'check the URL and its access')}"
        ) from None
    kind = "data" if format == "auto" else format
    if packed := [path for path in paths or left_out if path.lower().endswith(PACKED)]:
        raise UserError(
            f"'{packed[0]}' is packed in a way that isn't read: unpack it, or pack each file by itself as "
            f"{', '.join(COMPRESSED)}"
        )
    if not paths and left_out:
        raise UserError(
            f"no {kind} file at '{source}' by the names ({_listed(left_out)}): "
            f"{f'set {key} to parquet or csv if these are data, or ' if key else ''}name them by a glob"
        )
    if not paths:
        raise UserError(f"no {kind} file at '{source}': check the path or the glob")
    if left_out and note is not None:
        note(
            f"left out of '{source}', not {kind} by their names: {_listed(left_out)}; "
            f"{f'set {key}, or ' if key else ''}name the files by a glob, if these are data"
        )
    paths, again = _each_once(filesystem, sorted(paths, key=natural))
    if again and note is not None:
        note(f"left out of '{source}', links to files that it has already: {_listed(again)}")
    footers = Footers()
    files = [
        DataFile(filesystem, p, _format_by_name(p) if format == "auto" else format, footers) for p in paths
    ]
    if unknown := [f for f in files if not f.format]:
        raise UserError(
            f"'{unknown[0].name}' is neither .parquet nor .csv by its name: set {key} to parquet or csv"
        )
    if len({f.format for f in files}) > 1:
        raise UserError(f"'{source}' holds both Parquet and CSV files: set {key}, or name them by a glob")
    return files


def keep_apart(source: str, place: str, option: str = "out") -> None:
    """Refuse a ``place`` (path or URL, the program's ``option``) whose files the log ``source`` would hold when it is
    read the next time, and one that holds the log.  Folders with names that are left out don't count."""
    (store, path), (other, below) = _place(source), _place(place)
    filesystem = store.filesystem
    if type(filesystem) is not type(other.filesystem):
        return
    real = os.path.realpath if isinstance(filesystem, Files) else (lambda name: name.rstrip("/"))
    place_is, path = real(below), path.rstrip("/")

    def searched(folder: str) -> Iterator[str]:
        """A folder, and those that links in it lead to."""
        yield real(folder)
        for below, _, _ in filesystem.walk(folder) if isinstance(filesystem, Files) else ():
            if os.path.islink(below) and _lies_in(below, folder, hidden=False):
                yield real(below)

    def roots() -> Iterator[str]:
        """Folders that are searched through, if they are there then."""
        if not _is_glob(filesystem, path):
            yield from searched(path)
            return
        fixed = re.split(r"[^/]*[*?[]", path, maxsplit=1)[0]
        named = re.compile(glob_translate(real(fixed) + path[len(fixed.rstrip("/")) :]))
        folders = [place_is]
        while "/" in folders[-1].strip("/"):
            folders.append(folders[-1].rpartition("/")[0])
        inner = [f"{place_is}/catalogue.parquet", f"{place_is}/sequences/part-00000.parquet"]
        if any(map(named.match, inner)):
            yield place_is
        yield from (f for f in folders if named.match(f) and not _hidden_match(path, f))
        for found in filesystem.glob(path):
            if filesystem.isdir(found) and not _hidden_match(path, found):
                yield from searched(found)

    source, place = shown(source), shown(place)
    if real(path) != place_is and _lies_in(real(path), place_is):
        raise UserError(
            f"--source '{source}' is in --{option} '{place}', which is written to: keep them apart"
        )
    try:
        within = store.asked(lambda: any(_lies_in(place_is, root, hidden=False) for root in roots()), path)
    except OSError:  # which is said when the log is looked for
        return
    if within:
        raise UserError(
            f"--{option} '{place}' is in --source '{source}', and would be part of that log the next time: keep them "
            "apart, or name the log's files by a glob"
        )


def is_there(path: str) -> bool:
    """Whether there is a file of that path, glob or URL."""
    store, where = Store.at(path)
    return store.asked(lambda: bool(store.filesystem.glob(where) or store.filesystem.exists(where)), where)


def natural(path: str) -> list[tuple[list[Any], str]]:
    """Key that sorts paths folder by folder, numbers in them by value: part-2 before part-10."""
    return [
        ([int(piece) if n % 2 else piece for n, piece in enumerate(re.split("([0-9]+)", part))], part)
        for part in path.split("/")
    ]


def _by_glob(filesystem: Any, path: str, source: str, format: str) -> tuple[list[str], list[str]]:
    """The files that a glob names, hidden ones only if it asks for them, and those of the folders that it names."""
    taken: list[str] = []
    left_out: list[str] = []
    for found in filesystem.glob(path):
        if _hidden_match(path, found):
            continue
        if filesystem.isdir(found):
            more, others = _in_folder(filesystem, found, source, format)
            taken, left_out = taken + more, left_out + others
        else:
            taken.append(found)
    return list(dict.fromkeys(taken)), list(dict.fromkeys(left_out))


def _hidden_match(glob: str, found: str) -> bool:
    """Whether a name that a glob matches is one that is left out, for the glob doesn't ask for such names."""
    last, name = (path.rstrip("/").rpartition("/")[2] for path in (glob, found))
    return name.startswith(("_", ".")) and not last.startswith(("_", "."))


def _is_glob(filesystem: Any, path: str) -> bool:
    return any(c in path for c in "*?[") and not filesystem.exists(path)


def _place(path: str) -> tuple[Store, str]:
    """The store of a path of this machine or a URL, and the path in it."""
    if is_url(path) and not path.startswith(("file://", "local://")):
        return Store.at(path)
    files = Files()
    return Store(files), files._strip_protocol(path)


def _lies_in(path: str, folder: str, hidden: bool = True) -> bool:
    """Whether ``path`` is ``folder`` or below it; without ``hidden`` not by way of names that are left out."""
    root = folder.rstrip("/") + "/"
    between = f"{path}/".removeprefix(root)
    return f"{path}/".startswith(root) and (hidden or not any(map(_left_out, between.split("/")[:-1])))


def _left_out(folder: str) -> bool:
    """Whether a folder's name says that it is not data."""
    return folder.startswith((".", "_")) and "=" not in folder


def _each_once(filesystem: Any, paths: list[str]) -> tuple[list[str], list[str]]:
    """The paths without those that are links to others of them, and these."""
    if not isinstance(filesystem, Files):
        return paths, []
    folder_is = cache(os.path.realpath)

    def real(path: str) -> str:
        folder, _, name = path.rpartition("/")
        return os.path.realpath(path) if os.path.islink(path) else f"{folder_is(folder)}/{name}"

    real_of = {path: real(path) for path in paths}
    straight = sorted(paths, key=lambda path: (os.path.islink(path), real_of[path] != path))
    chosen = {real_of[path]: path for path in reversed(straight)}
    kept = set(chosen.values())
    return [p for p in paths if p in kept], [p for p in paths if p not in kept]


def _in_folder(filesystem: Any, path: str, source: str, format: str) -> tuple[list[str], list[str]]:
    """The data files of a folder, and others that are neither hidden nor taken.  With a ``format``, files whose
    names have no ending are taken too: so Spark's and Hive's parts are called."""
    root = path.rstrip("/") + "/"
    taken, left_out = [], []
    for found in filesystem.find(path):
        parts = found.removeprefix(root).split("/")
        if kind := next((TABLE_FORMATS[p] for p in parts if p in TABLE_FORMATS), None):
            raise UserError(
                f"'{source}' is a {kind} table, whose folder holds rows that were deleted or replaced as well: export "
                "its present state to plain Parquet, or name the files by a glob if all of them count"
            )
        *folders, name = parts
        if (
            not name
            or name.endswith(FOLDER_MARK)
            or name.startswith((".", "_"))
            or any(map(_left_out, folders))
        ):
            continue
        by_name = _format_by_name(found)
        if by_name if format == "auto" else by_name == format or (not by_name and _without_ending(name)):
            taken.append(found)
        elif not by_name:
            left_out.append("/".join(parts))
    return taken, left_out


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in sorted(names, key=natural)[:LISTED])
    return f"{shown} and {len(names) - LISTED:,} more" if len(names) > LISTED else shown


def require_column(file: str, column: str, names: Sequence[str], others: Iterable[str] = ()) -> None:
    """Refuse a file without the column, or with two of the name; ``others`` could have been asked for too."""
    if column not in names:
        fix = _separated(names) or nearest(column, [*names, *others])
        raise UserError(f"'{file}' has no column '{column}': {fix}")
    if list(names).count(column) > 1:
        raise UserError(f"'{file}' has more than one column '{column}': give each a name of its own")


def _separated(names: Sequence[str]) -> str:
    """What to do where one name looks like several of them in a row."""
    found = [delimiter for delimiter in "\t;|," if len(names) == 1 and delimiter in names[0]]
    if not found:
        return ""
    return f"it has one column, {names[0]!r}; set csv.delimiter to {found[0]!r} if these are several"


def _format_by_name(path: str) -> str:
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return "parquet" if name.endswith(PARQUET) else "csv" if name.endswith(TEXT) else ""


def _without_ending(name: str) -> bool:
    name = name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return "." not in PART.sub("", name)
