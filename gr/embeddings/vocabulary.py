"""Open vocabularies: any 64-bit ids, old and new, into the rows of a table.

An id is hashed into one of a fixed number of buckets (gr.embeddings.buckets), and the buckets are dealt to the run's
processes: each keeps what it knows of its own ones and answers for them.  A step asks once: distinct ids with their
counts go to their owners, which take them in and send back rows.  So what a bucket holds depends on the ids of the
global batches so far, and not on the number of processes nor on how they cut the batches.

Shapes: T ids of this process, U distinct ones, A ids that arrive at their owner, K distinct ones of those, N rows that
have another id now, E ids that lost their row, G buckets, P places of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gr.config import COUNT, POSITIVE, ComponentConfig
from gr.embeddings.buckets import Buckets, Changes
from gr.embeddings.table import Array
from gr.errors import UserError
from gr.processes import Processes
from gr_kernels.counter_random import derive_key, uniform_integers

MAPPING = ("keys", "counts")
"""The arrays that say which id has which row."""


@dataclass(frozen=True)
class Learnt:
    """rows: int64, of each id.  restarted_N: rows of the table, wherever they are, that have another id from now on.
    evicted_E: the ids that lost their row.  The last two are int64, on the CPU, the same on every process."""

    rows: Tensor
    restarted_N: Tensor
    evicted_E: Tensor


class OpenVocabulary:
    """``name`` and ``rows``: the table's.  ``unseen``, ``asked``: of this process's ids in the last step, how many had
    no row of their own, and how many there were.

    It takes, on the process that owns a bucket, 24 bytes a place; its index half as much.
    """

    class Config(ComponentConfig):
        """buckets: into which the rows are cut; it fixes the mapping, so it is no matter of the number of processes.
        admit_after: how often an id is seen before it gets a row; until then it shares its bucket's first one.
        evict: whose row a new id gets where none is free: the id's that was seen least recently, or least often (and
        less often than the new one); or nobody's.  waiting: ids a bucket counts that have no row yet; as many as it
        has rows where nothing is said, none where a count decides nothing."""

        name: Literal["open"] = "open"
        buckets: POSITIVE = 256
        admit_after: POSITIVE = 1
        evict: Literal["least_recently_seen", "least_often_seen", "never"] = "least_recently_seen"
        waiting: COUNT | None = None

    def __init__(self, config: Config, name: str, rows: int, processes: Processes) -> None:
        key = f"model.input.features.{name}"
        if rows % config.buckets or rows < 2 * config.buckets:
            raise UserError(
                f"{key}.rows is {rows}, and {config.buckets} buckets have equally many rows, two at least: set it to "
                f"{max(-(-rows // config.buckets), 2) * config.buckets}, or choose other {key}.vocabulary.buckets"
            )
        self.name, self.buckets, self.world = name, config.buckets, processes.world
        ranks = self.world.size
        self.bounds = torch.tensor([rank * config.buckets // ranks for rank in range(ranks + 1)])
        first, stop = self.bounds[self.world.rank : self.world.rank + 2].tolist()
        each = rows // config.buckets
        counting = config.admit_after > 1 or config.evict == "least_often_seen"
        waiting = config.waiting if config.waiting is not None else each if counting else 0
        if config.admit_after > 1 and not waiting:
            raise UserError(
                f"{key}.vocabulary.waiting is 0, and an id that is seen {config.admit_after} times before it has a row "
                "must be counted until then: leave it out, or set admit_after=1"
            )
        self.own = Buckets(first, stop - first, each, waiting, config.admit_after, config.evict)
        self.unseen = self.asked = 0

    @property
    def collective(self) -> bool:
        """Whether all processes must ask together."""
        return self.world.size > 1

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows of int64 ``ids`` of any shape, as they are known; nothing is learnt."""
        rows, _ = self._ask(ids, None)
        return rows

    def learn(self, ids: Tensor, step: int) -> Learnt:
        """Take in the ids of a step, which every process does together with its own; steps are numbered upwards."""
        rows, changes = self._ask(ids, step)
        self.unseen, self.asked = int((rows % self.own.rows == 0).sum()), rows.numel()
        # one exchange for both: what each number is stands beside it
        parts = [changes.rows_N, changes.evicted_E]
        told = np.concatenate([np.stack([p, np.full_like(p, kind)], axis=1) for kind, p in enumerate(parts)])
        told_N2 = self.world.gather(torch.from_numpy(told))
        restarted, evicted = (told_N2[told_N2[:, 1] == kind, 0] for kind in range(2))
        return Learnt(rows, restarted, evicted)

    def totals(self) -> tuple[int, int]:
        """How many ids of this process's buckets got a row since the beginning, and how many lost theirs."""
        admitted, evicted = self.own.totals_G2.sum(axis=0).tolist()
        return admitted, evicted

    def mapping(self) -> dict[str, Array]:
        """Of :meth:`state` the rows' ids, and how often each was seen, 0 where nobody has the row: (buckets, rows of
        a bucket)."""
        state, rows = self.state(), self.own.rows
        return {
            name: ([size[0], rows], first, values[:, :rows])
            for name, (size, first, values) in state.items()
            if name in MAPPING
        }

    def state(self) -> dict[str, Array]:
        """By name, to be saved or filled, a row a bucket; (buckets, places of a bucket), but for the totals."""
        own = self.own
        own.forget_index()
        arrays = {"keys": own.keys_GP, "counts": own.counts_GP, "seen": own.seen_GP, "totals": own.totals_G2}
        return {
            name: ([self.buckets, array.shape[1]], own.first, torch.from_numpy(array))
            for name, array in arrays.items()
        }

    def _ask(self, ids: Tensor, step: int | None) -> tuple[Tensor, Changes]:
        """Rows of ``ids``, and what changed where they are learnt."""
        flat_T = ids.reshape(-1).cpu()
        ids_U, place_T, counts_U = flat_T.unique(return_inverse=True, return_counts=True)
        buckets_U = self._bucket_of(ids_U)
        order_U = buckets_U.argsort(stable=True)  # processes own stretches of buckets
        sent_U3 = torch.stack([ids_U, buckets_U, counts_U], dim=1)[order_U]
        to_each = torch.searchsorted(sent_U3[:, 1].contiguous(), self.bounds).diff().tolist()
        arrived_A3, from_each = self.world.exchange(sent_U3, to_each)
        rows_A, changes = self._answer(arrived_A3, step)
        answers_U, _ = self.world.exchange(rows_A, from_each)
        rows_U = torch.empty_like(answers_U)
        rows_U[order_U] = answers_U
        return rows_U[place_T].view(ids.shape).to(ids.device), changes

    def _answer(self, asked_A3: Tensor, step: int | None) -> tuple[Tensor, Changes]:
        """(A,) rows of ids in this process's buckets, each with its bucket and count."""
        keys_K, place_A = asked_A3[:, 0].unique(return_inverse=True)
        buckets_K, counts_K = torch.zeros_like(keys_K), torch.zeros_like(keys_K)
        buckets_K[place_A] = asked_A3[:, 1]
        counts_K.index_add_(0, place_A, asked_A3[:, 2])
        keys, buckets = keys_K.numpy(), buckets_K.numpy()
        nothing = np.empty(0, np.int64)
        changes = Changes(nothing, nothing)
        if step is not None:
            changes = self.own.update(keys, buckets, counts_K.numpy(), step)
        return torch.from_numpy(self.own.rows_of(keys, buckets))[place_A], changes

    def _bucket_of(self, ids_U: Tensor) -> Tensor:
        """(U,) int64: a hash of the id, whatever the table and the seed."""
        return uniform_integers(derive_key(0, "bucket"), ids_U, torch.zeros_like(ids_U), 1, self.buckets)[
            :, 0
        ]
