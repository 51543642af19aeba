"""What an evaluation needs of a scorer and of a request.  Shapes: B sequences, I catalogue size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gr.batch import SequenceBatch


class Scorer(Protocol):
    """Anything that scores the whole catalogue for the last action of each sequence.

    One whose scores are probabilities says so (``gives_probabilities``), and has a loss then."""

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32, higher is better; must not look at the last action's item (its time is known)."""


class Request(Protocol):
    """Sequences with their targets and excluded items, as ``gr.data.requests.Request`` has them."""

    @property
    def batch(self) -> SequenceBatch: ...

    @property
    def targets_B(self) -> Tensor: ...

    @property
    def exclude_offsets(self) -> Tensor: ...

    @property
    def exclude_items(self) -> Tensor: ...

    @property
    def history_lengths_B(self) -> Tensor: ...

    @property
    def users(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Request: ...


class Requests(Protocol):
    """A process's requests, as often as wanted."""

    def __iter__(self) -> Iterator[Request]: ...

    def empty(self) -> Request:
        """A request about nobody."""
