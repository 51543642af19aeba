"""A sweep's backends, each on the real thing: commands that end well or badly, are asked to stop, are lost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gr.train.sweep.backends import ray_tasks, slurm as slurm_jobs
from gr.train.sweep.backends.base import LOST, Backend, Resources, opened
from tests.end_to_end.slurm import refusal, slurm

why_not = refusal()
SAVES = ["sh", "-c", "trap 'echo saved; exit 0' TERM; echo begun; while :; do sleep 0.1; done"]


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (log.is_file() and text in log.read_text()):
        assert time.monotonic() < deadline, f"{log} never says {text}"
        time.sleep(0.05)


def assert_runs_and_stops(backend: Backend, folder: Path) -> None:
    """Two at a time; each log has what was there, and what its command printed."""
    (folder / "bad.txt").write_text("before\n")
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(backend.run, "good", ["sh", "-c", "echo fine; pwd"], folder / "good.txt")
        bad = pool.submit(backend.run, "bad", ["sh", "-c", "echo no >&2; exit 3"], folder / "bad.txt")
        assert (good.result(), bad.result()) == (0, 3)
        assert (folder / "good.txt").read_text() == f"fine\n{Path.cwd()}\n"
        assert (folder / "bad.txt").read_text() == "before\nno\n"
        asked = pool.submit(backend.run, "asked", SAVES, folder / "asked.txt")
        wait_for(folder / "asked.txt", "begun")
        backend.stop()
        asked.result()
        said = (folder / "asked.txt").read_text().splitlines()  # Slurm says in between that it was cancelled
        assert said[0] == "begun" and said[-1] == "saved"
    assert not [file for file in folder.iterdir() if file.suffix not in (".txt", ".status")]


def test_local(tmp_path):
    with opened("local", Resources()) as backend:
        assert_runs_and_stops(backend, tmp_path)


def test_ray(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_tasks, "POLL_SECONDS", 0.05)
    with opened("ray", Resources()) as backend:
        assert_runs_and_stops(backend, tmp_path)
        assert backend.run("late", ["sh", "-c", "echo late"], tmp_path / "late.txt") < 0
        assert not (tmp_path / "late.txt").exists(), "who asked for the end wants nothing begun"


@pytest.mark.skipif(why_not is not None, reason=why_not or "")
def test_slurm(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(slurm_jobs, "GRACE_SECONDS", 1.0)
    with slurm() as cluster:
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, cluster.environment[name])
        with opened("slurm", Resources(sbatch=("--time=10",))) as backend, ThreadPoolExecutor(2) as pool:
            assert_runs_and_stops(backend, tmp_path)
        with opened("slurm", Resources()) as backend, ThreadPoolExecutor(2) as pool:
            # one whose shell is gone, as when its node fails, has told nothing of its end
            assert backend.run("lost", ["sh", "-c", "kill -9 $PPID"], tmp_path / "lost.txt") == LOST
            # a sweep that is started again waits for the job that the one before has left, and starts no other
            log, command = tmp_path / "left.txt", ["sh", "-c", "echo begun; sleep 2; exit 4"]
            first = pool.submit(backend.run, "left", command, log)
            wait_for(log, "begun")
            with opened("slurm", Resources()) as again:
                assert again.run("left", command, log) == 4 == first.result()
            assert log.read_text() == "begun\n"
        with opened("slurm", Resources(sbatch=("--partition=none",))) as backend:
            with pytest.raises(slurm_jobs.UserError, match=r"sbatch refuses 'wrong': .*partition"):
                backend.run("wrong", ["true"], tmp_path / "wrong.txt")


def test_no_slurm_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(slurm_jobs.UserError, match="there is no sbatch here"),
        opened("slurm", Resources()),
    ):
        pass
