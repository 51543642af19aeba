"""Vectors of items outside the batch, as they were some steps ago.

The items of a step's sequences and targets are encoded in it, with gradients.  What a step looks at besides, negatives
that are drawn or the whole catalogue, need not be: of these it takes vectors that are kept, and formed again every so
many steps.

Shapes: I items, R of them kept here, T rows in any form, U distinct rows of this process's step, F of everybody's
batch, E width of content.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from gr.embeddings.shares import Shares
from gr.embeddings.table import Array
from gr.modality.content import Content, Encoded, Sent, encoded, fetched
from gr.modality.encoder import Encoder
from gr.progress import Progress


class Refreshed(Content):
    """``formed`` for the items of the global batch.  Of others the vectors of the last step that formed all of them, no
    gradient going to the encoder: that is each step whose number is a multiple of ``every``.

    Each process keeps a stretch of them and fetches those that its step needs.
    """

    learns = True
    encoder: Encoder

    def __init__(self, formed: Encoded, every: int) -> None:
        self.formed, self.every, self.processes = formed, every, formed.processes
        self.encoder, self.width, self.collective = formed.encoder, formed.width, formed.collective
        world, rows = self.processes.world, len(formed.items.lengths_n)
        nothing_RE = torch.full((len(world.own(rows)), self.width), torch.nan, device=self.processes.device)
        self._kept = Shares(rows, nothing_RE, world)
        self._all_there = False
        self._begun: tuple[int, Sequence[Tensor]] | None = None
        self._fresh_U: Tensor | None = None

    def begin(self, step: int, batch: Sequence[Tensor]) -> None:
        self._begun = step, batch

    def of_step(self, rows_U: Tensor) -> Tensor:
        assert self._begun is not None, "a step says first which rows its batch has"
        (step, batch), self._begun = self._begun, None
        if self._due(step):
            self._refresh()
        own_T = torch.cat([rows_U[:0], *(part.reshape(-1).long() for part in batch)])
        fresh_F = self.processes.world.gather(own_T.unique()).unique()
        self._fresh_U = fresh_U = torch.isin(rows_U, fresh_F, assume_unique=True)
        vectors_UE = torch.empty(len(rows_U), self.width, device=rows_U.device)
        vectors_UE[fresh_U] = self.formed.of_step(rows_U[fresh_U])
        vectors_UE[~fresh_U] = self._kept.fetch(rows_U[~fresh_U])
        return vectors_UE

    def take_back(self, gradient_UE: Tensor) -> None:
        assert self._fresh_U is not None, "a step's gradients come back once"
        fresh_U, self._fresh_U = self._fresh_U, None
        self.formed.take_back(gradient_UE[fresh_U])

    def encodes(self, rows_G: Tensor, batch_F: Tensor) -> Tensor:
        return batch_F

    def keeps(self, rows: int, processes: int) -> dict[str, float]:
        return {"vectors of items": 4.0 * -(-rows // processes) * self.width}

    def sends(self, own: int, encoded: int, rows: int, processes: int) -> list[Sent]:
        fresh = min(own, encoded)
        others = [
            part._replace(what=f"{part.what} that are kept")
            for part in fetched(max(own - encoded, 0), self.width, processes)
        ]
        again = 4.0 * self.width * rows / processes * (processes - 1) / processes / self.every
        formed = self.formed.sends(fresh, encoded, rows, processes)
        numbers = Sent("row numbers of the batch", 8.0 * fresh * (processes - 1))
        return [numbers, *formed, *others, Sent("vectors formed again", again, True)]

    def all(self) -> Tensor:
        return self.formed.all()

    def some(self, rows_n: Tensor) -> Tensor:
        return self.formed.some(rows_n)

    def own(self) -> Tensor:
        return self.formed.own()

    def unseen(self, items: pa.Table) -> Tensor:
        return self.formed.unseen(items)

    def state(self) -> dict[str, Array]:
        kept = self._kept
        return {"content": ([kept.rows, self.width], kept.own.start, kept.own_RE)}

    def _due(self, step: int) -> bool:
        """In turn; and where rows have never been formed, as those of items that came to the dataset since the
        checkpoint that a run goes on from."""
        if step % self.every == 0:
            return True
        if not self._all_there:
            (lacking,) = self.processes.world.maximum([int(self._kept.own_RE.isnan().any())])
            self._all_there = not lacking
        return not self._all_there

    def _refresh(self) -> None:
        formed, device = self.formed, self.processes.device
        with torch.autocast(device.type, torch.bfloat16, enabled=formed.bf16):
            self._kept = encoded(self.encoder, formed.items, self.processes, formed.most, Progress())
        self._all_there = True
