"""Which keys a row sees. `allowed` is the specification; every implementation is held to it.

n rows of one sequence: c context rows (who, where), then history, then t targets (candidates to be scored).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys of its sequence a row sees; the formula is in `allowed`.

    causal:    its own and earlier ones. Without it every key, and the rest must be left alone.
    window:    above 0, history no further back than this many rows; a target counts from the end of history.
    full_rows: above 0, so many last rows of history, and the targets, are free of the window.
    contexts:  the first rows of every sequence are context: they see each other and all of the history.
    targets:   (B,) int64 or int32 on the tensors' device: the last targets[b] rows of sequence b are candidates. They
               see context, history and themselves, and nobody else sees them.
    """

    causal: bool = True
    window: int = 0
    full_rows: int = 0
    contexts: int = 0
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("window", "full_rows", "contexts"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"AttentionMask.{name} must be a number of rows, not {value}.")
            if value and not self.causal:
                raise ValueError(
                    f"AttentionMask.{name} is for causal attention: without it every key is seen."
                )
        if self.targets is not None and not self.causal:
            raise ValueError("AttentionMask.targets is for causal attention: without it every key is seen.")

    @property
    def plain(self) -> bool:
        """Whether the mask is causal or full, and no more."""
        return self.targets is None and not (self.window or self.contexts)


def allowed(mask: AttentionMask, i: Tensor, j: Tensor, length: Tensor | int, targets: Tensor | int) -> Tensor:
    """Whether row i sees key j of a sequence.

    i, j: int64 of any shapes that broadcast, 0 <= i, j < length. length: rows of the sequence. targets: how many of
    the last rows are targets (0 without). Returns bool of the broadcast shape.

    As in HSTU's public ranking code (meta-recsys/generative-recommenders): rows get an order id, the same for all
    contexts (0) and for all targets (the highest), and see lower ids and themselves.
    """
    if not mask.causal:
        return torch.ones_like(i + j, dtype=torch.bool)
    ahead = max(mask.contexts - 1, 0)  # rows by which contexts' sharing an id moves the others'
    highest = torch.as_tensor(length - targets - ahead, device=i.device).clamp_min(0)
    id_i = torch.minimum((i - ahead).clamp_min(0), highest)
    id_j = torch.minimum((j - ahead).clamp_min(0), highest)
    earlier = id_i > id_j
    if mask.window:
        near = id_i - id_j <= mask.window
        earlier &= (near | (id_i >= highest - mask.full_rows)) if mask.full_rows else near
    seen = earlier | (i == j)
    if mask.contexts:
        seen |= (id_i == 0) & (id_j < highest)
    return seen
