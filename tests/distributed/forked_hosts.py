"""torchrun on two hosts (tests/distributed/hosts.py) without what its starts cost: agents and ranks are forked from a
server that has imported everything, and enter their host's namespaces.

What differs from a start by launch/cluster/hosts.sh: a rank is no child of its agent, so a thread of it looks whether
the agent is there and sends what Linux sends to a child whose parent has died.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed.group import preload
from tests.distributed.hosts import Host

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PORT = 29400


def server() -> str:
    """The address of this process's fork server, which runs."""
    preload()
    forkserver.ensure_running()
    return forkserver._forkserver._forkserver_address


class Job:
    """One run over ``hosts``, an agent with one rank on each.  said(): what all of them printed."""

    def __init__(self, hosts: list[Host], folder: Path, arguments: list[str], pace: float, identity: str):
        folder.mkdir(parents=True)
        self.folder, address = folder, server()
        self.agents: list[BaseProcess] = []
        self._told = False
        for number in range(len(hosts)):
            given = (number, hosts, str(folder), arguments, pace, identity, address)
            agent = get_context("forkserver").Process(target=_agent, args=given)
            agent.start()
            self.agents.append(agent)

    def worker(self, number: int) -> int | None:
        """The process that trains on host ``number``, of the latest attempt."""
        files = [file for file in self.folder.glob(f"worker-{number}-*") if file.read_text()]
        pids = [int(file.read_text()) for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]
        return pids[-1] if pids and _runs(pids[-1]) else None

    def ended(self) -> bool:
        """Whether all agents have.  Where one has ended badly the others are told to leave, as launchers do it."""
        if any(agent.exitcode for agent in self.agents) and not self._told:
            self._told = True
            for agent in self.agents:
                agent.terminate()
        return all(agent.exitcode is not None for agent in self.agents)

    def statuses(self) -> list[int | None]:
        return [agent.exitcode for agent in self.agents]

    def said(self) -> str:
        logs = [
            *self.folder.glob("agent-*.log"),
            *self.folder.rglob("stdout.log"),
            *self.folder.rglob("stderr.log"),
        ]
        return "".join(file.read_text(errors="replace") for file in sorted(logs))

    def kill(self, hosts: list[Host]) -> None:
        """Whatever is left of it."""
        for agent in self.agents:
            agent.kill()
        for host in hosts:
            for pid in host.pids():
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.join(10)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def enter(host: Host) -> None:
    """Be a process of ``host``: its network, and its names, which stand over this machine's."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    with open(f"/run/netns/{host.name}") as namespace:
        call("setns", namespace.fileno(), CLONE_NEWNET)
    call("unshare", CLONE_NEWNS)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    for name in ("hosts", "resolv.conf"):
        call("mount", f"/etc/netns/{host.name}/{name}".encode(), f"/etc/{name}".encode(), None, MS_BIND, None)


def _agent(
    number: int,
    hosts: list[Host],
    folder: str,
    arguments: list[str],
    pace: float,
    identity: str,
    address: str,
) -> None:
    """What torchrun does on a host."""
    forkserver._forkserver._forkserver_address = address  # its ranks are forked by the same server
    forkserver._forkserver.ensure_running = lambda: None
    host = hosts[number]
    os.setsid()
    enter(host)
    log = os.open(f"{folder}/agent-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = Path(folder, f"ranks-{number}")
    logs.mkdir()
    config = LaunchConfig(
        *(len(hosts), len(hosts), 1),
        run_id=identity,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{hosts[0].address}:{PORT}",
        rdzv_configs={"is_host": number == 0},
        local_addr=host.address,
        max_restarts=3,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, _ranked)(number, hosts, folder, arguments, pace, os.getpid())
    except ChildFailedError:
        os._exit(1)
    except Exception as error:
        print(f"agent: {type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def _ranked(
    number: int, hosts: list[Host], folder: str, arguments: list[str], pace: float, agent: int
) -> None:
    """A rank of it."""
    enter(hosts[number])
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    Path(folder, f"worker-{number}-{os.getpid()}").write_text(str(os.getpid()))
    threading.Thread(target=_end_with, args=(agent,), daemon=True).start()
    import torch

    from gr.programs import train as program
    from gr.train import job

    torch.set_num_threads(1)
    for name in ("run", "resume"):  # a pace at which there is time for faults
        setattr(job, name, _paced(getattr(job, name), pace))
    status = program.main(arguments)
    sys.stdout.flush()
    if status:
        raise SystemExit(status)


def _paced(run, pace: float):
    """``run`` with steps that take ``pace`` seconds longer; below zero of a processor's time."""

    def after_step(folder):
        time.sleep(max(pace, 0))
        until = time.thread_time() - pace
        while pace < 0 and time.thread_time() < until:
            pass

    return lambda *given, on_step, **named: run(*given, on_step=after_step, **named)


def _end_with(agent: int) -> None:
    while _runs(agent):
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
