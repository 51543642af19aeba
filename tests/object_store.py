"""Real servers of S3 (moto) and of Google's storage (gcp-storage-emulator) on loopback, each behind a proxy that counts
requests and makes some of them fail."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "nobodymayreadthiskey"
ACCESS = "AKIDNOBODYMAYREAD"
STARTING_SECONDS = 60
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Asked:
    """A request.  ``key``: bucket and name, without the query.  ``bytes``: (first, last) of the range, or None."""

    method: str
    key: str
    query: str
    bytes: tuple[int, int] | None

    @property
    def size(self) -> int:
        return 0 if self.bytes is None else self.bytes[1] - self.bytes[0] + 1


Fault = Callable[[Asked], str | None]
"""What becomes of a request: None (nothing), "403", "503", "cut" (in the middle of the body), "stall" or "slow"."""


class Proxied:
    """``asked``: all requests since :meth:`forget`.  ``fault``: decides about each."""

    def __init__(self, behind: tuple[str, int]) -> None:
        self.behind = behind
        self.asked: list[Asked] = []
        self.fault: Fault = lambda asked: None
        self.stalls = threading.Event()
        store = self

        class Proxy(_Proxy):
            owner = store

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._proxy.server_port}"

    def forget(self) -> None:
        self.asked, self.fault = [], lambda asked: None

    def stop(self) -> None:
        self.stalls.set()
        self._proxy.shutdown()
        self._proxy.server_close()


class ObjectStore(Proxied):
    """S3."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        super().__init__(self._moto.get_host_and_port())

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def put(self, key: str, content: bytes = b"") -> None:
        """An object, or a bucket, by the back door."""
        self._behind("PUT", key, content)

    def get(self, key: str) -> bytes:
        return self._behind("GET", key)

    def delete(self, key: str) -> None:
        self._behind("DELETE", key)

    def names(self, prefix: str = "") -> list[str]:
        """Names in the bucket ``data``."""
        listing = self._behind("GET", f"data?list-type=2&prefix={prefix}").decode()
        return sorted(re.findall("<Key>(.*?)</Key>", listing))

    def _behind(self, method: str, key: str, content: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection(*self.behind)
        connection.request(
            method,
            f"/{key}",
            content or None,
            {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request"},
        )
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status < 300, (answer.status, body)
        return body

    def gets(self, ending: str = "") -> list[Asked]:
        return [
            a
            for a in self.asked
            if a.method == "GET" and a.key.endswith(ending) and "list-type" not in a.query
        ]

    def stop(self) -> None:
        super().stop()
        self._moto.stop()


class CloudStorage(Proxied):
    """Google's, in a process of its own, with a bucket ``data``."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = free.getsockname()
        command = [
            sys.executable,
            "-m",
            "gcp_storage_emulator",
            "start",
            "--in-memory",
            "--default-bucket=data",
        ]
        command += [f"--host={place[0]}", f"--port={place[1]}"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        late = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                socket.create_connection(place, 1).close()
                break
            except OSError:
                assert self._server.poll() is None and time.monotonic() < late, "the server doesn't answer"
                time.sleep(0.05)
        super().__init__(place)

    @property
    def environment(self) -> dict[str, str]:
        """The second keeps the client from looking for other kinds of buckets, and so for credentials."""
        own = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}
        return {"STORAGE_EMULATOR_HOST": self.url, **own}

    def stop(self) -> None:
        super().stop()
        self._server.terminate()
        self._server.wait()


def first(count: int, what: str, of: Callable[[Asked], bool] = lambda asked: True) -> Fault:
    """The first ``count`` requests that ``of`` picks fail."""
    left = [count]
    lock = threading.Lock()

    def fault(asked: Asked) -> str | None:
        with lock:
            if not of(asked) or left[0] == 0:
                return None
            left[0] -= 1
            return what

    return fault


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxied

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        key, _, query = self.path.lstrip("/").partition("?")
        span = self.headers.get("Range", "").removeprefix("bytes=").split("-")
        asked = Asked(
            self.command, key, query, (int(span[0]), int(span[1])) if len(span) == 2 and all(span) else None
        )
        self.owner.asked.append(asked)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.fault(asked)
        if fault == "stall":
            self.owner.stalls.wait(60)
            self.close_connection = True
            return
        if fault == "403":
            self._send(403, [], b"")
            return
        if fault == "503":
            self._send(
                503, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else SLOW_DOWN
            )
            return
        connection = http.client.HTTPConnection(*self.owner.behind)
        try:
            connection.request(self.command, self.path, content or None, dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        kept = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "date", "server")
            and not (name.lower() == "content-length" and self.command != "HEAD")
        ]
        self._send(answer.status, kept, body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _answer

    def _send(
        self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(body)))
        elif not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            step = len(body) // 8 + 1
            for start in range(0, len(body), step):
                time.sleep(0.05)
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
        else:
            self.wfile.write(body)
