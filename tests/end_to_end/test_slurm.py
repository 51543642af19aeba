"""launch/cluster/slurm.sh under a real Slurm of two nodes."""

from __future__ import annotations

import re
import sys
import time

import pytest

from gr.train.folder import RunFolder, read_rows
from tests.end_to_end.slurm import refusal, slurm
from tests.end_to_end.tiny import ROOT, assert_same_run, make_dataset, train, write_config

why_not = refusal()
pytestmark = pytest.mark.skipif(why_not is not None, reason=why_not or "")

STEPS = "train.max_steps=16"


def test_a_job_that_is_put_back_into_the_queue_goes_on_and_ends_as_if_nothing_had_been(tmp_path):
    make_dataset(tmp_path / "data")
    config, run, log = (
        write_config(tmp_path, tmp_path / "data", tmp_path / "run"),
        tmp_path / "run",
        tmp_path / "log",
    )
    with slurm() as cluster:
        cluster.environment.update(GR_CHECKOUT=str(ROOT), GR_PYTHON=sys.executable, GLOO_SOCKET_IFNAME="eth0")
        settings = [
            "--parsable",
            "--cpus-per-task=1",
            f"--output={log}",
            str(ROOT / "launch/cluster/slurm.sh"),
        ]
        job = cluster.asked("sbatch", *settings, "--config", str(config), STEPS)
        deadline, told, hurried = time.monotonic() + 300, False, False
        while not cluster.ended(job):
            step = max((row.get("step", 0) for row in read_rows(RunFolder(run).metrics)), default=0)
            if step >= 5 and not told:
                cluster.asked("scancel", "--signal=USR1", "--batch", job)  # as before its time is up
                told = True
            if told and not hurried and cluster.state(job) == "PENDING":
                # Else it waits two minutes.  At once would be too soon: its nodes refuse a job that starts in the
                # very second in which its first turn was taken from it.
                cluster.asked("scontrol", "update", f"JobId={job}", "StartTime=now+3")
                hurried = True
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    said = log.read_text()
    assert "[slurm] the time is nearly up: saving" in said and "stopped and saved" in said, said
    assert hurried and re.search(r"resuming '.+' at epoch \d, step ([5-9]|1\d)", said), said
    train(["--config", write_config(tmp_path, tmp_path / "data", tmp_path / "one"), STEPS], 2)
    assert_same_run(run, tmp_path / "one")
