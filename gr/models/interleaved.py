"""Items and actions as rows of their own: Phi_0, a_0, Phi_1, a_1, ... (Zhai et al., arXiv 2402.17152, the ranking
task).

Of a sequence of n actions there are C rows of context, and for each action a row of its item and one of what was done
with it, but none of the latter for the last: C + 2 n - 1 rows.  An item's row knows the item, what is known of it and
of the moment at which it was shown, and by attention all rows before it: there it answers for its own action, whose row
comes after it.  So nothing knows its own label, and everything is causal: the rows of a history are the same whatever
comes after it.

A row's time is its action's, as query and as key alike; a context's that of the first action.

Shapes: B sequences, A actions of the batch, C contexts, T rows, S candidates, K tasks, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gr.batch import TARGETS_FROM, SequenceBatch
from gr.errors import UserError, nearest
from gr.labels import Labels
from gr.models.features import Features
from gr.models.layout import JaggedLayout, sequence_of_rows
from gr.models.tasks import Known, places_asked
from gr.processes import Axis


@dataclass(frozen=True)
class Interleaved:
    """A micro-batch.

    layout: of the T rows.  items_A: int64 item rows.  labels_AK: float32, NaN where unknown.  places_A: int64, each
    action's place in its sequence.  rows_T: int64, where each row comes from among the A items, the A actions and the
    B * C contexts, put one after the other.  queries_S: int64, the rows that answer; targets_S_in_A: int64, for which
    actions.  labels_SK: of these, empty in a request.  known: by feature, one row (or list) an action, or a user.
    """

    layout: JaggedLayout
    items_A: Tensor
    labels_AK: Tensor
    places_A: Tensor
    rows_T: Tensor
    queries_S: Tensor
    targets_S_in_A: Tensor
    labels_SK: Tensor
    known: Mapping[str, Known]

    @property
    def count(self) -> int:
        """S."""
        return self.queries_S.shape[0]

    @property
    def targets_S(self) -> Tensor:
        """int64 item rows."""
        return self.items_A[self.targets_S_in_A]

    def part_of(self, context: Axis) -> Interleaved:
        """Sequences are whole: the model isn't cuttable."""
        return self


class Interleaving:
    """How batches become rows.  context: names of features of users, a row each in front."""

    def __init__(self, features: Features, labels: Labels, context: Sequence[str]) -> None:
        self.features, self.labels, self.context = features, labels, list(context)
        of_users = [feature.name for feature in features.features if feature.of == "users"]
        if unknown := [name for name in context if name not in of_users]:
            raise UserError(
                f"config key 'model.context' has '{unknown[0]}', which is no feature of users: "
                f"{nearest(unknown[0], of_users)}"
            )

    def supervise(self, batch: SequenceBatch, dropout_key: int = 0) -> Interleaved:
        """Every action but a sequence's first is a candidate or, where the batch says which actions are targets, those
        (for whose number the device is waited for once)."""
        users_A, places_A = places_of(batch)
        from_B = batch.user_columns.get(TARGETS_FROM)
        if from_B is None:
            targets = sum(max(n - 1, 0) for n in batch.lengths)
            # all but the first of each sequence, without waiting for a device
            counts_B = (batch.offsets_B1.diff() - 1).clamp_min(0)
            sequence_S = torch.repeat_interleave(counts_B, output_size=targets)
            first_B = counts_B.cumsum(0) - counts_B
            within_S = torch.arange(targets, device=counts_B.device) - first_B[sequence_S]
            targets_S = batch.offsets_B1[sequence_S] + within_S + 1
        else:
            targets_S = (places_A >= from_B[users_A]).nonzero().squeeze(1)
        return self._made(batch, targets_S, dropout_key, supervised=True)

    def request(self, batch: SequenceBatch) -> Interleaved:
        """The last action of each sequence is the candidate."""
        return self._made(batch, places_asked(batch), 0, supervised=False)

    def history(self, batch: SequenceBatch) -> Interleaved:
        """All but the candidate: of each sequence, whose last action stands for whatever is to be judged in its place,
        the rows before that one's.  Nobody answers."""
        nobody_S = batch.offsets_B1[:0]
        return self._made(batch, nobody_S, 0, supervised=False, last=False)

    def by_kind(self, part: Interleaved) -> dict[str, dict[str, Known]]:
        """The features by what they belong to: ``items``, the moment when one is ``shown`` (and the user), what was
        ``done``, and rows of ``context``."""
        others = {name: known for name, known in part.known.items() if name not in self.context}
        return {**self.features.by_kind(others), "context": {name: part.known[name] for name in self.context}}

    def _made(
        self,
        batch: SequenceBatch,
        targets_S: Tensor,
        dropout_key: int,
        supervised: bool,
        last: bool = True,
    ) -> Interleaved:
        """``last``: whether each sequence's last action has a row."""
        without = 1 if last else 2
        counts = [2 * n - without if n else 0 for n in batch.lengths]
        counts_B = (2 * batch.offsets_B1.diff() - without).clamp_min(0)
        layout, rows_T = self._laid_out(batch, 2, counts_B, counts, dropout_key)
        users_A, places_A = places_of(batch)
        first_S = layout.offsets_B1[users_A[targets_S]] + len(self.context)
        return Interleaved(
            layout=layout,
            rows_T=rows_T,
            queries_S=first_S + 2 * places_A[targets_S],
            **self._of_actions(batch, targets_S, supervised),
        )

    def _laid_out(
        self, batch: SequenceBatch, kinds: int, counts_B: Tensor, counts: Sequence[int], dropout_key: int
    ) -> tuple[JaggedLayout, Tensor]:
        """The layout of a row for each context of every sequence that has actions, and behind them the first
        ``counts_B`` rows of its actions, which have ``kinds`` of them each; and (T,) where each comes from among all
        actions' rows of the first kind, then of the next, then the B * C contexts.

        counts: counts_B as Python integers."""
        contexts, device = len(self.context), batch.offsets_B1.device
        lengths = tuple(contexts + count if n else 0 for n, count in zip(batch.lengths, counts, strict=True))
        rows_B = torch.where(batch.offsets_B1.diff() > 0, contexts + counts_B, 0)
        offsets_B1 = F.pad(rows_B.cumsum(0), (1, 0))
        sequences_T = sequence_of_rows(offsets_B1, sum(lengths))
        local_T = torch.arange(sum(lengths), device=device) - offsets_B1[sequences_T] - contexts
        of_actions_T = local_T.clamp_min(0)
        action_T = batch.offsets_B1[sequences_T] + of_actions_T // kinds
        context_T = kinds * batch.actions + sequences_T * contexts + local_T + contexts
        times_A = batch.timestamps_T
        times_T = None if times_A is None else times_A[action_T]
        layout = JaggedLayout(
            offsets_B1,
            lengths,
            max(lengths, default=0),
            query_times_T=times_T,
            key_times_T=times_T,
            dropout_key=dropout_key,
        )
        return layout, torch.where(local_T < 0, context_T, action_T + of_actions_T % kinds * batch.actions)

    def _of_actions(self, batch: SequenceBatch, targets_S: Tensor, supervised: bool) -> dict[str, Any]:
        """The fields that hang on no layout."""
        users_A, places_A = places_of(batch)
        labels_AK = self.labels.of(batch.columns)
        return {
            "items_A": batch.items_T,
            "labels_AK": labels_AK,
            "places_A": places_A,
            "targets_S_in_A": targets_S,
            "labels_SK": labels_AK[targets_S] if supervised else labels_AK[:0],
            "known": self._known(batch, users_A),
        }

    def _known(self, batch: SequenceBatch, users_A: Tensor) -> dict[str, Known]:
        """What features know of every action, and those of context of every user."""
        return {
            feature.name: self.features.known_at(
                batch, feature.name, None if feature.name in self.context else users_A
            )
            for feature in self.features.features
        }


def places_of(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """(A,) each: the sequence of each action, and its place in that."""
    users_A = sequence_of_rows(batch.offsets_B1, batch.actions)
    return users_A, torch.arange(batch.actions, device=users_A.device) - batch.offsets_B1[users_A]
