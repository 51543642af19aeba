"""What an evaluation needs of a scorer and of a request.  Shapes: B sequences, I catalogue size."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gr.batch import SequenceBatch


class Scorer(Protocol):
    """Anything that scores the whole catalogue for the last action of each sequence."""

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32, higher is better; must not look at the last action's item (its time is known)."""


class Request(Protocol):
    """Sequences with their targets and excluded items, as ``gr.data.requests.Request`` has them."""

    batch: Any
    targets_B: Any
    exclude_offsets: Any
    exclude_items: Any
    history_lengths_B: Any
    users: np.ndarray

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Any: ...
