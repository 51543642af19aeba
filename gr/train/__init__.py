"""A run from config to table: ``gr.train.run(config)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr.train.job import run as run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name == "run":  # imported when used: it brings torch
        from gr.train.job import run

        return run
    raise AttributeError(f"module 'gr.train' has no attribute '{name}'")
