"""What a training step tells its objective.

Shapes: G targets of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepContext:
    """key: 64 bits, the same on every rank and micro-batch of a step; candidates_G: int64 item rows, the targets of
    the whole global batch (all ranks, all micro-batches), for objectives whose ``needs_global_targets`` is true."""

    key: int
    candidates_G: Tensor | None = None
