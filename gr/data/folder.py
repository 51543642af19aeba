"""Folder: the place of a dataset, a path of this machine or any URL that fsspec knows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gr.errors import UserError


class Folder:
    """Reads files of a folder, and adds some.

    ``name`` is what messages call it; ``local`` its path on this machine, or None.  Every reading method raises
    FileNotFoundError where there is no such file and OSError for all else that goes wrong.
    """

    def __init__(self, where: str | os.PathLike):
        text = os.fspath(where)
        self._filesystem: Any = None
        self.local: Path | None = None
        if not is_url(text):
            self.name, self.local = text, Path(text)
            return
        self.name = text.rstrip("/")
        if re.match(r"[^/]*//[^/@]*:[^/@]*@", text):
            shown = re.sub(r"//[^/@]*@", "//", text)
            raise UserError(
                f"the URL of '{shown}' holds a password, and a run writes its config down: give it to the storage's "
                "client by its environment variables or its own file"
            )
        import fsspec

        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.name)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"cannot open '{self.name}' ({first_line(error)}): check the URL") from None
        if "file" in _protocols(self._filesystem):  # file:///data/set is /data/set
            self.local = Path(self._root)

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
        with _as_os_errors():
            return self._filesystem.cat_file(f"{self._root}/{file}")

    def files(self, folder: str) -> set[str]:
        """Names of the files directly in a folder of this folder."""
        if self.local is not None:
            return {entry.name for entry in os.scandir(self.local / folder) if entry.is_file()}
        with _as_os_errors():
            entries = self._filesystem.ls(f"{self._root}/{folder}", detail=True)
        return {e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "file"}

    @contextmanager
    def opened(self, file: str) -> Iterator[Any]:
        """What pyarrow reads the file from."""
        if self.local is not None:
            yield str(self.local / file)
            return
        with _as_os_errors(), self._filesystem.open(f"{self._root}/{file}", "rb") as stream:
            yield stream

    def publish(self, file: str, content: bytes) -> None:
        """Write a file, parents included; a reader sees all of it or nothing (where the storage can't rename, that
        is the storage's promise for one object)."""
        if self.local is None:
            with _as_os_errors():
                self._filesystem.makedirs(f"{self._root}/{file}".rpartition("/")[0], exist_ok=True)
                self._filesystem.pipe_file(f"{self._root}/{file}", content)
            return
        target = self.local / file
        target.parent.mkdir(exist_ok=True)
        scratch = target.with_name(f".{target.name}.writing-{os.getpid()}")
        try:
            scratch.write_bytes(content)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)


def is_url(text: str) -> bool:
    return "://" in text or "::" in text


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Clients of object stores raise whatever they like: their errors become OSError, which readers know."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, UserError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
