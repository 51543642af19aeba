"""Downloads from a real HTTP server on the loopback: checksums, breaks, resuming, archives, being offline."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
import zipfile
from pathlib import Path

import pytest

from gr.data.making.download import Published, download, obtain
from gr.errors import UserError
from gr.progress import Progress

CONTENT = bytes(range(256)) * 40_000  # 10 MB, several blocks
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``files``; ``break_after`` bytes of a reply it hangs up, ``breaks`` times; can ignore ranges."""

    files: dict[str, bytes] = {}
    break_after, breaks, ranges = 0, 0, True
    requests: list[tuple[str, str | None]] = []

    def do_GET(self):
        kind = type(self)
        wanted = self.headers.get("Range")
        kind.requests.append((self.path, wanted))
        content = kind.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and kind.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if kind.breaks > 0:
            kind.breaks -= 1
            body = body[: kind.break_after]
        self.wfile.write(body)
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.files, Server.requests = {"/data/big.bin": CONTENT}, []
    Server.break_after, Server.breaks, Server.ranges = 0, 0, True
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_fetches_once(server, tmp_path):
    url = f"{server}/data/big.bin"
    file = download(url, tmp_path, MD5, Progress())
    assert file == tmp_path / "big.bin" and file.read_bytes() == CONTENT
    download(url, tmp_path, MD5, Progress())
    assert len(Server.requests) == 1
    file.write_bytes(b"damaged since")
    assert download(url, tmp_path, MD5, Progress()).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["big.bin"]


def test_wrong_checksum_is_refused_and_not_kept(server, tmp_path):
    url = f"{server}/data/big.bin"
    Server.files["/data/big.bin"] = CONTENT[:-1] + b"x"
    found = hashlib.md5(Server.files["/data/big.bin"]).hexdigest()
    with pytest.raises(UserError) as error:
        download(url, tmp_path, MD5, Progress())
    assert str(error.value) == (
        f"'{url}' has md5 {found}, published is {MD5[4:]}: fetch it again, "
        f"or fetch {url} by other means and put it into '{tmp_path}'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_transfer_goes_on(server, tmp_path, ranges):
    Server.breaks, Server.break_after, Server.ranges = 2, 3_000_000, ranges
    file = download(f"{server}/data/big.bin", tmp_path, MD5, Progress())
    assert file.read_bytes() == CONTENT
    assert len(Server.requests) == 3
    assert Server.requests[0][1] is None and (Server.requests[2][1] or "").startswith("bytes=")


def test_interrupted_download_is_resumed_by_the_next_call(server, tmp_path):
    url = f"{server}/data/big.bin"
    Server.breaks, Server.break_after = 3, 2_000_000
    with pytest.raises(UserError) as error:
        download(url, tmp_path, MD5, Progress())
    assert "3 times): run again to go on where it stopped, or fetch" in str(error.value)
    have = (tmp_path / "big.bin.part").stat().st_size
    assert 0 < have <= 6_000_000 and not (tmp_path / "big.bin").exists()
    assert download(url, tmp_path, MD5, Progress()).read_bytes() == CONTENT
    assert Server.requests[-1][1] == f"bytes={have}-"


def test_not_found_and_no_server(server, tmp_path):
    with pytest.raises(UserError) as error:
        download(f"{server}/nothing.zip", tmp_path, None, Progress())
    assert str(error.value) == (
        f"cannot fetch {server}/nothing.zip (HTTP 404 Not Found): "
        f"fetch {server}/nothing.zip by other means and put it into '{tmp_path}'"
    )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.zip"
    with pytest.raises(UserError, match="Connection refused"):
        download(url, tmp_path, None, Progress())


def published(url: str | None = None, checksum: str | None = None) -> Published:
    return Published("set.zip", url, checksum, ("a.csv", "b.csv"), "https://example.org/set")


def archive(path: Path, names=("set/a.csv", "set/b.csv", "../../evil.csv")) -> bytes:
    with zipfile.ZipFile(path, "w") as out:
        for name in names:
            out.writestr(name, f"content of {name}")
    return path.read_bytes()


def test_every_way_to_name_a_source(server, tmp_path):
    (tmp_path / "there").mkdir()
    content = archive(tmp_path / "there" / "set.zip")
    checksum = "sha256:" + hashlib.sha256(content).hexdigest()
    Server.files["/set.zip"] = content
    given = published(f"{server}/set.zip", checksum)
    cache = tmp_path / "cache"
    for source in (None, f"{server}/set.zip", str(tmp_path / "there"), str(tmp_path / "there" / "set.zip")):
        folder = obtain(source, given, cache, Progress())
        assert (folder / "a.csv").read_text() == "content of set/a.csv", source
        assert sorted(p.name for p in folder.iterdir()) == ["a.csv", "b.csv"]
    assert obtain(str(cache), given, cache, Progress()) == cache / "set"  # the folder above works, too
    assert obtain(str(cache / "set" / "a.csv"), given, cache, Progress()) == cache / "set"
    assert not list(tmp_path.rglob("evil.csv")) and not (tmp_path.parent / "evil.csv").exists()


def test_sources_that_cannot_be_used(tmp_path):
    hint = "get set.zip from https://example.org/set, and give --source its path or the folder with a.csv and b.csv"
    for source, message in (
        (None, f"set.zip has no URL to fetch it from: {hint}"),
        (str(tmp_path / "no"), f"there is no file or folder '{tmp_path / 'no'}': {hint}"),
        (str(tmp_path), f"'{tmp_path}' does not hold a.csv and b.csv: {hint}"),
    ):
        with pytest.raises(UserError) as error:
            obtain(source, published(), tmp_path / "cache", Progress())
        assert str(error.value) == message
    archive(tmp_path / "other.zip", ["x/a.csv"])
    with pytest.raises(UserError) as error:
        obtain(str(tmp_path / "other.zip"), published(), tmp_path / "cache", Progress())
    assert str(error.value) == f"'{tmp_path / 'other.zip'}' does not hold b.csv: {hint}"
    (tmp_path / "set.zip").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"has md5 .* published is 00: fetch it again, or get set.zip from"):
        obtain(str(tmp_path), published(checksum="md5:00"), tmp_path / "cache", Progress())


def test_offline_says_what_to_fetch(tmp_path):
    url = "https://gr.invalid/set.zip"  # a name that no resolver knows (RFC 2606)
    with pytest.raises(UserError) as error:
        obtain(None, published(url), tmp_path, Progress())
    assert str(error.value).startswith(f"cannot fetch {url} (")
    assert str(error.value).endswith(
        "): get set.zip from https://example.org/set, and give --source its path or the folder with a.csv and b.csv"
    )
