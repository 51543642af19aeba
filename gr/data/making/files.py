"""Files by path, glob, folder or URL (anything fsspec knows), in the order of their names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from gr.errors import UserError, nearest

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv", ".txt", ".dat")
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
COMPRESSED = tuple(CODECS)
READ_BUFFER = 2**20


@dataclass(frozen=True)
class DataFile:
    """One file; ``name`` is what messages call it."""

    filesystem: Any
    path: str
    format: str

    @property
    def name(self) -> str:
        return self.path if self.local else self.filesystem.unstrip_protocol(self.path)

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def size(self) -> int:
        """Bytes, as stored."""
        return int(self.filesystem.size(self.path) or 0)

    def open(self) -> pa.NativeFile:
        """The content, decompressed where the name says that it is compressed."""
        if self.local:
            return pa.input_stream(self.path, "detect")
        return pa.input_stream(
            self.filesystem.open(self.path, "rb"), CODECS.get(Path(self.path.lower()).suffix)
        )

    def parquet(self) -> pq.ParquetFile:
        """Opened for streaming: column chunks are read through a small buffer, not whole."""
        try:
            source = self.path if self.local else self.filesystem.open(self.path, "rb")
            return pq.ParquetFile(source, buffer_size=READ_BUFFER, pre_buffer=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read '{self.name}' as Parquet ({_first_line(error)}): check the file"
            ) from None


def find_files(source: str, format: str = "auto") -> list[DataFile]:
    """The files that ``source`` names, sorted by path; hidden ones and those that start with '_' are not data.

    ``format``: parquet or csv; auto goes by the names.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        if any(c in path for c in "*?[") and not filesystem.exists(path):
            paths: Sequence[str] = [p for p in filesystem.glob(path) if not filesystem.isdir(p)]
        elif filesystem.isdir(path):
            root = path.rstrip("/") + "/"
            paths = [
                p
                for p in filesystem.find(path)
                if not any(part.startswith(("_", ".")) for part in p.removeprefix(root).split("/"))
                and _format_by_name(p) in (["parquet", "csv"] if format == "auto" else [format])
            ]
        else:
            paths = [path] if filesystem.exists(path) else []
    except ImportError as error:  # the protocol's package isn't there
        raise UserError(f"cannot open '{source}' ({_first_line(error)}): install what it names") from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"cannot open '{source}' ({_first_line(error)}): check the URL and its access"
        ) from None
    if not paths:
        raise UserError(
            f"no {'data' if format == 'auto' else format} file at '{source}': check the path or the glob"
        )
    files = [
        DataFile(filesystem, p, _format_by_name(p) if format == "auto" else format) for p in sorted(paths)
    ]
    if unknown := [f for f in files if not f.format]:
        raise UserError(
            f"'{unknown[0].name}' is neither .parquet nor .csv by its name: set format to one of the two"
        )
    if len({f.format for f in files}) > 1:
        raise UserError(f"'{source}' holds both Parquet and CSV files: set format, or name them by a glob")
    return files


def require_column(file: str, column: str, names: Sequence[str]) -> None:
    """Refuse a file without the column, or with two of the name."""
    if column not in names:
        raise UserError(f"'{file}' has no column '{column}': {nearest(column, names)}")
    if list(names).count(column) > 1:
        raise UserError(f"'{file}' has more than one column '{column}': give each a name of its own")


def output_file(path: str | os.PathLike) -> Path:
    """``path``, if a file can be written there.  Asked before the work, not after it."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"'{file}' is a folder: give the name of a file to write")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder '{file.parent}' to write '{file.name}' in: make it")
    return file


def output_files(options: Mapping[str, str | None]) -> None:
    """Refuse files to be written (option -> path; the first one is only read) of which one would overwrite another."""
    (reading, read), *writing = options.items()
    taken = {Path(str(read)).resolve(): reading}
    for option, name in writing:
        if name is None:
            continue
        file = output_file(name).resolve()
        if file in taken:
            raise UserError(f"{option} and {taken[file]} are both '{name}': give each a file of its own")
        taken[file] = option


def output_folder(path: str | os.PathLike) -> Path:
    """``path``, if a folder can be made there, parents included."""
    parent = next(p for p in Path(path).absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"'{path}' cannot be made: '{parent}' is not a folder to write in; choose another place"
        )
    return Path(path)


def _format_by_name(path: str) -> str:
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return "parquet" if name.endswith(PARQUET) else "csv" if name.endswith(TEXT) else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
