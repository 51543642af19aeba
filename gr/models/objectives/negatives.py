"""Sampled negatives: pure functions of (key, sample ordinal, position, draw).

Shapes: S targets, K negatives, I catalogue size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gr.models.model import Catalogue
from gr.models.tasks import Supervision
from gr_kernels.counter_random import derive_key, uniform_integers
from gr_kernels.tracing import with_numbers

Sampling = Literal["uniform", "popularity"]
_MAX_HIGH = (1 << 31) - 1  # draws are int32


class NegativeSampler(nn.Module):
    """Draws item rows with replacement, uniformly or in proportion to the training counts."""

    ends_I: Tensor
    log_q_I: Tensor | None
    """The log of the probability that one draw is the item; None where it is the same for all."""

    def __init__(self, sampling: Sampling, catalogue: Catalogue) -> None:
        super().__init__()
        self.items = catalogue.rows
        self.popularity = sampling == "popularity"
        with with_numbers():  # draws hang on them
            ends_I, shares_I = popularity(catalogue.training_counts) if self.popularity else (None, None)
            self.register_buffer("ends_I", ends_I, persistent=False)
            self.register_buffer("log_q_I", None if shares_I is None else shares_I.log(), persistent=False)
            if ends_I is not None:
                self.tickets = int(ends_I[-1])

    def own(self, key: int, supervision: Supervision, negatives: int) -> Tensor:
        """(S, 1 + K) int32: each target, then negatives drawn for it alone."""
        rows = self._draw(
            derive_key(key, "negatives"), supervision.ordinals_S, supervision.positions_S, 1 + negatives
        )
        rows[:, 0] = supervision.targets_S
        return rows

    def shared(self, key: int, negatives: int, device: torch.device) -> Tensor:
        """(K,) int32: negatives that every target of the global batch shares; the same on all ranks."""
        nobody = torch.zeros(1, dtype=torch.int64, device=device)
        return self._draw(derive_key(key, "shared negatives"), nobody, nobody, negatives)[0]

    def _draw(self, key: int, ordinals: Tensor, positions: Tensor, draws: int) -> Tensor:
        if not self.popularity:
            return uniform_integers(key, ordinals, positions, draws, self.items, dtype=torch.int32)
        tickets = uniform_integers(key, ordinals, positions, draws, self.tickets, dtype=torch.int32)
        # ticket r belongs to the first item whose range of tickets ends beyond r
        return torch.searchsorted(self.ends_I, tickets, right=True, out_int32=True)


def popularity(item_counts: Tensor) -> tuple[Tensor, Tensor]:
    """(ends_I int32, shares_I float32): item i owns the tickets ends[i-1] .. ends[i]-1, one for each training count.

    An item never seen in training owns none; its share, of which a logarithm is taken, is that of one count.
    Totals beyond 2^31 - 1 are scaled down to it.
    """
    counts = item_counts.detach().double()
    ends = counts.cumsum(0)
    total = float(ends[-1]) if len(ends) else 0.0
    if not total > 0:
        raise ValueError("popularity needs an item seen at least once in training")
    if total > _MAX_HIGH:
        ends = (ends * (_MAX_HIGH / total)).floor()
    return ends.to(torch.int32), (counts.clamp_min(1) / total).float()
