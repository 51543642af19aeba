"""Killed or stopped anywhere and resumed, a run ends as if nothing had happened.

GR_KILL_TRIALS=10 kills ten times at other random moments, for one and for two processes.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from gr.train.folder import RunFolder, read_rows
from tests.end_to_end.kills import BACKGROUND, killed_once
from tests.end_to_end.tiny import (
    assert_same_run,
    command,
    descendants,
    make_dataset,
    runs,
    train,
    train_and_signal,
    write_config,
)
from tests.programs import run_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    make_dataset(path / "data")
    return path


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """Number of processes -> the run's folder."""
    runs = {}
    for processes in (1, 2):
        run = folder / f"whole-{processes}"
        train(["--config", write_config(folder, folder / "data", run)], processes)
        runs[processes] = run
    return runs


def digests(run):
    return {r["step"]: r["data_digest"] for r in RunFolder(run).read_metrics() if r["kind"] == "train"}


@pytest.mark.parametrize("trial", range(int(os.environ.get("GR_KILL_TRIALS", "1"))))
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_and_resume_gives_the_same_bits(folder, uninterrupted, processes, trial):
    run = folder / f"killed-{processes}-{trial}"
    config = write_config(folder, folder / "data", run)
    moment = random.Random(f"{processes} {trial}")
    step, delay = moment.randrange(1, 25), moment.uniform(0, 0.1)
    status = train_and_signal(["--config", config], run, step, signal.SIGKILL, processes, delay)
    assert status == -signal.SIGKILL
    said = train(["--resume", run], processes)
    going_on = re.search(r"^resuming '(.+)' at epoch (\d), step (\d+)$", said, re.MULTILINE)
    assert going_on is not None, said
    assert going_on[1] == str(run) and int(going_on[3]) < 30, "there was nothing left to do"
    assert_same_run(run, uninterrupted[processes])


def test_torchrun_starts_a_job_again_that_lost_a_rank(folder, uninterrupted):
    """And it goes on with its run by itself (tests/end_to_end/kills.py does it 20 times, with sharded tables)."""
    run = folder / "restarted"
    kill = killed_once(folder, run, [BACKGROUND], 2, random.Random("restarted"))
    assert kill.resumed is None or kill.resumed <= kill.step + 5
    assert_same_run(run, uninterrupted[2])


def test_processes_whose_agent_died_save_and_leave(folder, uninterrupted):
    run = folder / "orphaned"
    words = command(
        ["--config", write_config(folder, folder / "data", run), "checkpoint.every_steps=null"], 2
    )
    agent = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while max((row.get("step", 0) for row in read_rows(RunFolder(run).metrics)), default=0) < 4:
        assert agent.poll() is None
        time.sleep(0.01)
    workers = descendants(agent.pid)
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 60
    while any(runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.05)
    said = train(["--resume", run], 2)
    assert re.search(r"^resuming '.+' at epoch 1, step ([4-9])$", said, re.MULTILINE), said
    assert_same_run(run, uninterrupted[2])


def test_sigterm_saves_and_leaves_cleanly(folder, uninterrupted):
    run = folder / "terminated"
    config = write_config(folder, folder / "data", run)
    assert train_and_signal(["--config", config], run, 6, signal.SIGTERM) == 0
    assert list((run / "checkpoints").glob("step-*"))
    assert "step" in train(["--resume", run]).split("resuming")[1].splitlines()[0]
    assert_same_run(run, uninterrupted[1])


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_batches(folder, uninterrupted, before, after):
    run = folder / f"from-{before}-to-{after}"
    config = write_config(folder, folder / "data", run)
    train(["--config", config, "train.max_steps=13"], before)
    train(["--resume", run, "train.max_steps=null"], after)
    assert digests(run) == digests(uninterrupted[1]) == digests(uninterrupted[2])
    assert len(digests(run)) == 30


def test_a_damaged_checkpoint_is_named_and_skipped(folder, uninterrupted):
    run = folder / "damaged"
    train(["--config", write_config(folder, folder / "data", run), "train.max_steps=13"])
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    victim = next(newest.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-7])
    done = run_python(command(["--resume", run, "train.max_steps=null"]))
    assert done.returncode == 0, done.stderr
    assert f"skipping damaged checkpoint '{newest}'" in done.stderr
    assert digests(run) == digests(uninterrupted[1])


def test_runs_never_overwrite_each_other_and_resume_refuses_other_mathematics(folder, uninterrupted):
    def refused(arguments):
        done = run_python(command(arguments))
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    config = write_config(folder, folder / "data", uninterrupted[1])
    assert "already holds a run" in refused(["--config", config])
    assert "'optimizer.lr' cannot change on resume" in refused(
        ["--resume", uninterrupted[1], "optimizer.lr=1"]
    )
    assert "did you mean 'epochs'?" in refused(["--config", config, "train.epocs=3"])
    assert "no run at" in refused(["--resume", folder / "nowhere"])


def test_a_loss_that_is_not_finite_stops_with_its_samples_and_the_last_good_checkpoint(folder):
    run = folder / "broken"
    config = write_config(folder, folder / "data", run)
    # temperature 1e-38 overflows the first logits
    overrides = ["model.similarity.temperature=1e-44", "model.similarity.normalize=false"]
    done = run_python(command(["--config", config, *overrides]))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "the loss of step 1 is not finite" in done.stderr
    assert "last good checkpoint is none" in done.stderr
    assert len(list(run.glob("nonfinite-step-00000001-rank-0.json"))) == 1
