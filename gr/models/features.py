"""Features: what is known of an action, a user or a request beside the item.  Each has a table of its own, whose
vectors are added to the items' (as Zhai et al., arXiv 2402.17152, add those of action types).

A batch is **prepared** before it goes to a device: columns become rows of tables, by themselves or by a vocabulary, and
a value that has no row is refused.  Of the action that is to be predicted no feature is looked at: neither of the next
action, nor of one whose item is hidden.  What is known when a prediction is asked for (the user, the time of the
request) is known everywhere.

Shapes: A actions of the batch, B sequences, T input rows, F of them with a known value, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.config import FeatureSection
from gr.embeddings.table import Table, TableSpec
from gr.embeddings.view import View
from gr.embeddings.vocabulary import OpenVocabulary
from gr.errors import UserError, nearest
from gr.labels import ColumnLike, Described
from gr.models.tasks import MASK, Known, Supervision, Task, sources
from gr.processes import Processes

HOUR, DAY, DAYS = 3600, 86400, 7
THURSDAY = 3  # the day of 1970-01-01, where Monday is 0


@dataclass(frozen=True)
class Feature:
    """name: the table's.  of: whose it is, "actions", "users" or "requests".  column: that a batch must carry, None
    where it needs none.  rows: of the table.  values: of a batch, int64, one an action (a request's: one for the
    action that it asks for) or one a user: rows, or ids of a vocabulary."""

    name: str
    of: str
    column: str | None
    rows: int
    values: Callable[[SequenceBatch], Tensor]

    @property
    def key(self) -> str:
        """The name of its rows among a prepared batch's columns; no column of a dataset has a colon in front."""
        return f":{self.name}"

    def check(self, values: Tensor) -> None:
        """Refuse a value without a row.  Waits for a device, if the values lie on one."""
        if not values.numel():
            return
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= self.rows:
            wrong = low if low < 0 else high
            mend = "map its values to 0, 1, 2, ..." if low < 0 else f"set it to {high + 1} or more"
            raise UserError(
                f"column '{self.column}' holds {wrong}, and its table has rows for 0 to {self.rows - 1} "
                f"(model.input.features.{self.name}.rows): {mend}"
            )


class Features:
    """The features of a model and their ``tables``, made as ``like`` says but for names and numbers of rows.
    ``needs``: the columns that a batch must carry.  ``vocabularies``: by name, of those that have one.  Raises
    UserError where one doesn't fit the dataset."""

    def __init__(
        self,
        sections: Mapping[str, FeatureSection],
        dataset: Callable[[], Described],
        task: Task,
        like: TableSpec,
        processes: Processes,
    ) -> None:
        self.task = task
        self.features = [_feature(name, section, dataset()) for name, section in sections.items()]
        self.needs = frozenset(f.column for f in self.features if f.column is not None)
        self.tables: list[Table] = [
            sections[f.name].table.build(replace(like, name=f.name, rows=f.rows, bias=False), processes)
            for f in self.features
        ]
        self.vocabularies: dict[str, OpenVocabulary] = {
            name: section.vocabulary.build(name, section.rows, processes)
            for name, section in sections.items()
            if section.vocabulary is not None
        }

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch with the rows of every feature as columns; as it is, if it has them.  Vocabularies of several
        processes are asked together."""
        return self._with_rows(batch, lambda vocabulary, ids: vocabulary.rows_of(ids))

    def learn(self, batch: SequenceBatch, step: int) -> tuple[SequenceBatch, dict[str, Tensor]]:
        """A process's share of a step's batch, prepared, after vocabularies have taken in its ids; and the rows of
        their tables that have another id from now on.  All processes call this together."""
        restarted: dict[str, Tensor] = {}

        def rows_of(vocabulary: OpenVocabulary, ids: Tensor) -> Tensor:
            learnt = vocabulary.learn(ids, step)
            restarted[vocabulary.name] = learnt.restarted_N
            return learnt.rows

        return self._with_rows(batch, rows_of), restarted

    def _with_rows(
        self, batch: SequenceBatch, by_vocabulary: Callable[[OpenVocabulary, Tensor], Tensor]
    ) -> SequenceBatch:
        if not self.features:
            return batch
        columns, user_columns = dict(batch.columns), dict(batch.user_columns)
        for feature in self.features:
            there = user_columns if feature.of == "users" else columns
            if feature.key in there:
                continue
            rows = feature.values(batch)
            if feature.name in self.vocabularies:
                rows = by_vocabulary(self.vocabularies[feature.name], rows)
            else:
                feature.check(rows)
            # as the other columns are, so that going to a device waits for nothing
            there[feature.key] = rows.pin_memory() if batch.offsets_B1.is_pinned() else rows
        return replace(batch, columns=columns, user_columns=user_columns)

    def of_inputs(self, batch: SequenceBatch, part: Supervision) -> Supervision:
        """``part`` with what is known at its inputs, of a batch that is prepared."""
        if not self.features:
            return part
        sources_T = sources(batch, part.layout)
        # a task that hides actions has waited for the device already, to count them
        shown_F = (part.tokens_T != MASK).nonzero().squeeze(1) if self.task.masks else None
        known = {}
        for feature in self.features:
            if feature.of == "users":
                rows_B = batch.user_columns[feature.key]
                known[feature.name] = Known(rows_B[part.layout.sequences_T])
            elif feature.of == "requests":
                known[feature.name] = Known(batch.columns[feature.key][sources_T + self.task.ahead])
            elif shown_F is None:
                known[feature.name] = Known(batch.columns[feature.key][sources_T])
            else:
                known[feature.name] = Known(batch.columns[feature.key][sources_T[shown_F]], shown_F)
        return replace(part, features=known)

    def wanted(self, parts: Sequence[Supervision]) -> dict[str, list[Tensor]]:
        """The rows of each table that the inputs of ``parts`` look at."""
        return {f.name: [part.features[f.name].rows_F for part in parts] for f in self.features}


def vectors(part: Supervision, views: Mapping[str, View]) -> Tensor | None:
    """(T, D) the sum of the features' vectors at each input, None without features."""
    total_TD = None
    for name, known in part.features.items():
        found_TD = views[name].lookup(known.rows_F)
        if known.places_F is not None:
            nothing_TD = found_TD.new_zeros(part.layout.rows, found_TD.shape[1])
            found_TD = nothing_TD.index_copy(0, known.places_F, found_TD)
        total_TD = found_TD if total_TD is None else total_TD + found_TD
    return total_TD


def _feature(name: str, section: FeatureSection, dataset: Described) -> Feature:
    columns: dict[str, ColumnLike] = {info.name: info for info in dataset.columns}
    key = f"model.input.features.{name}"
    if section.derived == "user":
        return Feature(name, "users", None, dataset.users, lambda batch: batch.ordinals_B)
    if section.derived is not None:
        if "time" not in columns:
            raise UserError(
                f"config key '{key}.derived' is '{section.derived}' and the dataset has no times: leave the feature "
                "out, or prepare the dataset with a time column"
            )
        unit, _, of = section.derived.partition("_of_")
        rows, values = (24, _hours) if unit == "hour" else (DAYS, _days)
        return Feature(name, "requests" if of == "request" else "actions", "time", rows, values)
    assert section.column is not None
    info = _column(key, section.column, columns, ids=section.vocabulary is not None)
    rows = _rows(key, section, dataset)
    if info.of == "users":
        return Feature(name, "users", info.name, rows, lambda batch: batch.user_columns[info.name])
    return Feature(name, "actions", info.name, rows, lambda batch: batch.columns[info.name])


def _column(key: str, name: str, columns: Mapping[str, ColumnLike], ids: bool) -> ColumnLike:
    """What is known of the column ``name``, if a table can have rows for its values.  ids: whether a vocabulary finds
    them, of integers and texts alike."""
    if name not in columns:
        raise UserError(
            f"config key '{key}.column' is '{name}', which is no column of the dataset: {nearest(name, columns)}"
        )
    if name == "item":
        raise UserError(
            f"config key '{key}.column' is 'item', which has a table already: leave the feature out"
        )
    info = columns[name]
    text = info.type == "string"
    if info.multi or (text and not ids) or info.type.startswith("float"):
        what = "lists" if info.multi else "text" if text else "numbers with decimals"
        mend = (
            f"give it a vocabulary ({key}.vocabulary=open)"
            if text
            else "choose a column of integers, one each"
        )
        raise UserError(f"config key '{key}.column' is '{name}', and that column holds {what}: {mend}")
    return info


def _rows(key: str, section: FeatureSection, dataset: Described) -> int:
    """How many values the column has: of types the dataset knows it, of others the config says it."""
    if section.vocabulary is not None:
        assert section.rows is not None
        return section.rows
    types = len(dataset.action_type_names) if section.column == "type" else 0
    if section.rows is None and not types:
        raise UserError(
            f"config key '{key}.rows' is missing, and the dataset doesn't say how many values column "
            f"'{section.column}' has: set it to the largest one plus 1, or give it a vocabulary too"
        )
    if section.rows is not None and section.rows < types:
        raise UserError(
            f"config key '{key}.rows' is {section.rows}, and the dataset has {types} action types: leave it out"
        )
    return section.rows or types


def _hours(batch: SequenceBatch) -> Tensor:
    """0 .. 23 of each action."""
    return torch.div(batch.columns["time"], HOUR, rounding_mode="floor").remainder(24)


def _days(batch: SequenceBatch) -> Tensor:
    """0 .. 6, Monday to Sunday, of each action."""
    return (torch.div(batch.columns["time"], DAY, rounding_mode="floor") + THURSDAY).remainder(DAYS)
