"""How a query and a row of a table become a score."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scoring:
    """score = scale * <q, e>, plus the row's bias where ``bias`` says so, in float32.

    With ``normalize_eps`` the row is divided by max(its L2 norm, normalize_eps) first (the query is taken as given).
    """

    scale: float = 1.0
    normalize_eps: float | None = None
    bias: bool = False
