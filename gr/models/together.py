"""The candidates of a request as rows of their own behind a history, none of which sees another (the public code that
followed Zhai et al., arXiv 2402.17152; there they are called targets).

Of a sequence of n actions there are C rows of context and a row for each action that a later request knows: its item,
what is known of it, and what was done, added up.  A **request** is a run of a user's consecutive actions with the same
value in one column, which is the time unless ``model.request`` names another: they were shown together, so that when
one is judged nobody knows what became of the others.  Each candidate is a row that knows its item and the moment, and
sees by attention the rows before its request, and itself.  All candidates of a request stand in one place, where the
first of them is.

The history is computed once for all requests of a sequence: its keys and values are kept (gr/models/memory.py), and a
request sees as many of them as there were.  Every loss is that of its candidate asked about alone.

Shapes: B sequences, A actions of the batch, C contexts, T rows of histories, S candidates, R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.batch import TARGETS_FROM, SequenceBatch
from gr.errors import UserError, nearest
from gr.labels import ColumnLike, Labels
from gr.models.features import Features
from gr.models.interleaved import Interleaved, Interleaving, places_of
from gr.models.memory import Seen


@dataclass(frozen=True)
class Together(Interleaved):
    """A micro-batch: as an :class:`Interleaved`, of which ``rows_T`` are the A actions and the B * C contexts, and
    queries_S number the candidates' own rows.

    times_A: int64 or None.  asked_A: int64, the place in its sequence of each action's request.  counts: of the
    candidates of each request.  seen: of the rows of its sequence, by each request.
    """

    times_A: Tensor | None
    asked_A: Tensor
    counts: tuple[int, ...]
    seen: Seen


class Gathering(Interleaving):
    """How batches become rows.  request: the column by which actions belong together."""

    def __init__(
        self,
        features: Features,
        labels: Labels,
        context: Sequence[str],
        request: str,
        columns: Sequence[ColumnLike],
    ) -> None:
        super().__init__(features, labels, context)
        known = {info.name: info for info in columns if info.of == "actions"}
        if request not in known:
            raise UserError(
                f"config key 'model.request' is '{request}', which is no column of the dataset's actions: "
                f"{nearest(request, known)}"
            )
        info = known[request]
        if info.multi or not info.type.startswith("int"):
            what = "lists" if info.multi else "text" if info.type == "string" else "numbers with decimals"
            raise UserError(
                f"config key 'model.request' is '{request}', and that column holds {what}: choose one of integers"
            )
        labels.refuse_given({request: "model.request"})
        self.column = request

    def supervise(self, batch: SequenceBatch, dropout_key: int = 0) -> Interleaved:
        """Every action of a sequence's second request and those after it is a candidate or, where the batch says which
        actions are targets, those.  Waits for a device, for the numbers of candidates and requests."""
        users_A, places_A = places_of(batch)
        from_B = batch.user_columns.get(TARGETS_FROM)
        if from_B is None:
            judged_A = self._asked(batch, users_A, places_A) > 0
        else:
            judged_A = places_A >= from_B[users_A]
        return self._made(batch, judged_A.nonzero().squeeze(1), dropout_key, supervised=True)

    def _asked(self, batch: SequenceBatch, users_A: Tensor, places_A: Tensor) -> Tensor:
        """(A,) the place in its sequence of each action's request."""
        values_A = batch.columns[self.column]
        begins_A = F.pad(values_A[1:] != values_A[:-1], (1, 0), value=True) | (places_A == 0)
        numbers_A = torch.arange(batch.actions, device=values_A.device)
        first_A = torch.where(begins_A, numbers_A, 0).cummax(0).values if batch.actions else numbers_A
        return first_A - batch.offsets_B1[users_A]

    def _made(
        self, batch: SequenceBatch, targets_S: Tensor, dropout_key: int, supervised: bool, last: bool = True
    ) -> Together:
        users_A, places_A = places_of(batch)
        asked_A = self._asked(batch, users_A, places_A)
        # of a sequence, what its last request knows
        known_B = torch.zeros_like(batch.offsets_B1[1:])
        there_B = (batch.offsets_B1.diff() > 0).nonzero().squeeze(1)
        known_B[there_B] = asked_A[batch.offsets_B1[1:][there_B] - 1]
        layout, rows_T = self._laid_out(batch, 1, known_B, known_B.tolist(), dropout_key)
        # requests are numbered in the order of their candidates
        first_S = batch.offsets_B1[users_A[targets_S]] + asked_A[targets_S]
        first_R, counts_R = torch.unique_consecutive(first_S, return_counts=True)
        seen_R = asked_A[first_R] + len(self.context)
        return Together(
            layout=layout,
            rows_T=rows_T,
            queries_S=torch.arange(len(targets_S), device=targets_S.device),
            times_A=batch.timestamps_T,
            asked_A=asked_A,
            counts=tuple(counts_R.tolist()),
            seen=Seen(users_A[first_R], seen_R, tuple(seen_R.tolist())),
            **self._of_actions(batch, targets_S, supervised),
        )
