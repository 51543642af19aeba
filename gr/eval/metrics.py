"""HR@k, NDCG@k and MRR from ranks, and the loss, over all users and by bucket.

Shapes: B users, M metrics, G groups (all users, then the buckets).

With one relevant item a user and its rank r: HR@k = [r <= k]; NDCG@k = [r <= k] / log2(r + 1) (Järvelin and
Kekäläinen 2002; the ideal gain is 1); MRR = 1 / r.  Gains are added up as int64 in units of 2**-32: such sums do not
depend on their order, so that batches, processes and their number change no bit of a result.

loss is the mean negative log-likelihood of the target in the softmax over the whole catalogue, nothing left out,
in nats.  It is added up in units of 2**-24, less than a loss of float32 scores is sure of; these scores may differ in
their last bits with the sizes of the batches that they are formed in, and so may the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gr.processes import Axis

UNIT = 2.0**32
LOSS_UNIT = 2.0**24
LOSS = "loss"

HISTORY_EDGES = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Lower bounds of the buckets by actions in the user's history; the last bucket is open."""

POPULARITY_EDGES = (0, 1, 10, 100, 1000, 10_000, 100_000)
"""Lower bounds of the buckets by training actions of the target item."""


def rank_metric_names(ks: Sequence[int]) -> list[str]:
    ks = sorted(set(ks))
    return [*(f"hr@{k}" for k in ks), *(f"ndcg@{k}" for k in ks), "mrr"]


class Groups:
    """All users (group 0), then the buckets of each breakdown; ``edges``: ascending lower bounds by its name.

    A user whose value lies below the first bound of a breakdown is in none of its buckets.
    """

    def __init__(self, edges: Mapping[str, Sequence[int]]) -> None:
        self.edges = {name: tuple(bounds) for name, bounds in edges.items()}
        self.count = 1 + sum(map(len, self.edges.values()))

    def of(self, users: int, **values_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Once for all users and once a breakdown: (numbers of the users in it, the group of each), both int64.
        ``values_B``: what puts a user in a bucket, by breakdown."""
        everybody = torch.arange(users)
        yield everybody, torch.zeros_like(everybody)
        first = 1
        for name, bounds in self.edges.items():
            bucket_B = torch.bucketize(values_B[name], torch.tensor(bounds), right=True) - 1
            inside = (bucket_B >= 0).nonzero()[:, 0]
            yield inside, bucket_B[inside] + first
            first += len(bounds)

    def buckets(
        self, users_G: Tensor, figures: Callable[[int], Mapping[str, float]]
    ) -> dict[str, list[dict[str, Any]]]:
        """For each breakdown, its buckets that have users: ``from``, ``to`` (inclusive, None for the open one),
        ``users`` and the ``figures`` of the group."""
        result: dict[str, list[dict[str, Any]]] = {}
        first = 1
        for name, bounds in self.edges.items():
            tops = [*(bound - 1 for bound in bounds[1:]), None]
            result[name] = [
                {"from": low, "to": top, "users": int(users_G[group]), **figures(group)}
                for group, (low, top) in enumerate(zip(bounds, tops, strict=True), first)
                if users_G[group]
            ]
            first += len(bounds)
        return result


class RankMetrics:
    """Streaming sums of the metrics; ``buckets``: ascending lower bounds by the name of a breakdown."""

    def __init__(self, ks: Sequence[int], buckets: Mapping[str, Sequence[int]] | None = None):
        self.ks = sorted(set(ks))
        self.names = rank_metric_names(ks)
        self.groups = Groups(buckets or {})
        self._sums_GM = torch.zeros(self.groups.count, len(self.names), dtype=torch.int64)
        self._users_G = torch.zeros(self.groups.count, dtype=torch.int64)
        self._losses_G, self._judged_G = torch.zeros_like(self._users_G), torch.zeros_like(self._users_G)

    def add(self, ranks_B: Tensor, losses_B: Tensor | None = None, **values_B: Tensor) -> None:
        """Count users by their ranks, and their losses where the scorer has some; ``values_B``: for each breakdown, the
        value that puts a user in a bucket."""
        gains_BM = (self._gains(ranks_B.double()) * UNIT).round().long()
        units_B = None if losses_B is None else (losses_B.double() * LOSS_UNIT).round().long()
        for users_U, group_U in self.groups.of(len(ranks_B), **values_B):
            self._sums_GM.index_add_(0, group_U, gains_BM[users_U])
            self._users_G.index_add_(0, group_U, torch.ones_like(group_U))
            if units_B is not None:
                self._losses_G.index_add_(0, group_U, units_B[users_U])
                self._judged_G.index_add_(0, group_U, torch.ones_like(group_U))

    def all_reduce(self, axis: Axis) -> None:
        """Add up over the processes."""
        for sums in (self._sums_GM, self._users_G, self._losses_G, self._judged_G):
            axis.add_up(sums)

    @property
    def users(self) -> int:
        return int(self._users_G[0])

    def result(self) -> dict[str, float]:
        """Means over all users, by name; empty without users."""
        return self._means(0)

    def by_bucket(self) -> dict[str, list[dict[str, Any]]]:
        return self.groups.buckets(self._users_G, self._means)

    def _gains(self, ranks_B: Tensor) -> Tensor:
        """(B, M) float64 gains of each user."""
        hits_BK = (ranks_B[:, None] <= torch.tensor(self.ks, dtype=torch.float64)).double()
        return torch.cat([hits_BK, hits_BK / torch.log2(ranks_B + 1)[:, None], 1 / ranks_B[:, None]], dim=1)

    def _means(self, group: int) -> dict[str, float]:
        users, judged = int(self._users_G[group]), int(self._judged_G[group])
        if not users:
            return {}
        sums = self._sums_GM[group].tolist()
        means = {name: total / UNIT / users for name, total in zip(self.names, sums, strict=True)}
        if judged == users:
            means[LOSS] = int(self._losses_G[group]) / LOSS_UNIT / users
        return means
