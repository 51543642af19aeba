"""Two hosts on one machine: network namespaces joined by a bridge.

Each has an address of its own and a link that can be cut.  Disks are shared, as is the host's name.  Where a machine
doesn't permit that, :func:`two_hosts` skips the test with the reason.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Host:
    """A namespace, its address, the end of its link that lies outside of it, and the bridge that it leads to."""

    name: str
    address: str
    link: str
    bridge: str

    def cut(self) -> None:
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        _ip("link", "set", self.link, "up")

    def pids(self) -> list[int]:
        """Every process that runs there."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts that reach each other; all that still runs on them ends with the context."""
    if shutil.which("ip") is None:
        pytest.skip("there is no program 'ip'")
    number = os.getpid() % 250
    bridge = f"gr-br{number}"
    hosts = [Host(f"gr-{number}-{n}", f"10.77.{number}.{n + 1}", f"gr{number}v{n}", bridge) for n in range(2)]
    try:
        try:
            _join(hosts, bridge)
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", None) or error
            pytest.skip(f"network namespaces that reach each other are not permitted here: {why}")
        yield hosts
    finally:
        for host in hosts:
            for pid in host.pids():
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{host.name}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def _join(hosts: list[Host], bridge: str) -> None:
    _ip("link", "add", bridge, "type", "bridge")
    _ip("link", "set", bridge, "up")
    for host in hosts:
        _ip("netns", "add", host.name)
        _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", host.link, "master", bridge, "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
        _names(host, hosts)
    place = (hosts[0].address, 9)
    listen = (
        f"import socket; s = socket.create_server({place}); print(flush=True); s.settimeout(30); s.accept()"
    )
    call = f"import socket; socket.create_connection({place}, timeout=5)"
    deadline = time.monotonic() + 20  # links of a busy machine take a while to come up
    with subprocess.Popen(_on(hosts[0], listen), stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        try:
            while (said := subprocess.run(_on(hosts[1], call), capture_output=True, text=True)).returncode:
                if time.monotonic() > deadline:
                    said.check_returncode()
        finally:
            listener.kill()


def _on(host: Host, program: str) -> list[str]:
    return ["ip", "netns", "exec", host.name, sys.executable, "-c", program]


def _names(host: Host, hosts: list[Host]) -> None:
    """What it looks names up in: without names each connection waits five seconds for nobody's answer."""
    folder = Path("/etc/netns", host.name)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{prefix}{h.address} {h.name}" for prefix in ("", "::ffff:") for h in hosts]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
