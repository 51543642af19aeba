"""Names of an operator's implementations in gr_kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def names(implementations: Iterable[Any], without: tuple[str, ...] = ("auto", "reference")) -> list[str]:
    """In gr_kernels' order of preference; ``implementations``: names, or gr_kernels.dispatch.Implementation."""
    found = [x if isinstance(x, str) else x.name for x in implementations]
    return [name for name in found if name not in without]
