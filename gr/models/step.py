"""What a training step tells its model.

Shapes: G targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gr.embeddings.view import View


@dataclass(frozen=True)
class StepContext:
    """key: 64 bits, the same on every rank and micro-batch of a step.  candidates_G: int64 item rows, the targets of
    the whole global batch (all ranks, all micro-batches), for models whose ``needs_global_targets`` is true.
    views: of each table, the rows that this rank's micro-batches need."""

    key: int
    candidates_G: Tensor | None = None
    views: Mapping[str, View] = field(default_factory=dict)
