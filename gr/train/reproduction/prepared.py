"""The data of a table, prepared where it isn't yet."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from gr.errors import UserError
from gr.train.cells import exit_status


def prepare(name: str, options: Mapping[str, Any], source: str | None, path: str) -> None:
    """Prepare the dataset ``name`` at ``path``, as a person starts it; ``source``: its raw files."""
    command = [sys.executable, "-m", "gr.programs.prepare", name, "--out", path]
    if source is not None:
        command += ["--source", source]
    for key, value in options.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    if exit_status(command):
        raise UserError(f"preparing '{name}' failed (see above): give its raw files with --source")
