"""How a query and a row of a table become a score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """score = scale * <q, e>, plus the row's bias where ``bias`` says so, in float32.

    With ``normalize_eps`` the row is divided by max(its L2 norm, normalize_eps) first (the query is taken as given).
    With ``dim`` a row is its first so many numbers, as many as the query has.
    """

    scale: float = 1.0
    normalize_eps: float | None = None
    bias: bool = False
    dim: int | None = None

    def columns(self, rows_CD: Tensor) -> Tensor:
        """Of each row what counts."""
        return rows_CD if self.dim is None else rows_CD[:, : self.dim].contiguous()
