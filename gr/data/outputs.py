"""Files that a program writes for a person: at a path of this machine or a URL, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.stores import Store, is_url, remedy, shown
from gr.errors import UserError, first_line

ROWS_PER_GROUP, BYTES_PER_GROUP = 16_384, 1 << 26


def output_file(path: str | os.PathLike) -> str:
    """``path``, if a file can be written there.  Asked before the work, not after it."""
    text = os.fspath(path)
    if is_url(text):
        store, root = Store.at(text)
        with _written_to(text):
            store.is_file(root)
        return text
    file = Path(text)
    if file.is_dir():
        raise UserError(f"'{file}' is a folder: give the name of a file to write")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder '{file.parent}' to write '{file.name}' in: make it")
    return text


def output_files(read: Mapping[str, str | None], written: Mapping[str, str | None]) -> None:
    """Refuse files to be written (option -> path) of which one would overwrite another, or one that is ``read``."""
    taken = {_place(name): option for option, name in read.items() if name is not None}
    for option, name in written.items():
        if name is None:
            continue
        file = _place(output_file(name))
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


def beside(out: str | os.PathLike, ending: str) -> str:
    """The file beside ``out`` with another ending: s3://bucket/recs.parquet, .txt -> s3://bucket/recs.txt."""
    folder, slash, name = os.fspath(out).rpartition("/")
    return f"{folder}{slash}{Path(name).stem}{ending}"


def scratch_of(path: Path) -> Path:
    """Where it is written before it is there; a process's number may be that of one on another host too."""
    path = Path(os.path.abspath(path))  # "." has no name to write beside
    return path.with_name(f".{path.name}.writing-{secrets.token_hex(4)}")


@contextmanager
def delivered(out: str | os.PathLike) -> Iterator[Path]:
    """A path of this machine to write a file at.  It is at ``out`` when the block has ended well, and not before."""
    text = os.fspath(out)
    if is_url(text):
        store, root = Store.at(text)
        with _written_to(text), tempfile.TemporaryDirectory(prefix="gr-out-") as folder:
            scratch = Path(folder, "file")
            yield scratch
            store.upload(scratch, root)
        return
    path = Path(text)
    scratch = scratch_of(path)
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def delivered_folder(out: str | os.PathLike, last: str) -> Iterator[Path]:
    """A new folder of this machine to write files in.  They are the folder ``out`` when the block has ended well, which
    wasn't there before; of a URL the file ``last`` comes last, so that it says that all are there."""
    text = os.fspath(out)
    if is_url(text):
        store, root = Store.at(text.rstrip("/"))
        with _written_to(text), tempfile.TemporaryDirectory(prefix="gr-out-") as folder:
            if store.tree(root):
                raise UserError(f"'{shown(text)}' exists: choose another --out, or remove it")
            yield Path(folder)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == last):
                store.upload(file, f"{root}/{file.name}")
        return
    target = Path(text)
    if os.path.lexists(target):
        raise UserError(f"'{out}' exists: choose another --out, or remove it")
    output_folder(target)
    scratch = scratch_of(target)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        os.rename(scratch, target)
        sync(target.parent)
    except OSError as error:  # a full disk, a folder that somebody made meanwhile
        raise UserError(
            f"cannot write '{out}' ({error.strerror}): make room, or choose another --out"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_output(path: str | os.PathLike) -> None:
    """What an earlier call left there, if it left something."""
    text = os.fspath(path)
    if is_url(text):
        store, root = Store.at(text)
        with _written_to(text):
            store.remove(root)
    else:
        Path(text).unlink(missing_ok=True)


@contextmanager
def parquet_rows(out: str | os.PathLike) -> Iterator[Callable[[pa.Table], None]]:
    """A function that appends tables to ``out``, in row groups of a readable size; visible when all went well."""
    output_file(out)
    pending: list[pa.Table] = []
    writer: pq.ParquetWriter | None = None

    def flush() -> None:
        nonlocal writer
        if pending:
            table = pa.concat_tables(pending).combine_chunks()
            pending.clear()
            writer = writer or pq.ParquetWriter(scratch, table.schema, compression="zstd")
            writer.write_table(table)

    def write(table: pa.Table) -> None:
        pending.append(table)
        if (
            sum(map(len, pending)) >= ROWS_PER_GROUP
            or sum(table.nbytes for table in pending) >= BYTES_PER_GROUP
        ):
            flush()

    with delivered(out) as scratch:
        try:
            yield write
            flush()
            if writer is None:
                raise UserError(f"nothing to write to '{out}': the list of users is empty")
        finally:
            if writer is not None:
                writer.close()


@contextmanager
def _written_to(url: str) -> Iterator[None]:
    """Around the work for what is written to a URL: where that fails, or the scratch disk is full, one sentence."""
    try:
        yield
    except OSError as error:
        fix = remedy(error, "choose another place")
        raise UserError(f"cannot write '{shown(url)}' ({first_line(error)}): {fix}") from None


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _place(path: str) -> str:
    return path if is_url(path) else str(Path(path).resolve())
