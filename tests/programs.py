"""Programs as a user starts them, without what every start costs.

``python FILE ARGUMENTS`` spends four seconds of a processor's time importing torch, more than most tests take.  The
first start of each file in a test process is a start like a user's; later ones fork from a server that has imported
what all import (tests/distributed/group.py).
"""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from tests.distributed.group import preload

_begun: set[str] = set()


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
    if environment or name not in _begun:
        _begun.add(name)
        return subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    preload()
    with tempfile.TemporaryDirectory() as scratch:
        given = (words, str(folder or Path.cwd()), dict(os.environ), scratch)
        process = get_context("forkserver").Process(target=_run, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        out, err = (Path(scratch, stream).read_text() for stream in ("out", "err"))
    return subprocess.CompletedProcess([sys.executable, *words], process.exitcode, out, err)


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
