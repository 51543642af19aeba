"""SequenceBatch: the only thing that crosses from data to model.

Shapes: B sequences, T actions in the batch (sum of lengths).

A sequence is given whole, *including the action to be predicted*: a sample of n + 1 actions has n inputs
(all but its last action) and n targets (all but its first).  In training every target is supervised; in
evaluation only the last one is, and its item may be ``UNKNOWN`` when recommendations are asked for (its
timestamp, the time of the request, is known and used).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gr.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UNKNOWN = -1
"""Item row of a target that is not known (a request for recommendations)."""

TARGETS_FROM = ":targets_from"
"""The column of users that says, where there is one, which of a sample's actions are its first target: those before it
are inputs alone.  Without it every action but the first is a target.  (No column of a dataset has a colon in front.)"""


@dataclass(frozen=True)
class Jagged:
    """n lists of any length: list i is ``values[offsets[i] : offsets[i + 1]]``.  A multi-valued column.

    offsets (n + 1,) int64 and values, both arrays of numpy or both of torch.  host_offsets: the same offsets where
    Python can read them while ``offsets`` lie on a device, so that cutting never waits for it; else None.
    """

    offsets: Any
    values: Any
    host_offsets: Any = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, lists: slice) -> Jagged:
        """Consecutive lists."""
        start, stop, step = lists.indices(len(self))
        if step != 1:
            raise IndexError(f"lists are taken one after another, not in steps of {step}")
        stop = max(start, stop)
        known = self.offsets if self.host_offsets is None else self.host_offsets
        first, last = int(known[start]), int(known[stop])
        return Jagged(
            self.offsets[start : stop + 1] - first,
            self.values[first:last],
            None if self.host_offsets is None else self.host_offsets[start : stop + 1] - first,
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Jagged:
        """Tensors on ``device``; offsets stay readable on the host."""
        known = self.offsets if self.host_offsets is None else self.host_offsets
        offsets, values = (t.to(device, non_blocking=non_blocking) for t in (self.offsets, self.values))
        return Jagged(offsets, values, None if offsets.device.type == "cpu" else known)

    def pin_memory(self) -> Jagged:
        return replace(self, offsets=self.offsets.pin_memory(), values=self.values.pin_memory())


Column = Any
"""A tensor of one value an action (or a user), or a :class:`Jagged` of as many lists."""
Change = Callable[[Column], Column]


def values_of(column: Column) -> Any:
    """All values of a column, one after another, whether there is one each or a list."""
    return column.values if isinstance(column, Jagged) else column


def with_values(column: Column, values: Any) -> Column:
    """The column with others in its values' places; lists stay as long as they are."""
    return replace(column, values=values) if isinstance(column, Jagged) else values


@dataclass(frozen=True)
class SequenceBatch:
    """B jagged sequences.

    offsets_B1: int64, row offsets of the sequences; ``offsets_B1[0] == 0``, ``offsets_B1[-1] == T``.
    ordinals_B: int64, each sample's number in the dataset's canonical order: the identity that random draws hang on.
    lengths: the lengths as Python integers, so that no kernel launch has to ask a device for them.
    columns: of actions, by name, T each: ``item``, int64 catalogue rows (``UNKNOWN`` only at a sequence's last
    action), and of those that were asked for ``time`` (int64 seconds), ``type`` (int64 codes), ``value`` (float32)
    and the declared fields.  user_columns: of users, by name, B each.
    """

    offsets_B1: Tensor
    ordinals_B: Tensor
    lengths: tuple[int, ...]
    columns: Mapping[str, Column]
    user_columns: Mapping[str, Column] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def actions(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def items_T(self) -> Tensor:
        return self.columns["item"]

    @property
    def timestamps_T(self) -> Tensor | None:
        """None where the batch carries no times."""
        return self.columns.get("time")

    @property
    def action_types_T(self) -> Tensor | None:
        """None where the batch carries no types."""
        return self.columns.get("type")

    def with_columns(self, **columns: Column) -> SequenceBatch:
        """The batch with these columns of actions in the place of, or beside, its own."""
        return replace(self, columns={**self.columns, **columns})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> SequenceBatch:
        def move(column: Column) -> Column:
            return column.to(device, non_blocking=non_blocking)

        return self._each(move, move, move(self.offsets_B1), self.lengths)

    def pin_memory(self) -> SequenceBatch:
        def pin(column: Column) -> Column:
            return column.pin_memory()

        return self._each(pin, pin, pin(self.offsets_B1), self.lengths)

    def split(self, max_actions: int) -> list[SequenceBatch]:
        """Consecutive parts of at most ``max_actions`` actions each (one sequence at least): micro-batches."""
        parts, start, actions = [], 0, 0
        for i, length in enumerate(self.lengths):
            if i > start and actions + length > max_actions:
                parts.append(self.slice(start, i))
                start, actions = i, 0
            actions += length
        return [*parts, self.slice(start, self.sequences)]

    def slice(self, start: int, stop: int) -> SequenceBatch:
        """Sequences ``start`` to ``stop`` (exclusive)."""
        if start == 0 and stop == self.sequences:
            return self
        first, last = sum(self.lengths[:start]), sum(self.lengths[:stop])
        return self._each(
            lambda column: column[first:last],
            lambda column: column[start:stop],
            self.offsets_B1[start : stop + 1] - first,
            self.lengths[start:stop],
        )

    def to_kjt(self, names: Iterable[str] | None = None) -> Any:
        """Columns of actions as a torchrec KeyedJaggedTensor: keys are the names, B lists a key, one a sequence.

        names: those without decimals if not given.  In a multi-valued column a sequence's list holds the values of
        all its actions; where one action ends stays in ``columns[name].offsets``.
        """
        try:
            from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        except ImportError as error:
            raise UserError(
                f"a KeyedJaggedTensor needs torchrec, and it cannot be imported ({error}): make setup-sharded "
                "installs it"
            ) from None
        import torch

        def decimals(column: Column) -> bool:
            return values_of(column).is_floating_point()

        chosen = list(self.columns) if names is None else list(names)
        if unknown := [name for name in chosen if name not in self.columns]:
            raise UserError(f"the batch has no column '{unknown[0]}': {nearest(unknown[0], self.columns)}")
        if names is None:
            chosen = [name for name in chosen if not decimals(self.columns[name])]
        elif wrong := [name for name in chosen if decimals(self.columns[name])]:
            raise UserError(
                f"column '{wrong[0]}' holds numbers with decimals: a KeyedJaggedTensor holds ids only"
            )
        values, lengths = [], []
        for name in chosen:
            column = self.columns[name]
            jagged = isinstance(column, Jagged)
            values.append(values_of(column).long())
            lengths.append((column.offsets[self.offsets_B1] if jagged else self.offsets_B1).diff())
        nothing = self.offsets_B1.new_empty(0)
        return KeyedJaggedTensor.from_lengths_sync(
            keys=chosen, values=torch.cat([nothing, *values]), lengths=torch.cat([nothing, *lengths])
        )

    def _each(
        self, of_actions: Change, of_users: Change, offsets_B1: Tensor, lengths: tuple[int, ...]
    ) -> SequenceBatch:
        """The batch with every column changed: the one place that goes through all of them."""
        return SequenceBatch(
            offsets_B1,
            of_users(self.ordinals_B),
            lengths,
            {name: of_actions(column) for name, column in self.columns.items()},
            {name: of_users(column) for name, column in self.user_columns.items()},
        )
