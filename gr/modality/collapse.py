"""Whether the vectors of items have collapsed: all nearly one, or in a few directions.

A tuned encoder whose rate is too high does that (IDvs.MoRec, SIGIR 2023, sees HR@10 fall from 16 % to 0), and the loss
alone doesn't say it.

Shapes: n items of a sample, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 512
SAME = 0.95
"""The mean cosine from which vectors count as one."""


def effective_rank(vectors_nD: Tensor) -> float:
    """exp of the entropy of the singular values' shares, between 1 and min(n, D) (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(vectors_nD.double())
    shares = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def mean_cosine(vectors_nD: Tensor) -> float:
    """Between two different ones, on average."""
    unit_nD = torch.nn.functional.normalize(vectors_nD.double(), dim=1)
    count = len(unit_nD)
    return float((unit_nD.sum(0).square().sum() - count) / max(count * (count - 1), 1))


def sample(rows: int) -> Tensor:
    """Up to ``SAMPLE`` rows, evenly over the catalogue."""
    return torch.linspace(0, rows - 1, min(rows, SAMPLE), dtype=torch.float64).round().long()


def advice(cosine: float, rank: float, learns: bool) -> str | None:
    """A sentence where vectors have collapsed; learns: whether their encoder trains."""
    if cosine < SAME:
        return None
    encoder = "the encoder's rate (optimizer.groups, match: ^tables.items.encoder) or " if learns else ""
    again = ", or begin again with mode frozen" if learns else ", or look at what the items' contents are"
    return (
        f"the items' vectors have collapsed (mean cosine {cosine:.3f}, effective rank {rank:.1f}): lower {encoder}"
        f"optimizer.lr{again}"
    )
