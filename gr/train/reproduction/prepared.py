"""Before the rows of a table are trained: one process that starts the others, and the data."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from gr.errors import UserError
from gr.launcher import launched
from gr.train.cells import exit_status


def refuse_torchrun() -> None:
    """Refuse to be one of several processes, which would prepare the same data and train the same rows."""
    if launched().ranks > 1:
        raise UserError(
            "reproduce starts the processes of its trainings itself: start it without torchrun, and say how many "
            "with --processes",
            everywhere=True,
        )


def prepare(name: str, options: Mapping[str, Any], source: str | None, path: str) -> None:
    """Prepare the dataset ``name`` at ``path``, as a person starts it; ``source``: its raw files."""
    command = [sys.executable, "-m", "gr.programs.prepare", name, "--out", path]
    if source is not None:
        command += ["--source", source]
    for key, value in options.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    if exit_status(command):
        raise UserError(f"preparing '{name}' failed (see above): give its raw files with --source")
