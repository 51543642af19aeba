"""SequenceBatch: the only thing that crosses from data to model.

Shapes: B sequences, T actions in the batch (sum of lengths).

A sequence is given whole, *including the action to be predicted*: a sample of n + 1 actions has n inputs
(all but its last action) and n targets (all but its first).  In training every target is supervised; in
evaluation only the last one is, and its item may be ``UNKNOWN`` when recommendations are asked for (its
timestamp, the time of the request, is known and used).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UNKNOWN = -1
"""Item row of a target that is not known (a request for recommendations)."""


@dataclass(frozen=True)
class SequenceBatch:
    """B jagged sequences.

    offsets_B1: int64, row offsets of the sequences; ``offsets_B1[0] == 0``, ``offsets_B1[-1] == T``.
    items_T: int64, catalogue rows (``UNKNOWN`` only at a sequence's last action).
    ordinals_B: int64, each sample's number in the dataset's canonical order: the identity that random draws hang on.
    lengths: the lengths as Python integers, so that no kernel launch has to ask a device for them.
    timestamps_T: int64 seconds, or None for data without times.
    action_types_T: int64 codes, or None.
    """

    offsets_B1: Tensor
    items_T: Tensor
    ordinals_B: Tensor
    lengths: tuple[int, ...]
    timestamps_T: Tensor | None = None
    action_types_T: Tensor | None = None

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def actions(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> SequenceBatch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SequenceBatch:
        return self._map(lambda t: t.pin_memory())

    def split(self, max_actions: int) -> list[SequenceBatch]:
        """Consecutive parts of at most ``max_actions`` actions each (one sequence at least): micro-batches."""
        parts, start, actions = [], 0, 0
        for i, length in enumerate(self.lengths):
            if i > start and actions + length > max_actions:
                parts.append(self.slice(start, i))
                start, actions = i, 0
            actions += length
        return [*parts, self.slice(start, self.sequences)]

    def slice(self, start: int, stop: int) -> SequenceBatch:
        """Sequences ``start`` to ``stop`` (exclusive)."""
        if start == 0 and stop == self.sequences:
            return self
        first, last = sum(self.lengths[:start]), sum(self.lengths[:stop])
        return SequenceBatch(
            offsets_B1=self.offsets_B1[start : stop + 1] - first,
            items_T=self.items_T[first:last],
            ordinals_B=self.ordinals_B[start:stop],
            lengths=self.lengths[start:stop],
            timestamps_T=None if self.timestamps_T is None else self.timestamps_T[first:last],
            action_types_T=None if self.action_types_T is None else self.action_types_T[first:last],
        )

    def _map(self, change) -> SequenceBatch:
        moved = {
            f.name: change(value)
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None and f.name != "lengths"
        }
        return replace(self, **moved)
