"""What preparing needs of a log, and of who does the work."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa

from gr.data.folder import Folder
from gr.data.making.ids import IdCodes
from gr.data.making.partitions import Store
from gr.data.making.passes import Counting, Found, Sorting, Writing
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import Preparation
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.progress import Stage


class Actions(Protocol):
    """A log as preparing sees it: :class:`gr.data.making.log.LogReader`, or a source with a format of its own."""

    rows_read: int
    estimated_rows: int

    @property
    def has_times(self) -> bool: ...

    @property
    def ticks_per_second(self) -> int: ...

    @property
    def table_schema(self) -> pa.Schema:
        """Of the checked tables (see gr.data.making.log)."""

    def tables(self, chunk_rows: int, quarantine: Quarantine) -> Iterator[pa.Table]:
        """Checked tables in the log's order."""

    def remarks(self) -> list[str]:
        """What to tell the user and was not told before: asked for before and after reading."""

    def facts(self) -> dict[str, Any]:
        """How the log was read, for the manifest: asked for after reading."""

    # -- to be read by several processes

    def identity(self) -> Any:
        """What changes when the log does, as JSON; None where nothing tells."""

    def parts(self) -> Iterable[Any]:
        """The log cut into parts, in its order, whoever reads them."""

    def only(self, part: Any) -> Actions:
        """A reader of one part, that has read nothing yet."""

    def seen(self) -> dict[str, Any]:
        """What reading has found out and ``remarks`` and ``facts`` go by, as JSON."""

    def add_seen(self, seen: dict[str, Any]) -> None:
        """Take in what a reader of the next part has seen."""


class Executor(Protocol):
    """Who does the work: in a ``with`` that ends with all that was put aside removed."""

    quarantine: Quarantine

    @property
    def store(self) -> Store:
        """The partitions, when the log has been read."""

    @property
    def dataset(self) -> Path | None:
        """Where the dataset is put together, None leaves that to its writer."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def read(self, stage: Stage) -> tuple[IdCodes, IdCodes]:
        """Read the log into partitions; the codes that they have for items and action types."""

    def go(self, name: str, step: Sorting | Counting, found: Found) -> Found:
        """One pass over all partitions, a stage called ``name``; adds to ``found`` and returns it."""

    def write(self, step: Writing, found: Found, writer: DatasetWriter) -> Found:
        """The pass that writes the sequences."""

    def out_of_memory(self) -> UserError:
        """What to say when there was no memory for what this process did last."""


def is_no_space(error: OSError) -> bool:
    """Whether a disk, or a quota of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def name_of(out: str) -> str:
    """The last part of a path or URL."""
    return out.rstrip("/").rpartition("/")[2]


def workplace(out: str, options: Preparation) -> Path:
    """The folder, made if need be, in which lies what is put aside until ``out`` is complete: ``scratch``, beside a
    path of this machine, or else among the machine's temporary files."""
    local = Folder(out).local
    where = Path(tempfile.gettempdir()) if local is None else Path(os.path.abspath(local)).parent
    if options.scratch:
        where = Path(options.scratch)
    where.mkdir(parents=True, exist_ok=True)
    return where


def no_space(out: str) -> UserError:
    """What to say then."""
    return UserError(
        f"no space is left on the disk for '{out}' and its partitions (20 bytes an action with integer ids, and the "
        "dataset): make room, or set scratch to a folder on another disk"
    )


@contextmanager
def saying_no_space(out: str) -> Iterator[None]:
    """A full disk is a sentence."""
    try:
        yield
    except OSError as error:
        if not is_no_space(error):
            raise
        raise no_space(out) from None
