"""Before the rows of a table are trained: one process that starts the others, their evaluations, and the data."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gr.config import RunConfig
from gr.errors import UserError
from gr.launcher import launched
from gr.train.cells import exit_status
from gr.train.selection import metric_names


def refuse_torchrun() -> None:
    """Refuse to be one of several processes, which would prepare the same data and train the same rows."""
    if launched().ranks > 1:
        raise UserError(
            "reproduce starts the processes of its trainings itself: start it without torchrun, and say how many "
            "with --processes",
            everywhere=True,
        )


def check_evaluates(
    table: str, row: str, columns: Sequence[str], splits: Sequence[str], config: RunConfig
) -> None:
    """Refuse overrides that leave a column of the table without its figure, before anything is trained."""
    measured = metric_names(config)
    if missing := [column for column in columns if column not in measured]:
        mend = f"add its k to eval.ks={config.eval.ks}" if "@" in missing[0] else "measure its task too"
        raise UserError(f"the table of '{table}' shows {missing[0]}: {mend}")
    for split in splits:
        if split not in config.eval.splits:
            raise UserError(f"'{row}' needs split '{split}': add it to eval.splits={config.eval.splits}")


def prepare(name: str, options: Mapping[str, Any], source: str | None, path: str) -> None:
    """Prepare the dataset ``name`` at ``path``, as a person starts it; ``source``: its raw files."""
    command = [sys.executable, "-m", "gr.programs.prepare", name, "--out", path]
    if source is not None:
        command += ["--source", source]
    for key, value in options.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    if exit_status(command):
        raise UserError(f"preparing '{name}' failed (see above): give its raw files with --source")
