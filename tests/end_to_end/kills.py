"""Kill -9 of one of several ranks at a random step, under torchrun --max-restarts, many times over.

    python -m tests.end_to_end.kills --times 20 --ranks 4

Every run has to end with the metrics and the bits of one that nobody disturbed.  Every other run writes its checkpoints
asynchronously.  ``--forked``: torchrun's agent in this process, which forks the ranks (:func:`killed_once_forked`).
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gr.train.folder import RunFolder, read_rows
from tests.distributed.group import preload
from tests.distributed.jobs import run_jobs
from tests.end_to_end.tiny import ROOT, assert_same_run, descendants, make_dataset, write_config

TABLE = "model.table={name: torchrec, sharding: row_wise}"
BACKGROUND = "checkpoint.asynchronous=true"
STEPS = 30


@dataclass(frozen=True)
class Kill:
    """rank: whom.  step: of the newest row when it happened.  resumed: the step that the job went on from by itself;
    None if it began anew.  seconds: of the whole job."""

    rank: int
    step: int
    resumed: int | None
    seconds: float


def killed_once(
    folder: Path, run: Path, overrides: list[str], ranks: int, moment: random.Random, patience: float = 120.0
) -> Kill:
    """A whole job in ``run`` of which one rank is killed at a random moment; it ends by itself, well.  patience:
    seconds that it may take to that moment; twice as long from there."""
    config = write_config(folder, folder / "data", run)
    program = [str(ROOT / "launch/train.py"), "--config", str(config), *overrides]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *launcher, "--nproc-per-node", str(ranks), *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    rank, reached = _kill(run, ranks, moment, patience, lambda: _by_environment(process.pid))
    said, _ = process.communicate(timeout=2 * patience)
    assert process.returncode == 0, said
    assert "SIGKILL" in said or "-9" in said, said  # torchrun has noticed
    return Kill(rank, reached, _resumed(said), time.monotonic() - started)


def killed_once_forked(
    folder: Path, run: Path, overrides: list[str], ranks: int, moment: random.Random, patience: float = 120.0
) -> Kill:
    """The same by the function that torchrun calls, which forks the ranks from a process that has imported everything:
    importing takes longer than these runs do."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    preload()
    arguments = ["--config", str(write_config(folder, folder / "data", run)), *overrides]
    pids, logs = Path(f"{run}.pids"), Path(f"{run}.logs")
    pids.mkdir()
    logs.mkdir()
    config = LaunchConfig(
        *(1, 1, ranks),
        run_id=run.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=3,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )

    def kill() -> None:
        found.append(
            _kill(
                run,
                ranks,
                moment,
                patience,
                lambda: {int(f.name): int(f.read_text()) for f in pids.iterdir()},
            )
        )

    found: list[tuple[int, int]] = []
    started = time.monotonic()
    killer = threading.Thread(target=kill)
    killer.start()
    elastic_launch(config, ranked)(str(pids), arguments)
    killer.join()
    said = "".join(file.read_text() for file in sorted(logs.rglob("attempt_*/0/stdout.log")))
    assert len(list(logs.rglob("attempt_*"))) > 1, "nothing was started again"
    return Kill(*found[0], _resumed(said), time.monotonic() - started)


def ranked(pids: str, arguments: list[str]) -> None:
    """One rank of it."""
    from gr.programs.train import main as train_program

    torch.set_num_threads(1)
    Path(pids, os.environ["RANK"]).write_text(str(os.getpid()))
    if status := train_program(arguments):
        raise SystemExit(status)


def _kill(
    run: Path,
    ranks: int,
    moment: random.Random,
    patience: float,
    by_rank: Callable[[], dict[int, int]],
) -> tuple[int, int]:
    """Kill a random rank at a random step: (which, the step of the newest row)."""
    step, delay, victim = moment.randrange(1, STEPS - 5), moment.uniform(0, 0.1), moment.randrange(ranks)
    deadline = time.monotonic() + patience
    while _step(run) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached in {patience} s"
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(by_rank()[victim], signal.SIGKILL)
    return victim, _step(run)


def _step(run: Path) -> int:
    return max((row.get("step", 0) for row in read_rows(RunFolder(run).metrics)), default=0)


def _resumed(said: str) -> int | None:
    found = re.search(r"^resuming '.+' at (?:epoch \d+, step (\d+)|its end)$", said, re.MULTILINE)
    return None if found is None else int(found[1] or STEPS)


def _by_environment(pid: int) -> dict[int, int]:
    """Rank -> process, of those that a process has started."""
    found = {_rank(child): child for child in descendants(pid)}
    return {rank: child for rank, child in found.items() if rank is not None}


def _rank(pid: int) -> int | None:
    """A worker's RANK, by its environment."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:  # it has just ended
        return None
    return next((int(v.removeprefix("RANK=")) for v in variables if v.startswith("RANK=")), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds, on a machine that does other things"
    )
    parser.add_argument(
        "--forked", action="store_true", help="ranks are forked from one that has the packages"
    )
    asked = parser.parse_args()
    once = killed_once_forked if asked.forked else killed_once
    with tempfile.TemporaryDirectory(prefix="gr-kills-") as made:
        folder = Path(made)
        make_dataset(folder / "data")
        whole = folder / "whole"
        config = write_config(folder, folder / "data", whole)
        jobs = [{"config": config, "overrides": [TABLE]}]
        assert run_jobs(folder, jobs, asked.ranks) == [[None] * asked.ranks]
        rows = len(RunFolder(whole).read_metrics())
        print(
            f"{asked.ranks} ranks, {STEPS} steps, a checkpoint every 4; the undisturbed run has {rows} rows\n"
        )
        print(
            "| run | checkpoints | rank killed | at step | went on from | seconds | same metrics and bits |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        for number in range(asked.times):
            run, background = folder / f"killed-{number}", number % 2 == 1
            overrides = [TABLE, *[BACKGROUND] * background]
            moment = random.Random(f"{asked.seed} {number}")
            kill = once(folder, run, overrides, asked.ranks, moment, asked.patience)
            assert_same_run(run, whole)
            how, since = "asynchronous" if background else "in step", kill.resumed
            print(
                f"| {number + 1} | {how} | {kill.rank} | {kill.step} | {'the start' if since is None else since} | "
                f"{kill.seconds:.1f} | yes |",
                flush=True,
            )
    print(f"\nall {asked.times} runs ended as the undisturbed one")


if __name__ == "__main__":
    main()
