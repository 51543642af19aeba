"""Searching rows that lie on several processes: each goes through its own, for everybody's queries.

Shapes: B queries of this process, G queries of all, K rows found, I rows, D width, C rows of a chunk.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.embeddings.ranks import (
    Excluded,
    Excluding,
    LogSums,
    Standing,
    best_rows,
    count_above,
    ranks_from,
    target_scores,
)
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table
from gr.processes import Processes


class DealtTable(Table):
    """Queries travel, rows don't.  Every process calls each of these together."""

    processes: Processes

    @property
    def collective(self) -> bool:  # type: ignore[override]
        return self.processes.world.size > 1

    @abstractmethod
    def own_chunks(
        self, queries_GD: Tensor, scoring: Scoring, at_least: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        """(the first row's number, (G, C) float32 scores) of chunks of this process's rows."""

    @torch.no_grad()
    def topk(
        self, queries_BD: Tensor, k: int, scoring: Scoring, exclude: Excluded | None = None
    ) -> tuple[Tensor, Tensor]:
        world, mine = self.processes.world, queries_BD.shape[0]
        queries_GD, exclude_G, first = self._of_all(queries_BD, exclude)
        scores_GK, rows_GK = best_rows(
            self.own_chunks(queries_GD, scoring, k), len(queries_GD), k, self.rows, exclude_G, queries_GD
        )
        short = min(k, self.rows) - scores_GK.shape[1]  # a process with fewer rows than k
        scores_GK = F.pad(scores_GK, (0, short), value=-torch.inf)
        rows_GK = F.pad(rows_GK, (0, short))
        scores = world.gather(scores_GK).view(world.size, len(queries_GD), -1)[:, first : first + mine]
        rows = world.gather(rows_GK).view(world.size, len(queries_GD), -1)[:, first : first + mine]
        best, place = scores.movedim(0, 1).flatten(1).topk(min(k, self.rows), dim=1)
        return best, rows.movedim(0, 1).flatten(1).gather(1, place)

    @torch.no_grad()
    def standing(
        self, queries_BD: Tensor, targets_B: Tensor, scoring: Scoring, exclude: Excluded | None = None
    ) -> Standing:
        world, mine = self.processes.world, len(targets_B)
        queries_GD, exclude_G, first = self._of_all(queries_BD, exclude)
        targets_G = world.gather(targets_B)
        excluding = None if exclude_G is None else Excluding(exclude_G, self.rows, keep=targets_G)
        sums = LogSums(len(targets_G), targets_G.device)
        bars_G = world.maximum_of(target_scores(self.own_chunks(queries_GD, scoring), targets_G, sums))
        sums.raise_to(world.maximum_of(sums.most_B.clone()))
        sums.sum_B = world.add_up(sums.sum_B)
        higher_G, equal_G = count_above(self.own_chunks(queries_GD, scoring), bars_G, targets_G, excluding)
        both = world.add_up(torch.stack([higher_G, equal_G]))
        mine_B = slice(first, first + mine)
        return Standing(ranks_from(both[0], both[1], bars_G)[mine_B], sums.losses(bars_G)[mine_B])

    @torch.no_grad()
    def scores(self, queries_BD: Tensor, scoring: Scoring) -> Tensor:
        raise TypeError("scores of all rows exist nowhere: ask for ranks or topk")

    def _of_all(self, queries_BD: Tensor, exclude: Excluded | None) -> tuple[Tensor, Excluded | None, int]:
        """Everybody's queries and exclusions, and the place of the first of this process's."""
        world = self.processes.world
        queries_GD = world.gather(queries_BD)
        counts = world.gather(torch.tensor([queries_BD.shape[0]])).tolist()
        if exclude is not None:
            lengths_G = world.gather(exclude[0].diff())
            exclude = (F.pad(lengths_G.cumsum(0), (1, 0)), world.gather(exclude[1]))
        return queries_GD, exclude, sum(counts[: world.rank])
