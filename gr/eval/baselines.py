"""Baselines without gradients, fitted to training actions: popularity, last item and ItemKNN score the catalogue, the
prior gives probabilities of labels.

``judged_by``: the metric family that a baseline can be asked for.  ``needs``: columns of the training actions beside
``item``.

Shapes: B sequences, T actions in the batch, A training actions, I catalogue size, R users, P (user, item) pairs, C
co-occurrences, K neighbours of an item, or tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.labels import Labels


class Rows(Protocol):
    """Users' training actions, jagged: ``gr.data.sequences.Sequences`` has what is needed."""

    @property
    def offsets_R1(self) -> np.ndarray: ...

    @property
    def items_A(self) -> np.ndarray: ...

    @property
    def columns(self) -> Mapping[str, Any]: ...


class Popularity:
    """Items by their training actions; the same order for every user.

    The score is the dense rank of the count: equal counts tie, and float32 holds it exactly up to 2**24 levels.
    """

    judged_by = "catalogue"
    needs: frozenset[str] = frozenset()
    score_I: Tensor

    def fit(self, training: Iterable[Rows], items: int) -> Self:
        counts = np.zeros(items, np.int64)
        for rows in training:
            counts += np.bincount(rows.items_A, minlength=items)
        levels = np.unique(counts, return_inverse=True)[1]
        self.score_I = torch.from_numpy(levels.astype(np.float32))
        return self

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32."""
        return self.score_I.to(batch.items_T.device).expand(batch.sequences, -1)


class LastItem:
    """The last item of the history first, then popularity."""

    judged_by = "catalogue"
    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.popularity = Popularity()

    def fit(self, training: Iterable[Rows], items: int) -> Self:
        self.popularity.fit(training, items)
        return self

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32."""
        scores_BI = self.popularity.scores(batch).clone()
        has_history = torch.tensor([n >= 2 for n in batch.lengths], dtype=torch.bool, device=scores_BI.device)
        rows = has_history.nonzero()[:, 0]
        last = batch.items_T[batch.offsets_B1[1:][rows] - 2]
        scores_BI[rows, last] = self.popularity.score_I.max().item() + 1
        return scores_BI


class ItemKNN:
    """Cosine similarity of items by the users that have both (Sarwar et al. 2001; Deshpande and Karypis 2004).

    sim(i, j) = |users of i and j| / sqrt(|users of i| |users of j|), i != j; each item keeps its ``neighbours`` most
    similar ones (ties: the lower row).  An item's score is the sum over the distinct items of the history of the
    similarities in which it is a kept neighbour.

    Memory: 16 bytes per distinct (user, item) pair, 12 per kept neighbour, and about 40 bytes times ``chunk``
    co-occurrences counted at a time.  ``max_actions`` of a user, the latest, take part: it bounds the work, which
    grows with the square of a user's length.
    """

    judged_by = "catalogue"
    needs: frozenset[str] = frozenset()
    neighbour_IK: Tensor
    similarity_IK: Tensor

    def __init__(self, neighbours: int = 100, max_actions: int = 500, chunk: int = 2**22):
        self.neighbours, self.max_actions, self.chunk = neighbours, max_actions, chunk

    def fit(self, training: Iterable[Rows], items: int) -> Self:
        offsets_R1, items_P = _distinct(training, self.max_actions)
        users_I = np.bincount(items_P, minlength=items)
        norm_I = np.sqrt(users_I)
        width = min(self.neighbours, items)
        neighbour_IK = np.zeros((items, width), np.int64)
        similarity_IK = np.zeros((items, width), np.float32)
        for row_C, column_C, count_C in _co_occurrences(offsets_R1, items_P, users_I, self.chunk):
            apart = row_C != column_C
            row_C, column_C, count_C = row_C[apart], column_C[apart], count_C[apart]
            similarity_C = (count_C / (norm_I[row_C] * norm_I[column_C])).astype(np.float32)
            first_C = np.searchsorted(row_C, row_C)
            crowded = np.searchsorted(row_C, row_C, side="right") - first_C > width
            order = _most_similar_first(row_C[crowded], similarity_C[crowded])
            column_C[crowded] = column_C[crowded][order]
            similarity_C[crowded] = similarity_C[crowded][order]
            place_C = np.arange(len(row_C)) - first_C  # within its row
            best = place_C < width
            neighbour_IK[row_C[best], place_C[best]] = column_C[best]
            similarity_IK[row_C[best], place_C[best]] = similarity_C[best]
        self.neighbour_IK, self.similarity_IK = (
            torch.from_numpy(neighbour_IK),
            torch.from_numpy(similarity_IK),
        )
        return self

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32, on the CPU, where the neighbours are."""
        items = len(self.neighbour_IK)
        lengths_B = torch.tensor(batch.lengths, dtype=torch.int64)
        owner_T = torch.repeat_interleave(torch.arange(batch.sequences), lengths_B)
        history_T = torch.ones(batch.actions, dtype=torch.bool)
        history_T[batch.offsets_B1[1:].cpu() - 1] = False
        # each distinct pair once, in item order: a user's sums do not depend on the batch's other users
        pairs = torch.unique(owner_T[history_T] * items + batch.items_T.cpu()[history_T])
        owner, item = pairs // items, pairs % items
        scores = torch.zeros(batch.sequences * items)
        cells = owner[:, None] * items + self.neighbour_IK[item]
        scores.index_add_(0, cells.flatten(), self.similarity_IK[item].flatten())
        return scores.view(batch.sequences, items)


class Prior:
    """For each task the share of the training actions that have its label, the same for every user and item.

    Counted from half an action of each kind (Jeffreys' prior), so that a label that never occurred is not impossible.
    """

    judged_by = "pointwise"
    logits_K: Tensor

    def __init__(self, labels: Labels) -> None:
        self.labels, self.needs = labels, labels.columns

    def fit(self, training: Iterable[Rows], items: int) -> Self:
        tasks = len(self.labels.names)
        counts_2K = torch.full((2, tasks), 0.5, dtype=torch.float64)
        for rows in training:
            columns = {name: torch.from_numpy(rows.columns[name]) for name in self.needs}
            labels_AK = self.labels.of(columns)
            counts_2K += torch.stack([(labels_AK == label).sum(0) for label in (0, 1)])
        self.logits_K = (counts_2K[1] / counts_2K[0]).log().float()
        return self

    def logits(self, batch: SequenceBatch) -> Tensor:
        """(B, K) float32."""
        return self.logits_K.expand(batch.sequences, -1)


def _most_similar_first(row_C: np.ndarray, similarity_C: np.ndarray) -> np.ndarray:
    """The stable order by similarity, descending, within rows that ascend (a positive float32 sorts as its bits)."""
    key_C = (row_C << 32) - similarity_C.view(np.int32)
    return np.argsort(key_C, kind="stable")


def _distinct(training: Iterable[Rows], max_actions: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct items of each user among the latest ``max_actions``: (offsets_R1, items_P int32, sorted in a row)."""
    lengths, items = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    for rows in training:
        length_R = np.diff(rows.offsets_R1)
        owner_A = np.repeat(np.arange(len(length_R)), length_R)
        from_end_A = rows.offsets_R1[1:][owner_A] - np.arange(len(rows.items_A))
        late = from_end_A <= max_actions
        pairs = np.unique((owner_A[late] << 32) | rows.items_A[late])  # item rows fit in 32 bits
        lengths.append(np.bincount(pairs >> 32, minlength=len(length_R)))
        items.append((pairs & 0xFFFFFFFF).astype(np.int32))
    return np.cumsum(np.concatenate(lengths)), np.concatenate(items)


def _co_occurrences(
    offsets_R1: np.ndarray, items_P: np.ndarray, users_I: np.ndarray, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(item, other item, users with both) for consecutive ranges of items, every pair of a range at once.

    A range is as many items as have ``chunk`` co-occurrences together; one item with more is counted in parts.
    """
    items = len(users_I)
    length_R = np.diff(offsets_R1)
    owner_P = np.repeat(np.arange(len(length_R), dtype=np.int32), length_R)
    owner_P = owner_P[np.argsort(items_P, kind="stable")]  # item by item, its users
    first_I1 = np.concatenate([[0], np.cumsum(users_I)])
    work_P1 = np.concatenate([[0], np.cumsum(length_R[owner_P])])  # pairs made by all users before
    work_I1 = work_P1[first_I1]
    start = 0
    while start < items:
        stop = max(int(np.searchsorted(work_I1, work_I1[start] + chunk, side="right")) - 1, start + 1)
        cells = (stop - start) * items
        keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for begin, end in _parts(work_P1, int(first_I1[start]), int(first_I1[stop]), chunk):
            more = _pair_keys(owner_P, begin, end, first_I1, start, stop, offsets_R1, items_P)
            keys, counts = _merge(keys, counts, *_count(more, cells))
        yield start + keys // items, keys % items, counts
        start = stop


def _parts(work_P1: np.ndarray, begin: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    """[begin, end) cut where the work passes ``chunk``; each part has one occurrence at least."""
    while begin < end:
        stop = int(np.searchsorted(work_P1, work_P1[begin] + chunk, side="right")) - 1
        stop = min(max(stop, begin + 1), end)
        yield begin, stop
        begin = stop


def _pair_keys(
    owner_P: np.ndarray,
    begin: int,
    end: int,
    first_I1: np.ndarray,
    start: int,
    stop: int,
    offsets_R1: np.ndarray,
    items_P: np.ndarray,
) -> np.ndarray:
    """(item - start) * I + other, for each occurrence [begin, end) of items [start, stop) and its user's items."""
    user = owner_P[begin:end]
    item = np.searchsorted(first_I1[start + 1 : stop + 1], np.arange(begin, end), side="right")
    length = offsets_R1[user + 1] - offsets_R1[user]
    ends = np.cumsum(length)
    source = np.arange(ends[-1]) + np.repeat(offsets_R1[user] - (ends - length), length)
    return np.repeat(item * (len(first_I1) - 1), length) + items_P[source]


def _count(keys: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, and how often each occurs; through a table of the cells where it is small."""
    if cells > 4 * len(keys):
        return np.unique(keys, return_counts=True)
    table = np.bincount(keys, minlength=cells)
    found = np.flatnonzero(table)
    return found, table[found]


def _merge(
    keys: np.ndarray, counts: np.ndarray, more: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of two key sets added up."""
    if not len(keys):
        return more, more_counts
    both, place = np.unique(np.concatenate([keys, more]), return_inverse=True)
    return both, np.bincount(place, np.concatenate([counts, more_counts])).astype(np.int64)
