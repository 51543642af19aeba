"""A training on two hosts, started by launch/cluster/hosts.sh: that of one host, whatever happens to its link and its
processes.  (tests/distributed/faults.py has many more faults.)"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gr.train.folder import RunFolder, read_rows
from tests.distributed import faults
from tests.distributed.hosts import Host, two_hosts
from tests.end_to_end.tiny import ROOT, assert_same_run, make_dataset, train, write_config

STEPS = "train.max_steps=16"
SHARDED = "model.table={name: torchrec, sharding: row_wise}"


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hosts):
    """With a data set, a file of hosts, and what stands in the place of ssh: it starts a command on a host."""
    path = tmp_path_factory.mktemp("hosts")
    make_dataset(path / "data")
    (path / "hosts").write_text("# two of them\n" + "".join(f"{host.address}\n" for host in hosts))
    names = "\n".join(f"    {host.address}) name={host.name} ;;" for host in hosts)
    ssh = path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\ncase $1 in\n{names}\nesac\nexec ip netns exec "$name" env GLOO_SOCKET_IFNAME=eth0 sh -c "$2"\n'
    )
    ssh.chmod(0o755)
    return path


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    config = write_config(folder, folder / "data", folder / name)
    settings = {"GR_SSH": str(folder / "ssh"), "GR_PYTHON": sys.executable}
    return subprocess.Popen(
        [
            "bash",
            str(ROOT / "launch/cluster/hosts.sh"),
            str(folder / "hosts"),
            "--config",
            str(config),
            *overrides,
        ],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while max((row.get("step", 0) for row in read_rows(RunFolder(run).metrics)), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


def worker(host: Host) -> int:
    """The process that trains there."""
    for pid in host.pids():
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        if any(variable.startswith("RANK=") for variable in variables):
            return pid
    raise AssertionError(f"nobody trains on {host.name}")


@pytest.fixture(scope="module")
def on_one_host(folder):
    config = write_config(folder, folder / "data", folder / "one-host")
    train(["--config", config, STEPS, SHARDED], 2)
    return folder / "one-host"


def test_a_lost_process_and_a_link_that_was_down_change_nothing(folder, hosts, on_one_host):
    job = start(folder, "two-hosts", STEPS, SHARDED)
    wait_for(folder / "two-hosts", 3)
    hosts[1].cut()
    time.sleep(3)
    hosts[1].mend()
    wait_for(folder / "two-hosts", 9)
    os.kill(worker(hosts[1]), signal.SIGKILL)
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert {f"[{host.address}]" for host in hosts} == {line.split(" ")[0] for line in said.splitlines()}
    assert re.search(r"resuming '.+' at epoch 1, step (8|9|1\d)", said), said
    assert_same_run(folder / "two-hosts", on_one_host)


def test_a_link_that_is_down_beyond_the_timeout_is_named_and_the_job_goes_on(
    folder, hosts, on_one_host, monkeypatch
):
    monkeypatch.setattr(faults, "TIMEOUT", 6)
    overrides = [STEPS, SHARDED, "train.timeout=6"]
    found = faults.disturbed(
        folder, "cut", hosts, "cut beyond the timeout", overrides, random.Random(2), steps=16
    )
    assert found.by_itself
    (named,) = (said for said in found.said if said.startswith("error: an exchange took longer than"))
    assert re.search(
        r"train\.timeout, 6 s: nothing is heard of rank [01] on .+ \(10\.77\.\d+\.[12]\) since \d", named
    )
    assert_same_run(folder / "cut-run", on_one_host)
