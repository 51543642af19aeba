"""What a training step tells its model.

Shapes: G targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gr.embeddings.view import View

KEPT = 1 << 24
"""Candidates that a step keeps between announcing their rows and looking at them: 64 MiB."""


@dataclass(frozen=True)
class StepContext:
    """key: 64 bits, the same on every rank and micro-batch of a step.  candidates_G: int64 item rows, the targets of
    the whole global batch (all ranks, all micro-batches), for models whose ``needs_global_targets`` is true.
    views: of each table, the rows that this rank's micro-batches need.  drawn: see :meth:`announced`.  number: the
    step's, the run's first being 0."""

    key: int
    candidates_G: Tensor | None = None
    views: Mapping[str, View] = field(default_factory=dict)
    drawn: dict[int, Tensor] = field(default_factory=dict)
    number: int = 0

    def announced(self, part: Any, draw: Callable[[], Tensor]) -> Tensor:
        """The candidates of a micro-batch, drawn to say which rows it will look at; as far as there is room they are
        kept until :meth:`taken`, for drawing them twice costs about a twentieth of a small model's step on a CPU."""
        candidates = draw()
        if sum(kept.numel() for kept in self.drawn.values()) + candidates.numel() <= KEPT:
            self.drawn[id(part)] = candidates
        return candidates

    def taken(self, part: Any, draw: Callable[[], Tensor]) -> Tensor:
        """What was announced, or, where nothing is kept, the same drawn now: draws are functions of counters."""
        kept = self.drawn.pop(id(part), None)
        return draw() if kept is None else kept
