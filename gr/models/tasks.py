"""Tasks: from a batch of action sequences to inputs, queries and targets.

Shapes: B sequences, A actions of the batch, T input rows, F of them with a known feature, V values of those, S
supervised targets, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gr.batch import TARGETS_FROM, UNKNOWN, Jagged, SequenceBatch, values_of
from gr.config import ComponentConfig
from gr.errors import UserError
from gr.models.cut import Cut, cut
from gr.models.layout import JaggedLayout
from gr.processes import Axis
from gr_kernels.counter_random import derive_key, uniform_floats

MASK = -1
"""The input token whose item is hidden."""


@dataclass(frozen=True)
class Known:
    """What is known of a feature: rows_F, int64, of its table, or lists of them, whose vectors are pooled as
    ``pooling`` says, or numbers_F, float32, how many times each is taken; at the input rows ``places_F``, int64 and
    ascending, or at all of them in order where that is None."""

    rows_F: Tensor | Jagged
    places_F: Tensor | None = None
    pooling: str = "mean"
    numbers_F: Tensor | None = None

    @property
    def rows_V(self) -> Tensor:
        """All rows that are looked at."""
        return values_of(self.rows_F)

    def at(self, places_N: Tensor) -> Known:
        """What is known at these of all rows."""
        numbers_N = None if self.numbers_F is None else self.numbers_F[places_N]
        return Known(taken(self.rows_F, places_N), None, self.pooling, numbers_N)

    def part_of(self, cut: Cut) -> Known:
        """What is known at the rows of a cut."""
        if self.places_F is None:
            return self.at(cut.numbers_T)
        chosen_F, places_F = cut.among(self.places_F)
        return replace(self.at(chosen_F), places_F=places_F)


def taken(column: Any, places_N: Tensor, values: int | None = None) -> Any:
    """The values, or lists, of a column at int64 ``places_N``.  values: how many those lists hold, where it is known;
    else a device is waited for."""
    if not isinstance(column, Jagged):
        return column[places_N]
    offsets_N1 = F.pad(column.offsets.diff()[places_N].cumsum(0), (1, 0))
    values = int(offsets_N1[-1]) if values is None else values
    shift_N = column.offsets[places_N] - offsets_N1[:-1]
    source_V = torch.arange(values, device=places_N.device) + torch.repeat_interleave(
        shift_N, offsets_N1.diff(), output_size=values
    )
    return Jagged(offsets_N1, column.values[source_V])


@dataclass(frozen=True)
class Supervision:
    """What goes into the encoder, and what must come out of it.

    tokens_T: int64 input item rows, MASK where hidden.  queries_S: int64 rows of the encoder's output, or None for
    all of them in order; the row T (only in requests, when ``some_without_input``) stands for a sequence with no
    input and selects a zero vector.  targets_S: int64 item rows.  ordinals_S, positions_S: the sample and the
    place in it of each target, on which random draws hang.  features: by name, what else is known at the inputs; a task
    leaves them out, a model that has some puts them in.
    """

    tokens_T: Tensor
    layout: JaggedLayout
    queries_S: Tensor | None
    targets_S: Tensor
    ordinals_S: Tensor
    positions_S: Tensor
    some_without_input: bool = False
    features: Mapping[str, Known] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """S."""
        return self.targets_S.shape[0]

    def rows_T(self, masks: bool) -> Tensor:
        """The item rows to look up for the tokens.  With ``masks`` a target's stands where an item is hidden: that one
        is looked at anyway, so that no row is moved for having stood there."""
        if not masks:
            return self.tokens_T
        target_1 = F.pad(self.targets_S, (0, 1))[:1].clamp_min(0)
        return torch.where(self.tokens_T == MASK, target_1, self.tokens_T)

    def part_of(self, context: Axis) -> Supervision:
        """The rows of the sequences that this process has among those which share them, and the targets at these rows;
        for training."""
        if context.size == 1:
            return self
        layout = cut(self.layout, context)
        assert layout.cut is not None
        chosen_S, queries_S = layout.cut.numbers_T, None
        if self.queries_S is not None:
            chosen_S, queries_S = layout.cut.among(self.queries_S)
        return Supervision(
            tokens_T=self.tokens_T[layout.cut.numbers_T],
            layout=layout,
            queries_S=queries_S,
            targets_S=self.targets_S[chosen_S],
            ordinals_S=self.ordinals_S[chosen_S],
            positions_S=self.positions_S[chosen_S],
            features={name: known.part_of(layout.cut) for name, known in self.features.items()},
        )

    def select(self, encoded_TD: Tensor) -> Tensor:
        """The queries (S, D) out of the encoder's output."""
        if self.queries_S is None:
            return encoded_TD
        if self.some_without_input:
            encoded_TD = F.pad(encoded_TD, (0, 0, 0, 1))
        return encoded_TD.index_select(0, self.queries_S)


class NextItem:
    """Predict action i + 1 from actions 0 .. i: every action but the last is an input, every one but the first a
    target; or only the last one is."""

    class Config(ComponentConfig):
        """targets: all, or of each sequence the last alone (what Adapter4Rec, WSDM 2024, calls CPC)."""

        name: Literal["next_item"] = "next_item"
        targets: Literal["all", "last"] = "all"

    extra_inputs = 0
    ahead = 1  # an input row predicts the action so many places behind its own
    masks = False
    needs_causal = True  # row i predicts the action of row i + 1: who sees that row sees the answer

    def __init__(self, config: Config) -> None:
        self.config = config

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Supervision:
        """Every input row is a query, or those before a target where the batch says which actions are, or the last one
        alone is (for whose number the device is waited for once).  Keys: this step's, and the layout's for dropout."""
        layout, source_T = _all_but_last(batch, dropout_key)
        whole = Supervision(
            tokens_T=batch.items_T[source_T],
            layout=layout,
            queries_S=None,
            targets_S=batch.items_T[source_T + 1],
            ordinals_S=batch.ordinals_B[layout.sequences_T],
            positions_S=layout.positions_T,
        )
        from_B = batch.user_columns.get(TARGETS_FROM)
        if from_B is None and self.config.targets == "all":
            return whole
        asked_T = torch.ones_like(layout.positions_T, dtype=torch.bool)
        if from_B is not None:
            asked_T &= layout.positions_T + 1 >= from_B[layout.sequences_T]
        if self.config.targets == "last":
            asked_T &= layout.positions_T + 1 == layout.offsets_B1.diff()[layout.sequences_T]
        queries_S = asked_T.nonzero().squeeze(1)
        return replace(
            whole,
            queries_S=queries_S,
            targets_S=whole.targets_S[queries_S],
            ordinals_S=whole.ordinals_S[queries_S],
            positions_S=whole.positions_S[queries_S],
        )

    def request(self, batch: SequenceBatch) -> Supervision:
        """One query a sequence, at its last input row; the target may be UNKNOWN."""
        layout, source_T = _all_but_last(batch)
        return _asked_at_the_end(batch, batch.items_T[source_T], layout)


class Cloze:
    """Hide some actions and predict them from all the others (BERT4Rec, Sun et al., arXiv 1904.06690).

    Each action is hidden with ``mask_probability``; a sample in which none was drawn hides its last action.  In a
    share ``last_probability`` of the samples the last action alone is hidden, as it is in a request.
    """

    class Config(ComponentConfig):
        name: Literal["cloze"] = "cloze"
        mask_probability: Annotated[float, Field(gt=0, le=1)] = 0.2
        last_probability: Annotated[float, Field(ge=0, le=1)] = 0.0

        def idle(self) -> dict[str, str]:
            alone = self.last_probability == 1
            return (
                {"mask_probability": "last_probability is 1: only last actions are hidden"} if alone else {}
            )

    extra_inputs = 1  # the hidden action is itself an input
    ahead = 0
    masks = True
    needs_causal = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def supervise(self, batch: SequenceBatch, key: int, dropout_key: int = 0) -> Supervision:
        """The hidden actions are the queries; which ones depends on (key, sample ordinal, position) alone.

        Waits for the device once, for the number of hidden actions.
        """
        layout = _whole(batch, dropout_key)
        sequences_T, positions_T = layout.sequences_T, layout.positions_T
        ordinals_T = batch.ordinals_B[sequences_T]
        draws_T = uniform_floats(derive_key(key, "cloze"), ordinals_T, positions_T, 1)[:, 0]
        hidden_T = draws_T < self.config.mask_probability

        none_B = torch.zeros_like(batch.ordinals_B)
        hidden_B = none_B.index_add(0, sequences_T, hidden_T.long())
        coins_B = uniform_floats(derive_key(key, "cloze last"), batch.ordinals_B, none_B, 1)[:, 0]
        last_alone_B = (coins_B < self.config.last_probability) | (hidden_B == 0)
        last_T = positions_T == layout.offsets_B1.diff()[sequences_T] - 1
        hidden_T = torch.where(last_alone_B[sequences_T], last_T, hidden_T)

        queries_S = hidden_T.nonzero().squeeze(1)
        return Supervision(
            tokens_T=batch.items_T.masked_fill(hidden_T, MASK),
            layout=layout,
            queries_S=queries_S,
            targets_S=batch.items_T[queries_S],
            ordinals_S=ordinals_T[queries_S],
            positions_S=positions_T[queries_S],
        )

    def request(self, batch: SequenceBatch) -> Supervision:
        """The last action of each sequence is hidden and asked for."""
        layout = _whole(batch)
        counts_B = layout.offsets_B1.diff()
        last_T = layout.positions_T == counts_B[layout.sequences_T] - 1
        return _asked_at_the_end(batch, batch.items_T.masked_fill(last_T, MASK), layout)


Task = NextItem | Cloze


def sources(batch: SequenceBatch, layout: JaggedLayout) -> Tensor:
    """(T,) the place of each input row's action in the batch."""
    return batch.offsets_B1[layout.sequences_T] + layout.positions_T


def places_asked(batch: SequenceBatch) -> Tensor:
    """(B,) int64, the place of each sequence's last action, whose item a request to judge is about; UserError where
    there is none.  Waits for a device."""
    last_B = batch.offsets_B1[1:] - 1
    if min(batch.lengths, default=1) == 0 or (batch.items_T[last_B] == UNKNOWN).any():
        raise UserError("the model judges given items, and a request has none: give its item")
    return last_B


def _all_but_last(batch: SequenceBatch, dropout_key: int = 0) -> tuple[JaggedLayout, Tensor]:
    """The layout of the sequences without their last actions, and the place of each of its rows in the batch.

    The lengths are known to the host, so that nothing waits for a device.
    """
    lengths = tuple(max(n - 1, 0) for n in batch.lengths)
    offsets_B1 = F.pad((batch.offsets_B1.diff() - 1).clamp_min(0).cumsum(0), (1, 0))
    layout = JaggedLayout(offsets_B1, lengths, max(lengths, default=0))
    source_T = sources(batch, layout)
    times_A = batch.timestamps_T
    timed = replace(
        layout,
        query_times_T=None if times_A is None else times_A[source_T + 1],
        key_times_T=None if times_A is None else times_A[source_T],
        dropout_key=dropout_key,
    )
    return timed, source_T


def _whole(batch: SequenceBatch, dropout_key: int = 0) -> JaggedLayout:
    """The layout of the sequences with their last actions; each row predicts its own action."""
    return JaggedLayout(
        batch.offsets_B1,
        batch.lengths,
        batch.max_length,
        query_times_T=batch.timestamps_T,
        key_times_T=batch.timestamps_T,
        dropout_key=dropout_key,
    )


def _asked_at_the_end(batch: SequenceBatch, tokens_T: Tensor, layout: JaggedLayout) -> Supervision:
    """One query a sequence, at its last row, for its last action's item; an empty sequence has a query, and no row."""
    counts_B = layout.offsets_B1.diff()
    return Supervision(
        tokens_T=tokens_T,
        layout=layout,
        queries_S=torch.where(counts_B > 0, layout.offsets_B1[1:] - 1, layout.rows),
        targets_S=_last_items(batch),
        ordinals_S=batch.ordinals_B,
        positions_S=(counts_B - 1).clamp_min(0),
        some_without_input=min(layout.lengths, default=1) == 0,
    )


def _last_items(batch: SequenceBatch) -> Tensor:
    """(B,) the item of each sequence's last action, UNKNOWN for an empty sequence."""
    items = F.pad(batch.items_T, (0, 1), value=UNKNOWN)
    return items[torch.where(batch.offsets_B1.diff() > 0, batch.offsets_B1[1:] - 1, batch.actions)]
