"""Published files: found in a folder or archive, or fetched by URL with progress, resume and checksum."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import fsspec

from gr.data.stores import is_url
from gr.errors import UserError
from gr.progress import Progress

BLOCK = 2**20
TIMEOUT_SECONDS = 30
ATTEMPTS = 3


@dataclass(frozen=True)
class Published:
    """A data set's published file.  ``checksum``: "md5:..." or "sha256:...", None where the publisher gives none.
    ``files``: what is needed of it; ``site``: the page for people."""

    file: str
    url: str | None
    checksum: str | None
    files: tuple[str, ...]
    site: str


def downloads(cache: str | None, out: str) -> Path:
    """The folder for downloads: ``cache``, or ``downloads`` beside ``out`` (in the current folder if that is a URL)."""
    if cache:
        return Path(cache)
    return (Path() if is_url(out) else Path(out).parent) / "downloads"


def obtain(source: str | None, published: Published, cache: Path, progress: Progress) -> Path:
    """The local folder with ``published.files``.

    ``source``: a folder that holds them (itself or one below), the published file, one of the needed files, or a
    URL; None is the published URL.  Downloads are kept in ``cache`` and checked before they are used.
    """
    source = source or published.url
    if source is None:
        raise UserError(f"{published.file} has no URL to fetch it from: {_by_hand(published)}")
    scheme = urlparse(source).scheme
    if len(scheme) > 1 and scheme != "file":
        file = download(
            source, cache, _checksum_for(source, published), progress, by_hand=_by_hand(published)
        )
        return _unpack(file, published, cache)
    path = Path(urlparse(source).path if scheme == "file" else source)
    if path.is_dir():
        if folder := _folder_with(path, published.files):
            return folder
        if (archive := path / published.file).is_file():
            verify(archive, _checksum_for(archive.name, published), by_hand=_by_hand(published))
            return _unpack(archive, published, cache)
        raise UserError(f"'{path}' does not hold {_and(published.files)}: {_by_hand(published)}")
    if not path.is_file():
        raise UserError(f"there is no file or folder '{path}': {_by_hand(published)}")
    if path.name not in published.files:
        verify(path, _checksum_for(path.name, published), by_hand=_by_hand(published))
    return _unpack(path, published, cache)


def download(url: str, folder: Path, checksum: str | None, progress: Progress, by_hand: str = "") -> Path:
    """Fetch ``url`` into ``folder``; a file that is there already and has the checksum is not fetched again.

    A transfer that breaks off is resumed where it stopped, here and by the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (PurePosixPath(urlparse(url).path).name or "download")
    by_hand = by_hand or f"fetch {url} by other means and put it into '{folder}'"
    if file.is_file() and checksum and _digest(file, checksum) == checksum.partition(":")[2]:
        progress.note(f"'{file}' is there and its {checksum.partition(':')[0]} is right")
        return file
    part = file.with_name(file.name + ".part")
    if urlparse(url).scheme in ("http", "https"):
        _fetch_http(url, part, progress, by_hand)
    else:
        _fetch_other(url, part, progress, by_hand)
    try:
        verify(part, checksum, name=url, by_hand=by_hand)
    except UserError:
        part.unlink()
        raise
    part.replace(file)
    return file


def verify(file: Path, checksum: str | None, name: str | None = None, by_hand: str = "") -> None:
    """Raise UserError unless the file has the checksum (None: nothing is known, nothing is checked)."""
    if checksum is None:
        return
    algorithm, _, wanted = checksum.partition(":")
    if (found := _digest(file, checksum)) != wanted:
        raise UserError(
            f"'{name or file}' has {algorithm} {found}, published is {wanted}: fetch it again, or {by_hand}"
        )


def _fetch_http(url: str, part: Path, progress: Progress, by_hand: str) -> None:
    total: int | None = None
    for attempt in range(1, ATTEMPTS + 1):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                resumed = response.status == 206
                length = response.headers.get("Content-Length")
                total = (have if resumed else 0) + int(length) if length else None
                with (
                    progress.stage("fetching", total, "bytes") as stage,
                    part.open("ab" if resumed else "wb") as out,
                ):
                    stage.advance(have if resumed else 0)
                    while block := response.read(BLOCK):
                        out.write(block)
                        stage.advance(len(block))
            size = part.stat().st_size
            if total is None or size == total:
                return
            reason = f"it broke off after {size:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            if (
                error.code == 416 and have
            ):  # nothing is left to send, or the file has changed: the checksum tells
                return
            raise UserError(f"cannot fetch {url} (HTTP {error.code} {error.reason}): {by_hand}") from None
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = f"it broke off: {error or type(error).__name__}"
        except (urllib.error.URLError, OSError) as error:
            raise UserError(f"cannot fetch {url} ({getattr(error, 'reason', error)}): {by_hand}") from None
        if attempt < ATTEMPTS:
            progress.note(f"{url}: {reason}; going on where it stopped")
            time.sleep(0.2 * attempt)
    raise UserError(
        f"cannot fetch {url} ({reason}, {ATTEMPTS} times): run again to go on where it stopped, or {by_hand}"
    )


def _fetch_other(url: str, part: Path, progress: Progress, by_hand: str) -> None:
    try:
        with fsspec.open(url, "rb") as source, part.open("wb") as out:
            with progress.stage("fetching", None, "bytes") as stage:
                while block := source.read(BLOCK):
                    out.write(block)
                    stage.advance(len(block))
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"cannot fetch {url} ({str(error).splitlines()[0].rstrip('.')}): {by_hand}") from None


def _unpack(file: Path, published: Published, cache: Path) -> Path:
    """The folder with the needed files, taken out of ``file`` if it is an archive."""
    if file.name in published.files:
        return file.parent
    if not zipfile.is_zipfile(file):
        raise UserError(
            f"'{file}' is neither {_and(published.files)} nor a zip archive: {_by_hand(published)}"
        )
    folder = cache / file.stem
    with zipfile.ZipFile(file) as archive:
        members = {PurePosixPath(m.filename).name: m for m in archive.infolist() if not m.is_dir()}
        if missing := [name for name in published.files if name not in members]:
            raise UserError(f"'{file}' does not hold {_and(missing)}: {_by_hand(published)}")
        folder.mkdir(parents=True, exist_ok=True)
        for (
            name
        ) in published.files:  # by their own names: a path inside the archive cannot lead out of the folder
            with archive.open(members[name]) as packed, (folder / name).open("wb") as out:
                shutil.copyfileobj(packed, out, BLOCK)
    return folder


def _folder_with(path: Path, files: tuple[str, ...]) -> Path | None:
    candidates = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
    return next((c for c in candidates if all((c / name).is_file() for name in files)), None)


def _checksum_for(source: str, published: Published) -> str | None:
    """The published checksum, if ``source`` is the published file by its name."""
    return published.checksum if PurePosixPath(urlparse(source).path).name == published.file else None


def _digest(file: Path, checksum: str) -> str:
    digest = hashlib.new(checksum.partition(":")[0], usedforsecurity=False)
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _by_hand(published: Published) -> str:
    return (
        f"get {published.file} from {published.site}, and give --source its path or the folder with "
        f"{_and(published.files)}"
    )


def _and(names) -> str:
    return " and ".join(names)
