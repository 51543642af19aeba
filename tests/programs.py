"""Programs as a user starts them, without what every start costs.

``python FILE ARGUMENTS`` spends four seconds of a processor's time importing torch, more than most tests take.  The
first start of each file in a test session is a start like a user's, and so is the first under torchrun; later ones fork
from a server that has imported what all import (tests/distributed/group.py).
"""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from tests.distributed.group import free_port, preload, variables

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def _is_first(start: str) -> bool:
    """Whether no process of this test session has made this start yet."""
    try:
        Path(os.environ["GR_TEST_SESSION"], start.replace("/", "+")).mkdir()
    except FileExistsError:
        return False
    return True


def run_python(
    arguments: Sequence[object],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` (a file, or ``-m`` and a module, and what it is given) does in ``folder``.

    environment: variables beside this process's own; with some, the start is always a new one, since they may have to
    be there when a package is imported.
    """
    words = [*map(str, arguments)]
    name = words[1] if words[0] == "-m" else words[0]
    if environment or _is_first(name):
        return subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    (done,) = _forked(words, [(dict(os.environ), folder or Path.cwd())], timeout)
    return done


def torchrun(
    processes: int, arguments: Sequence[object], *, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What ``torchrun --standalone --nproc-per-node PROCESSES ARGUMENTS`` does that ends well; what each process prints
    comes one after the other.  One that may fail is for :func:`run_python`: torchrun ends the others then."""
    if _is_first(f"torchrun {processes} {arguments[0]}"):
        return run_python([*TORCHRUN, processes, *arguments], timeout=timeout)
    each = in_ranks(arguments, [Path.cwd()] * processes, timeout=timeout)
    status = next((one.returncode for one in each if one.returncode), 0)
    out, err = "".join(one.stdout for one in each), "".join(one.stderr for one in each)
    return subprocess.CompletedProcess(each[0].args, status, out, err)


def in_ranks(
    arguments: Sequence[object], folders: Sequence[Path], *, timeout: float = 300
) -> list[subprocess.CompletedProcess[str]]:
    """What each process of a run does, of which every one is in a folder of ``folders``; none is ended by others."""
    port = free_port()
    places = [
        ({**os.environ, **variables(rank, len(folders), port)}, folder) for rank, folder in enumerate(folders)
    ]
    return _forked([*map(str, arguments)], places, timeout)


def _forked(
    words: list[str], places: Sequence[tuple[dict[str, str], Path]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """``python WORDS`` in forked processes, one for each (environment, folder) of ``places``, at the same time."""
    preload()
    processes = []
    with tempfile.TemporaryDirectory() as scratch:
        for rank, (environment, folder) in enumerate(places):
            (told := Path(scratch, str(rank))).mkdir()
            given = (words, str(folder), environment, str(told))
            processes.append(get_context("forkserver").Process(target=_run, args=given))
            processes[-1].start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
        if late:
            raise subprocess.TimeoutExpired(words, timeout)
        return [
            subprocess.CompletedProcess(
                [sys.executable, *words],
                process.exitcode or 0,
                *(Path(scratch, str(rank), stream).read_text() for stream in ("out", "err")),
            )
            for rank, process in enumerate(processes)
        ]


def _run(words: list[str], folder: str, environment: dict[str, str], scratch: str) -> None:
    """In the new process."""
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(f"{scratch}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
