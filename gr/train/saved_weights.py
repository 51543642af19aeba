"""The weights in a checkpoint, and its vocabularies, without the model that they are of: a few rows of a tensor at a
time.

Moments lie beside them and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gr.train import checkpoint
from gr.train.place import AnyPath, StoreReader
from gr.train.slices import Slices

_WEIGHTS, _VOCABULARIES = "model/", "vocabulary/"


class SavedWeights:
    """``sizes``: of each parameter of the checkpoint at ``path``, by its name in the model.  ``vocabularies``: of each
    array that a vocabulary keeps, by its name in the checkpoint (``vocabulary/TABLE/...``)."""

    def __init__(self, path: AnyPath) -> None:
        self.path, self._reader = path, _Reader(path)
        self._described = {
            name.removeprefix(_WEIGHTS): entry
            for name, entry in checkpoint.described(self._reader).items()
            if name.startswith((_WEIGHTS, _VOCABULARIES))
        }
        sizes = {name: entry.size for name, entry in self._described.items()}
        self.vocabularies = {name: size for name, size in sizes.items() if name.startswith(_VOCABULARIES)}
        self.sizes = {name: size for name, size in sizes.items() if name not in self.vocabularies}

    def rows(self, name: str, rows: range) -> Iterator[Tensor]:
        """Rows of a tensor (all of it, if it has none), as saved, a stretch after another.

        A stretch ends where a part of the checkpoint does, so that each part is read once, whichever processes saved
        it, by rows or by columns.
        """
        entry = self._described[name]
        if not entry.size:
            yield self._filled(name, torch.empty(()))
            return
        firsts = {chunk.offsets[0] for chunk in entry.chunks}
        cuts = sorted({rows.start, rows.stop} | {first for first in firsts if first in rows})
        for start, stop in pairwise(cuts):
            values = torch.empty(stop - start, *entry.size[1:], dtype=entry.properties.dtype)
            self._filled(name, Slices.of_rows(entry.size, range(start, stop), values))
            yield values

    def _filled(self, name: str, wanted: Tensor) -> Tensor:
        saved_as = name if name in self.vocabularies else _WEIGHTS + name
        checkpoint.fill({saved_as: wanted}, self._reader)
        return wanted


class _Reader(StoreReader):
    """Reads what the checkpoint says of itself once: of a large table it says a lot."""

    _description: Any = None

    def read_metadata(self, *arguments: Any, **options: Any) -> Any:
        if self._description is None:
            self._description = super().read_metadata(*arguments, **options)
        return self._description
