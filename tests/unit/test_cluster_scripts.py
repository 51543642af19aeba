"""What the cluster's scripts say of hosts and ports that can't be."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "launch/cluster"


def bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CLUSTER / script), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_hosts_are_those_of_the_file_whatever_stands_around_them(tmp_path):
    (tmp_path / "hosts").write_text("# ours\n\n  node-a  # the first\r\n\t\nnode-b\r\n10.0.0.3")
    done = bash("hosts.sh", str(tmp_path / "hosts"), "--config", "x", GR_SSH="echo")
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert [line.partition("] ")[0] for line in lines] == ["[10.0.0.3", "[node-a", "[node-b"]
    assert all("GR_NODES=3 " in line and "GR_MEETING=node-a:29500" in line for line in lines)
    assert "GR_NODE=2 " in lines[0] and "GR_ADDRESS=node-b " in lines[2]


def test_settings_of_the_exchange_go_along_and_credentials_do_not(tmp_path):
    (tmp_path / "hosts").write_text("node-a\nnode-b\n")
    settings = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_IB_HCA": "mlx5_0,mlx5_1", "OMP_NUM_THREADS": "3"}
    secret = {"AWS_SECRET_ACCESS_KEY": "hidden"}
    done = bash("hosts.sh", str(tmp_path / "hosts"), "--config", "x", GR_SSH="echo", **settings, **secret)
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        assert {f"{name}={value}" for name, value in settings.items()} <= set(words)
    assert len(done.stdout.splitlines()) == 2 and "hidden" not in done.stdout


@pytest.mark.parametrize(
    ("hosts", "says"),
    [
        ("node-a\nnode-b\nnode-a # again\n", "names node-a twice: write it once, and GR_PROCESSES=N"),
        ("node-a slots=8\n", "has the line 'node-a slots=8': write a host a line"),
        ("\n# nobody\n", "names no host: write one a line"),
    ],
)
def test_hosts_that_cannot_be_are_refused_before_anything_is_started(tmp_path, hosts, says):
    (tmp_path / "hosts").write_text(hosts)
    done = bash("hosts.sh", str(tmp_path / "hosts"), "--config", "x", GR_SSH="echo")
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_port_that_is_in_use_and_settings_that_cannot_be_are_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"GR_NODES": "2", "GR_NODE": "0", "GR_MEETING": f"localhost:{port}", "GR_JOB": "x"}
        done = bash("node.sh", "--config", "x", **settings, GR_ADDRESS="localhost")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: port {port} of localhost, where all meet, is in use: choose another one (GR_PORT, or GR_MEETING)\n"
    )
    for changed, says in (
        ({"GR_MEETING": "localhost"}, "GR_MEETING is 'localhost': say HOST:PORT"),
        ({"GR_NODE": "2"}, "GR_NODE is '2' and GR_NODES '2'"),
    ):
        done = bash("node.sh", "--config", "x", **settings | changed)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
