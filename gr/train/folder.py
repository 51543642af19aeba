"""RunFolder: one run's files.

config.yaml       the resolved config          environment.json  versions, devices, command
metrics.jsonl     one object a line; a pure function of config, data and seed: no times, no speeds
timing.jsonl      speeds and memory, as they were
checkpoints/      step-00001234/ ...           plots/            loss and metrics, PNG and SVG
tensorboard/      events, when installed       trace.json        with --profile
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gr.config import RunConfig
from gr.errors import UserError


class RunFolder:
    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"

    @staticmethod
    def choose(config: RunConfig) -> RunFolder:
        """The folder for a new run; never one that holds a run."""
        if config.run.dir is not None:
            folder = RunFolder(config.run.dir)
            if folder.config.exists():
                raise UserError(
                    f"'{folder.path}' already holds a run: continue it with --resume {folder.path}, "
                    "or choose another run.dir"
                )
            if folder.path.exists() and any(folder.path.iterdir()):
                raise UserError(f"'{folder.path}' exists and is not empty: choose another run.dir")
            return folder
        number = 1
        while (path := Path("runs") / (config.run.name + (f"-{number}" if number > 1 else ""))).exists():
            number += 1
        return RunFolder(path)

    @staticmethod
    def existing(path: str | os.PathLike) -> RunFolder:
        folder = RunFolder(path)
        if not folder.config.is_file():
            raise UserError(
                f"no run at '{path}' (config.yaml is missing): runs are the folders that train.py writes"
            )
        return folder

    def create(self, config_yaml: str, environment: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.config.write_text(config_yaml)
        self.environment.write_text(json.dumps(environment, indent=1) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_rows(self.metrics)

    def cut_metrics(self, rows: int) -> None:
        """Forget what was logged after the checkpoint that training continues from."""
        if not self.metrics.exists():
            return
        kept = self.metrics.read_text().splitlines(keepends=True)[:rows]
        scratch = self.metrics.with_suffix(".cut")
        scratch.write_text("".join(kept))
        os.replace(scratch, self.metrics)


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
