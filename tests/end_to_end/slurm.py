"""A real Slurm of two nodes on one machine: its controller here, a slurmd on each of two hosts
(tests/distributed/hosts.py) that has a name of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.hosts import Host, two_hosts
from tests.end_to_end.tiny import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "nsenter", "unshare")
NODES = ("node-a", "node-b")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
CONFIG = """
ClusterName=gr
SlurmctldHost={machine}({control})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
SlurmctldPort={port}
SlurmdPort={port_of_nodes}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ReturnToService=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """environment: what its programs need."""

    environment: dict[str, str]

    def asked(self, *words: str) -> str:
        """What one of its programs prints."""
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()

    def told(self, *words: str) -> str:
        """The same, of one that may fail."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True).stdout.strip()

    def state(self, job: str) -> str:
        """The job's, in Slurm's words."""
        return self.asked("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def ended(self, job: str) -> bool:
        """Whether it has, well or badly."""
        return self.state(job) in ENDS


def refusal() -> str | None:
    """Why there can be no Slurm here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"no Slurm is installed (there is no {missing[0]})"
    if os.geteuid():
        return "its nodes are network namespaces, which root alone can make"
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin"


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Two nodes that wait for jobs."""
    with tempfile.TemporaryDirectory(
        prefix="gr-slurm-", dir="/tmp"
    ) as folder:  # a socket's path has 107 bytes
        with _started(Path(folder)) as cluster:
            yield cluster


@contextmanager
def _started(folder: Path) -> Iterator[Slurm]:
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    running: list[subprocess.Popen] = []

    def start(name: str, *words: str) -> None:
        with (folder / f"{name}.out").open("w") as out:
            running.append(subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT))

    with two_hosts() as hosts:
        control = hosts[0].address.rpartition(".")[0] + ".254"
        subprocess.run(["ip", "addr", "add", f"{control}/24", "dev", hosts[0].bridge], check=True)
        _configure(folder, hosts, control)
        try:
            socket = ["--socket", f"{folder}/munge.socket", "--pid-file", f"{folder}/munge.pid"]
            keys = [
                "--key-file",
                f"{folder}/key",
                "--seed-file",
                f"{folder}/seed",
                "--log-file",
                f"{folder}/m.log",
            ]
            start("munged", "munged", "--force", "--foreground", *socket, *keys)
            _wait(lambda: (folder / "munge.socket").exists(), "munged")
            start("controller", "slurmctld", "-D")
            for host, node in zip(hosts, NODES, strict=True):
                named = f"mount --bind {folder}/hosts /etc/hosts; hostname {node}; exec slurmd -D -N {node}"
                inside = ("nsenter", f"--net=/run/netns/{host.name}", "unshare", "--uts", "--mount")
                start(node, *inside, "sh", "-c", named)
            found = Slurm(environment)
            _wait(lambda: "idle 2" in found.told("sinfo", "-h", "-o", "%T %D"), "the nodes")
            yield found
        finally:
            for process in reversed(running):
                process.kill()
                process.wait()


def _configure(folder: Path, hosts: list[Host], control: str) -> None:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    lines = ["127.0.0.1 localhost", f"{control} control"]
    for host, node in zip(hosts, NODES, strict=True):
        lines += [f"{host.address} {node}", f"::ffff:{host.address} {node}"]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    port = 20000 + 2 * (os.getpid() % 5000)
    settings = CONFIG.format(
        machine=os.uname().nodename, control=control, folder=folder, port=port, port_of_nodes=port + 1
    )
    nodes = "".join(
        f"NodeName={node} NodeAddr={host.address} CPUs=1\n" for host, node in zip(hosts, NODES, strict=True)
    )
    (folder / "slurm.conf").write_text(settings.lstrip() + nodes)


def _wait(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, f"{what} did not come up"
        time.sleep(0.1)
