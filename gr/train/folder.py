"""RunFolder: one run's files.

config.yaml       the resolved config          environment.json  versions, devices, command
metrics.jsonl     one object a line; a pure function of config, data and seed: no times, no speeds
timing.jsonl      speeds and memory, as they were
checkpoints/      step-00001234/ ...           plots/            loss and metrics, PNG and SVG
tensorboard/      events, when installed       trace.json        with --profile
logs/             rank-00000.log, ...: a file a process, where there are several
heartbeat.json    step and phase, new while the run moves
.lock             held by the process that trains here

A run's folder may be a URL.  Then checkpoints are written there as they are made, the other files here, in a folder for
temporary files, and brought there with every checkpoint and at the end; nothing is held by a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from gr.config import RunConfig
from gr.data.outputs import sync
from gr.data.stores import remedy
from gr.errors import UserError, first_line
from gr.train.place import StorePath, files_in, place

FETCHED = {"config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl"}


class RunFolder:
    """``path``: where the run is.  ``here``: where its files are but for checkpoints, the same unless that is a URL."""

    def __init__(self, path: str | os.PathLike | StorePath):
        self.path = place(path)
        self._pushed: dict[Path, tuple[int, int]] = {}
        if isinstance(self.path, StorePath):
            self._temporary = tempfile.TemporaryDirectory(prefix="gr-run-", ignore_cleanup_errors=True)
            self.here = Path(self._temporary.name)
            self._fetch(self.path)
        else:
            self.here = self.path
        self.config = self.here / "config.yaml"
        self.environment = self.here / "environment.json"
        self.metrics = self.here / "metrics.jsonl"
        self.timing = self.here / "timing.jsonl"
        self.plots = self.here / "plots"
        self.checkpoints = self.path / "checkpoints"

    def _fetch(self, path: StorePath) -> None:
        """The files that a run goes on with, as they are there."""
        try:
            for name in FETCHED.intersection(files_in(path)):
                path.download(name, self.here / name)
                self._pushed[self.here / name] = _state(self.here / name)
        except OSError as error:
            raise UserError(
                f"cannot read the run at '{path}' ({first_line(error)}): "
                f"{remedy(error, 'check the URL and its access')}"
            ) from error

    def push(self) -> None:
        """Bring what has changed here to where the run is, if that is a URL."""
        if not isinstance(self.path, StorePath):
            return
        for file in sorted(self.here.rglob("*")):
            if not file.is_file():
                continue
            state = _state(file)
            if (
                self._pushed.get(file) != state
            ):  # what is as it was fetched may be newer there, by another process
                self.path.upload(file, str(file.relative_to(self.here)))
                self._pushed[file] = state

    @staticmethod
    def make(config: RunConfig, config_yaml: str, environment: dict[str, Any]) -> RunFolder:
        """Make the folder of a new run, never one that holds a run: run.dir, or the first free runs/NAME-NUMBER."""
        if config.run.dir is not None:
            folder = RunFolder(config.run.dir)
            if not folder._take(config_yaml):
                raise UserError(
                    f"'{folder.path}' already holds a run: continue it with --resume {folder.path}, "
                    "or choose another run.dir"
                )
        else:
            folder = next(f for f in _numbered(config.run.name) if f._take(config_yaml, new=True))
        folder.environment.write_text(json.dumps(environment, indent=1) + "\n")
        folder.push()
        return folder

    @staticmethod
    def of_job(config: RunConfig, job: str | None) -> RunFolder | None:
        """The folder that :meth:`make` made of ``config`` for a launcher's ``job``: the last one, if there is one."""
        if config.run.dir is not None:
            folders = [RunFolder(config.run.dir)]
        else:
            folders = list(takewhile(lambda folder: folder.path.exists(), _numbered(config.run.name)))
        return next((f for f in reversed(folders) if job is not None and f._job() == job), None)

    def _job(self) -> str | None:
        """Of which job a new run was made here, as far as the folder says."""
        try:
            return json.loads(self.environment.read_text()).get("job") if self.config.is_file() else None
        except (OSError, ValueError):
            return None

    def _take(self, config_yaml: str, new: bool = False) -> bool:
        """Make the folder with its config.yaml; False if it holds a run, or (``new``) if it exists at all.  One of
        several processes at a time succeeds: the folder, or else its config.yaml, is made by one alone."""
        if isinstance(self.path, StorePath):
            return self._take_url(self.path, config_yaml)
        try:
            self.path.mkdir(parents=True, exist_ok=not new)
            names = {entry.name for entry in self.path.iterdir()}
            if names and self.config.name not in names:
                raise UserError(f"'{self.path}' exists and is not empty: choose another run.dir")
            with self.config.open("x") as out:
                out.write(config_yaml)
        except FileExistsError as error:
            if self.path.is_dir():
                return False
            raise UserError(f"'{error.filename}' is a file: choose another run.dir") from None
        except OSError as error:
            raise UserError(
                f"cannot write a run to '{self.path}' ({error.strerror}): choose another run.dir"
            ) from None
        return True

    def _take_url(self, path: StorePath, config_yaml: str) -> bool:
        """The same in a store, which doesn't say who was first."""
        if self.config.exists():
            return False
        try:
            if path.exists():
                raise UserError(f"'{path}' exists and is not empty: choose another run.dir")
            self.config.write_text(config_yaml)
            self.push()
        except OSError as error:
            raise UserError(
                f"cannot write a run to '{path}' ({first_line(error)}): "
                f"{remedy(error, 'choose another run.dir')}"
            ) from error
        return True

    def give_up(self) -> None:
        """Take back what :meth:`make` made, for a run that won't be: the same command can be given again."""
        if isinstance(self.path, StorePath):
            for name in (self.config.name, self.environment.name):
                (self.path / name).unlink()
            return
        for file in (self.config, self.environment):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put something there
            self.path.rmdir()

    @staticmethod
    def existing(path: str | os.PathLike) -> RunFolder:
        folder = RunFolder(path)
        if not folder.config.is_file():
            raise UserError(
                f"no run at '{path}' (config.yaml is missing): runs are the folders that train.py writes"
            )
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training here; the lock goes with the process, however it ends.  Not in a store."""
        if isinstance(self.path, StorePath):
            yield
            return
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is training in '{self.path}': stop it first") from None
            except OSError:  # a file system without locks
                pass
            yield

    def rewrite_config(self, config_yaml: str) -> None:
        _replace(self.config, config_yaml)
        self.push()

    def write(self, name: str, text: str) -> None:
        """A file of the run, by any process."""
        (self.path / name).write_text(text)

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_rows(self.metrics)

    def cut_metrics(self, rows: int) -> int:
        """Forget what was logged after the checkpoint that training continues from, its ``rows`` first rows; returns
        the rows that are there, fewer where some were lost."""
        kept = _whole_lines(self.metrics)[:rows]
        if self.metrics.exists():
            _replace(self.metrics, "".join(kept))
        if self.timing.exists():  # speeds stay as they were, but for a line that a crash cut short
            _replace(self.timing, "".join(_whole_lines(self.timing)))
        return len(kept)

    def sync_metrics(self) -> None:
        """Have metrics.jsonl on the disk, and where the run is: a checkpoint counts on its rows."""
        if self.metrics.exists():
            sync(self.metrics)
        self.push()


def _numbered(name: str) -> Iterator[RunFolder]:
    """runs/NAME, runs/NAME-2, ..."""
    return (RunFolder(Path("runs") / (name + (f"-{n}" if n > 1 else ""))) for n in count(1))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut short by a crash is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("a") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")


def _state(file: Path) -> tuple[int, int]:
    """Another one where the content has changed."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _whole_lines(file: Path) -> list[str]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return lines[:-1] if lines and not lines[-1].endswith("\n") else lines


def _replace(file: Path, content: str) -> None:
    """New content at once: a reader, or a crash, sees the old or the new."""
    scratch = file.with_name(f".{file.name}.writing")
    scratch.write_text(content)
    sync(scratch)
    os.replace(scratch, file)
