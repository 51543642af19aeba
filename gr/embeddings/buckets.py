"""Buckets: which ids have a row of an open vocabulary, and which wait for one.

A bucket is a block of the table's rows.  Its first row is shared by all of its ids that have none; each other row is
one id's.  An id gets a row when it has been seen often enough: a free one, or that of an id which gives way.  Until
then it waits, in one of a few places that count how often it is seen.  What becomes of a bucket in a step depends on
what it holds and on the distinct ids of the step with their counts, on nothing else: not on the order of the ids, nor
on who has the other buckets.

Shapes: G buckets, S rows of each, P places of each: S for its rows, then those where ids wait; U distinct ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

POLICIES = ("least_recently_seen", "least_often_seen", "never")


@dataclass(frozen=True)
class Changes:
    """What a step changed: rows_N, int64, of the table that have another id now; evicted_E, int64, ids that had a row
    and have none any more."""

    rows_N: np.ndarray
    evicted_E: np.ndarray


class Buckets:
    """Consecutive buckets, the first of which is number ``first``.

    rows: S, of which the first is shared.  waiting: places for ids without a row; ids that find none aren't counted.
    admit_after: how often an id is seen before it gets a row.  evict: who gives way to it, of those that aren't seen in
    the same step: the ``least_recently_seen``, or the ``least_often_seen`` if it was seen less often than the newcomer;
    ``never`` anybody.  Ties are broken by the other of the two, then by the smaller id.

    keys_GP: int64 ids.  counts_GP: int64, how often each was seen; 0 where a place is free.  seen_GP: int64, the step
    in which it was seen last.  totals_G2: int64, how many ids got a row and how many lost theirs.
    """

    def __init__(
        self, first: int, buckets: int, rows: int, waiting: int, admit_after: int, evict: str
    ) -> None:
        self.first, self.rows, self.admit_after, self.evict = first, rows, admit_after, evict
        shape = (buckets, rows + waiting)
        self.keys_GP, self.counts_GP, self.seen_GP = (np.zeros(shape, np.int64) for _ in range(3))
        self.totals_G2 = np.zeros((buckets, 2), np.int64)
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def places(self) -> int:
        """P."""
        return self.keys_GP.shape[1]

    def forget_index(self) -> None:
        """The arrays are about to be filled by somebody else."""
        self._index = None

    def rows_of(self, keys_U: np.ndarray, buckets_U: np.ndarray) -> np.ndarray:
        """(U,) int64 rows of the table; an id without a row has its bucket's first."""
        places_U = self._find(keys_U)
        own_U = (places_U >= 0) & (places_U % self.places < self.rows)
        return buckets_U * self.rows + np.where(own_U, places_U % self.places, 0)

    def update(self, keys_U: np.ndarray, buckets_U: np.ndarray, counts_U: np.ndarray, step: int) -> Changes:
        """Take in the ids of a step: distinct, with their buckets and how often each was seen in it."""
        places_U = self._find(keys_U)
        known_U = places_U >= 0
        self.counts_GP.reshape(-1)[places_U[known_U]] += counts_U[known_U]
        self.seen_GP.reshape(-1)[places_U[known_U]] = step
        rowless = np.flatnonzero(~known_U | (places_U % self.places >= self.rows))
        # by bucket, the most often seen first, then the smaller id
        counts_U = np.where(known_U, self.counts_GP.reshape(-1)[places_U], counts_U)
        rowless = rowless[np.lexsort((keys_U[rowless], -counts_U[rowless], buckets_U[rowless]))]
        ends = np.flatnonzero(np.diff(buckets_U[rowless], append=-1)) + 1
        changes = _Moves(self)
        for start, stop in zip([0, *ends], ends):
            these = rowless[start:stop]
            bucket = int(buckets_U[these[0]]) - self.first
            self._settle(bucket, keys_U[these], counts_U[these], places_U[these], step, changes)
        self._index = changes.indexed(self._index)
        return Changes(np.array(changes.rows, np.int64), np.array(changes.evicted, np.int64))

    def _settle(
        self,
        bucket: int,
        keys_U: np.ndarray,
        counts_U: np.ndarray,
        places_U: np.ndarray,
        step: int,
        moves: _Moves,
    ) -> None:
        """Give rows, or places to wait, to ids of one bucket that were seen in this step and have no row; the first
        come first."""
        waited_U, admitted = places_U >= 0, 0
        if ready := int((counts_U >= self.admit_after).sum()):  # counts fall
            rows_N = self._room(bucket, 1, self.rows, ready, step, self.evict)
            if self.evict == "least_often_seen":
                rows_N = rows_N[self.counts_GP[bucket, rows_N] < counts_U[: len(rows_N)]]
            admitted = len(rows_N)
            taken = rows_N[self.counts_GP[bucket, rows_N] > 0]
            moves.evict(bucket, taken)
            self.totals_G2[bucket] += admitted, len(taken)
            moves.leave(bucket, places_U[:admitted][waited_U[:admitted]] % self.places)
            moves.enter(bucket, rows_N, keys_U[:admitted], counts_U[:admitted], step)
        new = admitted + np.flatnonzero(~waited_U[admitted:])
        if not len(new) or self.places == self.rows:
            return
        spare_N = self._room(bucket, self.rows, self.places, len(new), step, "least_recently_seen")
        moves.leave(bucket, spare_N[self.counts_GP[bucket, spare_N] > 0])
        new = new[: len(spare_N)]
        moves.enter(bucket, spare_N, keys_U[new], counts_U[new], step)

    def _room(self, bucket: int, first: int, stop: int, wanted: int, step: int, evict: str) -> np.ndarray:
        """At most ``wanted`` of a bucket's places ``first`` to ``stop`` (exclusive) that an id may have: free ones in
        their order, then those of ids that give way, the first to go first."""
        counts_N = self.counts_GP[bucket, first:stop]
        free = np.flatnonzero(counts_N == 0)[:wanted]
        needed = wanted - len(free)
        if not needed or evict == "never":
            return first + free
        seen_N, keys_N = self.seen_GP[bucket, first:stop], self.keys_GP[bucket, first:stop]
        old = np.flatnonzero((counts_N > 0) & (seen_N < step))
        by, then = (counts_N, seen_N) if evict == "least_often_seen" else (seen_N, counts_N)
        if len(old) > needed:  # most needn't be sorted to find the first
            old = old[by[old] <= np.partition(by[old], needed - 1)[needed - 1]]
        order = np.lexsort((keys_N[old], then[old], by[old]))[:needed]
        return first + np.concatenate([free, old[order]])

    def _find(self, keys_U: np.ndarray) -> np.ndarray:
        """(U,) where each id stands among all places of all buckets, -1 for one that is unknown."""
        if self._index is None:
            places = np.flatnonzero(self.counts_GP)
            keys = self.keys_GP.reshape(-1)[places]
            order = np.argsort(keys)
            self._index = keys[order], places[order]
        keys, places = self._index
        if not len(keys):
            return np.full(len(keys_U), -1)
        at_U = np.minimum(np.searchsorted(keys, keys_U), len(keys) - 1)
        return np.where(keys[at_U] == keys_U, places[at_U], -1)


class _Moves:
    """Ids that come and go in a step, for the arrays at once and for the index at the end."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.rows: list[int] = []
        self.evicted: list[int] = []
        self._left: list[np.ndarray] = []
        self._entered: list[np.ndarray] = []

    def evict(self, bucket: int, rows_N: np.ndarray) -> None:
        self.evicted += self.buckets.keys_GP[bucket, rows_N].tolist()
        self.leave(bucket, rows_N)

    def leave(self, bucket: int, places_N: np.ndarray) -> None:
        self._left.append(self.buckets.keys_GP[bucket, places_N])
        self.buckets.counts_GP[bucket, places_N] = 0

    def enter(
        self, bucket: int, places_N: np.ndarray, keys_N: np.ndarray, counts_N: np.ndarray, step: int
    ) -> None:
        own = self.buckets
        own.keys_GP[bucket, places_N] = keys_N
        own.counts_GP[bucket, places_N] = counts_N
        own.seen_GP[bucket, places_N] = step
        self._entered.append(bucket * own.places + places_N)
        rows_N = places_N[places_N < own.rows]
        self.rows += ((own.first + bucket) * own.rows + rows_N).tolist()

    def indexed(self, index: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray] | None:
        """``index`` after all that happened."""
        if index is None or not self._entered:
            return index
        (keys, places), left = index, np.sort(np.concatenate([np.empty(0, np.int64), *self._left]))
        entered = np.concatenate(self._entered)
        gone = np.searchsorted(keys, left)
        keys, places = np.delete(keys, gone), np.delete(places, gone)
        new = self.buckets.keys_GP.reshape(-1)[entered]
        order = np.argsort(new)
        at = np.searchsorted(keys, new[order])
        return np.insert(keys, at, new[order]), np.insert(places, at, entered[order])
