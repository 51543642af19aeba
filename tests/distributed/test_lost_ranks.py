"""A rank that dies or stands still while several evaluate: the others end in time, and say which one and where."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from gr import config as configs
from gr.launcher import host
from gr.train import job
from tests.distributed.group import free_port, preload, variables
from tests.end_to_end.tiny import make_dataset, write_config
from tests.programs import TORCHRUN, _run

TIMEOUT_S = 6
PROGRAM = """
import os, signal, sys, time
from gr.models.retrieval import Retrieval
from gr.programs import evaluate

asked = Retrieval.standing

def standing(self, *given):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    elif sys.argv[2] == "works":
        time.sleep(60)
    return asked(self, *given)

Retrieval.standing = standing
sys.exit(evaluate.main(sys.argv[3:]))
"""
"""Rank 1 sends itself a signal when it is to score its first users, while rank 0 scores or waits."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    make_dataset(folder / "data")
    file = write_config(folder, folder / "data", folder / "run")
    job.run(configs.load(file, ["train.max_steps=1", "eval.splits=[]"]))
    (folder / "program.py").write_text(PROGRAM)
    return folder


def evaluated(folder: Path, name: str, rank_0: str) -> tuple[int, list[str], float]:
    """Two processes without an agent, rank 1 gets signal ``name``: rank 0's status, what it says on stderr, and the
    seconds until it ended."""
    preload()
    port = free_port()
    words = [str(folder / "program.py"), name, rank_0, str(folder / "run"), f"train.timeout={TIMEOUT_S}"]
    started, processes = time.monotonic(), []
    for rank in range(2):
        (scratch := folder / f"{name}-{rank}").mkdir()
        given = (words, str(folder), {**os.environ, **variables(rank, 2, port)}, str(scratch))
        processes.append(get_context("forkserver").Process(target=_run, args=given))
        processes[-1].start()
    try:
        processes[0].join(90)
        assert processes[0].exitcode is not None, "it hangs"
        assert processes[1].exitcode in (None, -signal.SIGKILL)
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = (folder / f"{name}-0" / "err").read_text().splitlines()
    return processes[0].exitcode, said, time.monotonic() - started


def test_a_rank_that_is_killed_is_named_by_the_one_that_waited(trained):
    status, said, _ = evaluated(trained, "SIGKILL", "waits")
    (error,) = [line for line in said if line.startswith("error: ")]
    assert status == 2
    assert error == (
        f"error: rank 0 lost rank 1 on {host()}: it ended, and said why if it could; then start it again"
    )
    assert not any("Traceback" in line for line in said), said


def test_a_rank_that_stands_still_is_named_and_ends_the_program_at_the_timeout(trained):
    status, said, took = evaluated(trained, "SIGSTOP", "waits")
    assert status == 2
    (error,) = [line for line in said if line.startswith("error: ")]
    assert any("rank 1 on" in line and "train.timeout ends the run after 6 s" in line for line in said)
    # it has been silent for four seconds of the six, or nearly
    who = f"(late is|nothing is heard of) rank 1 on {re.escape(host())}[: ]"
    assert re.match(f"error: an exchange took longer than train.timeout, {TIMEOUT_S} s: {who}", error), error
    assert "evaluation of hstu after step 1" in error and error.endswith("; start it again")
    assert took < 60
    assert not any("Traceback" in line for line in said), said


def test_under_torchrun_the_one_that_worked_says_it_too(trained):
    """torchrun ends it with SIGTERM as soon as it misses the other."""
    program = [str(trained / "program.py"), "SIGKILL", "works", str(trained / "run")]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", *program], capture_output=True, text=True, timeout=120, check=False
    )
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert error.startswith("error: rank 0 on ") and error.endswith(": start it again")
    assert " was told to end (SIGTERM) after rank 1 on " in error and " was lost" in error
