"""Stores: what lies behind a URL, by fsspec (S3, GCS, HDFS, ...), as files that are read in ranges and written whole.

One place says how often a request is repeated, how long it may stand still, and what its failure is called.  Every
method raises FileNotFoundError where there is nothing, Unreachable where all attempts failed, OSError for all else.
Credentials come from the environment, or from files of the store's client; none is kept here.

GR_STORE_ATTEMPTS (5): how often a request is made before it has failed.  GR_STORE_TIMEOUT (20): seconds without a byte
after which an attempt at S3 has failed; other clients have a setting of their own.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from gr.errors import UserError, first_line

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

LARGEST_RANGE = 1 << 24
"""Bytes of a request; larger ranges are several requests at a time."""
AHEAD = 8
"""Reads of a store that are on their way at a time."""
FILES_KEPT = 256
"""Files of S3 that are kept open: opening one is a request."""
FIRST_PAUSE_S, PAUSE_FACTOR = 0.1, 3.0
OBJECT_STORES = frozenset(
    ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "memory")
)
"""Protocols whose folders are parts of names: nothing has to be made before a file is written.  (s3fs would make a
bucket that isn't there.)"""
_FOR_GOOD = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FOR_GOOD_BY_NAME = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"),
    *("InvalidRegionError", "UnknownEndpointError", "DefaultCredentialsError", "RefreshError"),
    *("NotImplementedError", "ValueError", "TypeError"),
)
"""Errors of clients, by the name of their type (their packages may not be there), that no repetition mends."""
_REFUSED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|TOKEN|HTTP status (30\d|40[013])")
"""What Arrow's client of S3 says where it has not the right credentials, or is in the wrong region."""


class StoreError(OSError):
    """A request that the store didn't do; ``filename``: its URL."""

    def __init__(self, said: str, where: str):
        super().__init__(said)
        self.said, self.strerror, self.filename = said, said, where

    def __str__(self) -> str:
        return self.said

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, str]]:
        return type(self), (self.said, self.filename)


class Denied(StoreError, PermissionError):
    """A request that the store won't do for who asks."""


class Unreachable(StoreError):
    """A request that failed as often as it was made."""


class Store:
    """The files behind URLs of one file system of fsspec.  Paths are the file system's own, without protocol."""

    def __init__(self, filesystem: Any):
        self.filesystem = filesystem
        if "gs" in self.protocols:  # its client writes tracebacks of what it is refused
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        # s3fs repeats on its own, up to 25 times: here it is done for every store in the same way
        if hasattr(filesystem, "retries"):
            filesystem.retries = 1
        self._ranged: _ArrowS3 | None = None
        if "s3" in self.protocols:  # lives as long as s3fs' client, whoever asks
            self._ranged = filesystem.__dict__.setdefault("_gr_ranged", _ArrowS3(filesystem))

    @staticmethod
    def at(url: str) -> tuple[Store, str]:
        """The store of a URL and the path in it; a UserError for a URL that can't be one."""
        refuse_password(url)
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(url, **_client_options(url))
        except (ImportError, ValueError, OSError) as error:
            fix = (
                "install what it names" if isinstance(error, ImportError) else "check the URL and its access"
            )
            raise UserError(f"cannot open '{shown(url)}' ({first_line(error)}): {fix}") from None
        return Store(filesystem), path

    @property
    def protocols(self) -> tuple[str, ...]:
        protocol = self.filesystem.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def size(self, path: str) -> int | None:
        """Bytes; None where the store doesn't tell."""
        found = self._info(path).get("size")
        return None if found is None else int(found)

    def read(self, path: str) -> bytes:
        """All of a file."""
        return self.asked(lambda: self.filesystem.cat_file(path), path)

    def ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (start, stop), one request each, at the same time where the client can."""
        found: list[Any] = [None] * len(ranges)
        left = list(range(len(ranges)))

        def ask() -> None:
            contents = self._asked_ranges(path, [ranges[n] for n in left])
            problem: BaseException | None = None
            for n, content in zip(list(left), contents):
                start, stop = ranges[n]
                if isinstance(content, BaseException):
                    problem = content
                elif len(content) != stop - start:
                    problem = OSError(f"bytes {start} to {stop} are asked for and {len(content)} come")
                else:
                    found[n] = content
                    left.remove(n)
            if problem is not None:
                raise problem

        if left:
            self.asked(ask, path)
        return found

    def files(self, folder: str) -> dict[str, int]:
        """Name -> bytes of the files directly in a folder; empty where there is none."""

        return self._named(folder, lambda: self.filesystem.ls(folder, detail=True))

    def tree(self, folder: str) -> dict[str, int]:
        """Name -> bytes of all files below a folder, as names in it; empty where there is none."""
        return self._named(folder, lambda: list(self.filesystem.find(folder, detail=True).values()))

    def is_file(self, path: str) -> bool:
        try:
            return self._info(path)["type"] == "file"
        except FileNotFoundError:
            return False

    def write(self, path: str, content: bytes) -> None:
        """A file at once, parents included: a reader sees all of it or nothing, as far as the store promises that."""

        def put() -> None:
            self._make_parent(path)
            self.filesystem.pipe_file(path, content)

        self.asked(put, path)

    def upload(self, file: Path, path: str) -> None:
        """A file of this machine, likewise."""

        def put() -> None:
            self._make_parent(path)
            self.filesystem.put_file(str(file), path)

        self.asked(put, path)

    def download(self, path: str, file: Path) -> None:
        """A whole file to this machine, written at ``file`` piece after piece."""
        size = self.size(path)
        with file.open("wb") as out:
            if size is None:
                out.write(self.read(path))
                return
            for start in range(0, size, LARGEST_RANGE):
                out.write(self.ranges(path, [(start, min(start + LARGEST_RANGE, size))])[0])

    def copy(self, path: str, other: str) -> None:
        """Within the store."""

        def put() -> None:
            self._make_parent(other)
            self.filesystem.cp_file(path, other)

        self.asked(put, other)

    def remove(self, path: str) -> None:
        """A file, if it is there."""
        with suppress(FileNotFoundError):
            self.asked(lambda: self.filesystem.rm_file(path), path)

    def _asked_ranges(self, path: str, ranges: list[tuple[int, int]]) -> list[Any]:
        """The bytes of each, or the error instead of them."""
        refusal: OSError | None = None
        if self._ranged is not None and not self._ranged.useless:
            try:
                return self._ranged.read(path, ranges)
            except OSError as error:
                if not _REFUSED.search(str(error)):
                    raise
                refusal = error
        starts, stops = zip(*ranges)
        contents = self.filesystem.cat_ranges([path] * len(ranges), list(starts), list(stops))
        if refusal is not None and not any(isinstance(content, BaseException) for content in contents):
            assert self._ranged is not None
            self._ranged.useless = True
            log.info("%s is read by fsspec's client alone (%s)", self.protocols[0], first_line(refusal))
        return contents

    def _named(self, folder: str, entries: Callable[[], list[dict[str, Any]]]) -> dict[str, int]:
        """Name in the folder -> bytes, of the files among its ``entries``."""
        root = folder.rstrip("/") + "/"
        self.filesystem.invalidate_cache()  # clients keep lists
        try:
            found = self.asked(entries, folder)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            entry["name"].removeprefix(root): int(entry.get("size") or 0)
            for entry in found
            if entry["type"] == "file" and entry["name"].startswith(root) and entry["name"] != root
        }

    def _info(self, path: str) -> dict[str, Any]:
        self.filesystem.invalidate_cache()
        return self.asked(lambda: self.filesystem.info(path), path)

    def _make_parent(self, path: str) -> None:
        if not OBJECT_STORES.intersection(self.protocols):
            self.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)

    def asked(self, action: Callable[[], T], path: str) -> T:
        """``action()``, again after a pause where it failed and may not fail again."""
        attempts, pause = attempts_of_requests(), FIRST_PAUSE_S
        for attempt in range(1, attempts + 1):
            try:
                return action()
            except Exception as error:
                where = shown(self.filesystem.unstrip_protocol(path))
                if isinstance(error, PermissionError) or _refused(error):
                    raise Denied(first_line(error), where) from error
                if isinstance(error, (UserError, *_FOR_GOOD)):
                    raise
                said = f"{type(error).__name__}: {first_line(error)}"
                if any(kind.__name__ in _FOR_GOOD_BY_NAME for kind in type(error).__mro__):
                    raise StoreError(said, where) from error
                if attempt == attempts:
                    raise Unreachable(f"{said}, at {attempts} attempts", where) from error
            time.sleep(pause * random.uniform(0.75, 1.25))
            pause *= PAUSE_FACTOR
        raise AssertionError("an attempt returns or raises")


class _ArrowS3:
    """Reads ranges of S3 by Arrow's client, which takes half of s3fs' time for them, with s3fs' settings.

    ``useless``: it was refused what s3fs, which knows more sorts of credentials, was given.
    """

    def __init__(self, filesystem: Any):
        self.filesystem, self.useless = filesystem, False
        self._client: Any = None
        self._files: dict[str, Future[pa.NativeFile]] = {}
        self._lock = threading.Lock()

    def read(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        ahead = min(len(ranges), AHEAD) if len(ranges) > 1 else 0
        known = path in self._files
        file = self._file(path)
        try:
            contents = list(in_order(lambda span: file.read_at(span[1] - span[0], span[0]), ranges, ahead))
        except BaseException:
            self._files.pop(path, None)
            raise
        if any(len(content) < stop - start for content, (start, stop) in zip(contents, ranges)):
            self._files.pop(path, None)
            if known:  # another one has come to its place, and is longer
                return self.read(path, ranges)
        return contents

    def _file(self, path: str) -> pa.NativeFile:
        """Opened once: that is a request."""
        with self._lock:
            self._client = self._client or self._connected()
            opening = self._files.get(path)
            mine = opening is None
            if opening is None:
                if len(self._files) >= FILES_KEPT:
                    self._files.pop(next(iter(self._files)))
                opening = self._files[path] = Future()
        if mine:
            try:
                opening.set_result(self._client.open_input_file(path))
            except BaseException as error:
                self._files.pop(path, None)
                opening.set_exception(error)
        return opening.result()

    def _connected(self) -> Any:
        from pyarrow import fs

        s3 = self.filesystem
        s3.connect()
        meta, given = s3.s3.meta, s3.config_kwargs
        own = not re.search(r"\.amazonaws\.com(\.cn)?$", urlsplit(meta.endpoint_url).hostname or "")
        keys = {"access_key": s3.key, "secret_key": s3.secret, "session_token": s3.token} if s3.key else {}
        return fs.S3FileSystem(
            **keys,
            anonymous=bool(s3.anon),
            region=meta.region_name or "us-east-1",
            endpoint_override=meta.endpoint_url if own else None,
            connect_timeout=given.get("connect_timeout"),
            request_timeout=given.get("read_timeout"),
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        )


def in_order(read: Callable[[T], R], of: Iterable[T], ahead: int) -> Generator[R, None, None]:
    """``read`` of each, in order; ``ahead`` of them are read at the same time, each in a thread.  0: none is."""
    if not ahead:
        yield from map(read, of)
        return
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(ahead, "gr-store")
    try:
        for item in of:
            pending.append(pool.submit(read, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _refused(error: Exception) -> bool:
    """Whether it is how gcsfs says that one may not."""
    return getattr(error, "code", None) in (401, "401") or str(error).startswith("Forbidden: ")


def is_url(text: str) -> bool:
    """Whether it is fsspec's to open: ``s3://bucket/key``, or a chain as ``simplecache::s3://...``."""
    return "://" in text or "::" in text


def refuse_password(url: str) -> None:
    """Refuse a URL with a password in it: it would stand in messages, manifests and configs."""
    if re.match(r"[^/]*//[^/@]*:[^/@]*@", url):
        shown = re.sub(r"//[^/@]*@", "//", url)
        raise UserError(
            f"the URL of '{shown}' holds a password, and a run writes its config down: give it to the storage's "
            "client by its environment variables or its own file"
        )


def shown(url: str) -> str:
    """A URL as messages and manifests have it: without the query, in which signed URLs carry what opens them."""
    return re.sub(r"^(https?://[^?]*)\?.*", r"\1", url)


def all_shown(value: Any) -> Any:
    """:func:`shown` of all texts in lists and dictionaries."""
    if isinstance(value, dict):
        return {key: all_shown(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [all_shown(entry) for entry in value]
    return shown(value) if isinstance(value, str) else value


def attempts_of_requests() -> int:
    """How often a request is made before it has failed."""
    return max(int(_setting("GR_STORE_ATTEMPTS", 5)), 1)


def remedy(error: BaseException, otherwise: str) -> str:
    """What to do about a file that can't be read: ``otherwise``, where its content is to blame."""
    if isinstance(error, Unreachable):
        return "see to the store and the network, and run it again"
    if isinstance(error, PermissionError):
        return "see to your access to it, and run it again"
    return otherwise


def _client_options(url: str) -> dict[str, Any]:
    """What fsspec's client of the URL's store is told beside its own configuration."""
    if "s3://" not in url and "s3a://" not in url:
        return {}
    from fsspec.config import conf

    seconds = _setting("GR_STORE_TIMEOUT", 20.0)
    ours = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"total_max_attempts": 1}}
    given = conf.get("s3", {}).get("config_kwargs", {})
    protocol = "s3" if "s3://" in url else "s3a"
    return {protocol: {"config_kwargs": {**ours, **given}}}


def _setting(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise UserError(f"{name} is '{text}': give a number") from None
