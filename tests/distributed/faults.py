"""Random faults in runs over two hosts, many times over.

    python -m tests.distributed.faults --times 50

Each run has one fault at a random moment, and has to end in the metrics and the bits of one that nobody disturbed: by
itself, or, where it ends with one sentence that says so, after that has been done.  It may take as long as the timeout
of its exchanges, and what torchrun takes to start it again.  Prints a row a run; ``--kinds cut,stop`` for some.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gr.train.folder import RunFolder, read_rows
from tests.distributed.forked_hosts import Job
from tests.distributed.hosts import Host, two_hosts
from tests.distributed.jobs import run_jobs
from tests.end_to_end.tiny import assert_same_run, make_dataset, write_config

TIMEOUT = 12
LIMIT = 240  # seconds that a run may take from its fault: timeout, torchrun's 30 s for who doesn't leave, two starts
LONGEST = 240  # of a sentence in the table
PACE, WORK = 0.1, 0.3  # seconds of sleep in a step; of a processor's time, where a rank is slowed
STEPS = 24
CONFIGS = {
    "local tables": [],
    "TorchRec, by rows": ["model.table={name: torchrec, sharding: row_wise}"],
    "ZeRO 2": ["train.engine={name: deepspeed, zero: 2}"],
    "ZeRO 3, TorchRec": [
        "train.engine={name: deepspeed, zero: 3}",
        "model.table={name: torchrec, sharding: row_wise}",
    ],
}
SETTINGS = [f"train.max_steps={STEPS}", f"train.timeout={TIMEOUT}"]


@dataclass
class Scene:
    """What a fault happens to.  resumes: what a person does after a run that has ended: overrides of ``--resume``."""

    hosts: list[Host]
    run: Path
    job: Job
    moment: random.Random
    notes: list[str] = field(default_factory=list)
    cleanups: list[Callable[[], None]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return max((row.get("step", 0) for row in read_rows(RunFolder(self.run).metrics)), default=0)

    def worker(self, number: int) -> int:
        deadline = time.monotonic() + 60
        while (pid := self.job.worker(number)) is None:
            assert time.monotonic() < deadline and not self.job.ended(), "nobody trains there"
            time.sleep(0.02)
        return pid

    def background(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        self.cleanups.append(lambda: thread.join(60))


def kill_worker(scene: Scene) -> str:
    host = scene.moment.randrange(2)
    os.kill(scene.worker(host), signal.SIGKILL)
    return f"rank {host} killed"


def kill_agent(scene: Scene) -> str:
    scene.job.agents[1].kill()
    return "the second host's agent killed"


def kill_rendezvous(scene: Scene) -> str:
    scene.job.agents[0].kill()
    return "the agent of the rendezvous's host killed"


def lose_host(scene: Scene) -> str:
    scene.job.agents[1].kill()
    for pid in scene.hosts[1].pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return "all of the second host killed"


def stop_worker(scene: Scene) -> str:
    host = scene.moment.randrange(2)
    os.kill(scene.worker(host), signal.SIGSTOP)
    return f"rank {host} stopped for good"


def stop_host(scene: Scene) -> str:
    host, seconds = scene.hosts[scene.moment.randrange(2)], scene.moment.uniform(4, 8)
    pids = host.pids()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(seconds)
    return f"all of host {scene.hosts.index(host)} stood still for {seconds:.0f} s"


def cut_short(scene: Scene) -> str:
    return _cut(scene, scene.moment.uniform(2, 8))


def cut_long(scene: Scene) -> str:
    return _cut(scene, TIMEOUT + scene.moment.uniform(4, 20))


def _cut(scene: Scene, seconds: float) -> str:
    host = scene.hosts[scene.moment.randrange(2)]
    host.cut()
    time.sleep(seconds)
    host.mend()
    return f"link of host {scene.hosts.index(host)} down for {seconds:.0f} s"


def slow_worker(scene: Scene) -> str:
    """A rank gets a quarter of its time for half a minute."""
    host = scene.moment.randrange(2)
    pid = scene.worker(host)

    def throttle() -> None:
        until = time.monotonic() + 30
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < until:
                for number, seconds in ((signal.SIGSTOP, 0.3), (signal.SIGCONT, 0.1)):
                    os.kill(pid, number)
                    time.sleep(seconds)

    scene.background(throttle)
    return f"rank {host} slowed to a quarter"


def slow_link(scene: Scene) -> str:
    link, rate = scene.hosts[1].link, scene.moment.choice(["100kbit", "300kbit"])
    shape = [
        "tc",
        "qdisc",
        "add",
        "dev",
        link,
        "root",
        "tbf",
        "rate",
        rate,
        "burst",
        "4kb",
        "latency",
        "200ms",
    ]
    subprocess.run(shape, check=True, capture_output=True)
    scene.cleanups.append(
        lambda: subprocess.run(["tc", "qdisc", "del", "dev", link, "root"], capture_output=True) and None
    )
    return f"link to host 1 at {rate}"


def full_disk(scene: Scene) -> str:
    """The disk that run.dir is on is full; whoever starts it again has made room."""
    filler = scene.run.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as out:
        while True:
            out.write(b"x" * 4096)
    scene.cleanups.append(lambda: filler.unlink(missing_ok=True))
    return "disk full"


def corrupt_newest(scene: Scene) -> str:
    """The newest checkpoint loses bytes, and a rank is killed so that it is asked for."""
    host = scene.moment.randrange(2)
    pid = scene.worker(host)
    os.kill(pid, signal.SIGSTOP)  # else it may be an older one by then
    found = sorted((scene.run / "checkpoints").glob("step-*"))
    said = "no checkpoint yet"
    if found:
        files = sorted(file for file in found[-1].iterdir() if file.stat().st_size)
        file = scene.moment.choice(files)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
        said = f"{file.name} of {found[-1].name} damaged"
    os.kill(pid, signal.SIGKILL)
    return f"{said}, rank {host} killed"


def preempt(scene: Scene) -> str:
    host = scene.moment.randrange(2)
    os.kill(scene.worker(host), signal.SIGTERM)
    return f"SIGTERM to rank {host}"


KINDS: dict[str, Callable[[Scene], str]] = {
    "kill a rank": kill_worker,
    "kill an agent": kill_agent,
    "kill the rendezvous": kill_rendezvous,
    "lose a host": lose_host,
    "stop a rank": stop_worker,
    "stop a host": stop_host,
    "cut for seconds": cut_short,
    "cut beyond the timeout": cut_long,
    "slow rank": slow_worker,
    "slow link": slow_link,
    "full disk": full_disk,
    "corrupt": corrupt_newest,
    "preempt": preempt,
}
ENDINGS = re.compile(r"^(error: .*|stopped and saved.*|agent: \w+)", re.MULTILINE)
WARNINGS = re.compile(
    r"^(?:WARNING:\S+?:)?(nothing has moved.*|step \d+ took.*|rank \d+ on .* (?:works|stood) .*|skipping damaged.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Outcome:
    """step: of the newest row at the fault.  seconds: from there to the end.  by_itself: or else a person went on with
    ``--resume``.  said: sentences of the run."""

    what: str
    step: int
    seconds: float
    by_itself: bool
    said: list[str]


def disturbed(
    folder: Path,
    name: str,
    hosts: list[Host],
    kind: str,
    overrides: list[str],
    moment: random.Random,
    steps: int = STEPS,
) -> Outcome:
    """A run of so many ``steps`` with one fault, to its end; it is NAME-run in ``folder`` then."""
    place = folder / name
    place.mkdir()
    with _disk(place) if kind == "full disk" else contextlib.nullcontext():
        run = place / "run"
        config = write_config(folder, folder / "data", run)
        pace = -WORK if kind == "slow rank" else PACE
        job = Job(hosts, folder / f"{name}-job", ["--config", str(config), *overrides], pace, name)
        scene = Scene(hosts, run, job, moment)
        by_itself = True
        try:
            step = moment.randrange(1, steps - 8)
            _wait(lambda: scene.step >= step or job.ended(), 120, "the step of the fault", job)
            time.sleep(moment.uniform(0, 2 * PACE))
            reached, began = scene.step, time.monotonic()
            what = KINDS[kind](scene)
            lost_agent = any(agent.exitcode not in (None, 0) for agent in job.agents)
            _wait(job.ended, LIMIT, "its end", job)
            seconds = time.monotonic() - began
            said = job.said()
            if any(job.statuses()) or lost_agent or not _finished(run, steps):
                by_itself = False
        finally:
            for action in scene.cleanups:
                action()
            job.kill(hosts)
        if not by_itself:
            again = Job(
                hosts,
                folder / f"{name}-again",
                ["--resume", str(run), f"train.timeout={TIMEOUT}"],
                0.0,
                f"{name}-again",
            )
            try:
                _wait(again.ended, LIMIT, "the end of the one that went on", again)
                assert not any(again.statuses()), said + again.said()
            finally:
                again.kill(hosts)
        kept = folder / f"{name}-run"
        shutil.copytree(run, kept)
    found = WARNINGS.findall(said) + ENDINGS.findall(said)
    sentences = {sentence[:12]: sentence for sentence in reversed(found)}.values()  # the first of each kind
    shown = [s.replace(str(folder), "...") for s in sentences]
    shown = [s if len(s) <= LONGEST else f"{s[:LONGEST]} ..." for s in shown]
    return Outcome(what, reached, seconds, by_itself, shown)


def _finished(run: Path, steps: int) -> bool:
    rows = RunFolder(run).read_metrics()
    return any(row.get("split") == "test" and row["step"] == steps for row in rows)


def _wait(there: Callable[[], bool], seconds: float, what: str, job: Job) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds:.0f} s\n{job.said()}"
        time.sleep(0.05)


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[None]:
    """A small disk of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--keep", help="a folder in which everything is kept")
    asked = parser.parse_args()
    kinds = asked.kinds.split(",")
    made = tempfile.mkdtemp(prefix="gr-faults-") if asked.keep is None else asked.keep
    folder = Path(made)
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    try:
        with two_hosts() as hosts:
            make_dataset(folder / "data")
            whole = {name: folder / f"whole-{number}" for number, name in enumerate(CONFIGS)}
            jobs = [
                {
                    "config": write_config(folder, folder / "data", whole[name]),
                    "overrides": [*SETTINGS, *overrides],
                }
                for name, overrides in CONFIGS.items()
            ]
            assert run_jobs(folder, jobs, 2) == [[None] * 2] * len(jobs)
            print(
                "| | config | fault | at step | seconds | ended | said |\n|---|---|---|---|---|---|---|",
                flush=True,
            )
            for number in range(asked.first, asked.first + asked.times):
                moment = random.Random(f"{asked.seed} {number}")
                kind = kinds[number % len(kinds)]
                config = moment.choice(list(CONFIGS))
                background = moment.random() < 0.5
                overrides = [*SETTINGS, *CONFIGS[config], *["checkpoint.asynchronous=true"] * background]
                try:
                    found = disturbed(folder, f"run-{number}", hosts, kind, overrides, moment)
                    assert_same_run(folder / f"run-{number}-run", whole[config])
                except AssertionError as error:
                    failed += 1
                    print(f"| {number + 1} | {config} | {kind} | | | **FAILED** | |\n{error}", flush=True)
                    continue
                how = "by itself" if found.by_itself else "after --resume"
                said = "; ".join(found.said).replace("|", "/")
                print(
                    f"| {number + 1} | {config}{', asynchronous checkpoints' * background} | {found.what} "
                    f"| {found.step} | {found.seconds:.0f} | {how} | {said} |",
                    flush=True,
                )
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{asked.times - failed} of {asked.times} ended as the undisturbed run")


if __name__ == "__main__":
    main()
