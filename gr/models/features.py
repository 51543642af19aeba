"""Features: what is known of an action, a user or a request beside the item.  Each has a table of its own, whose
vectors are added to the items' (as Zhai et al., arXiv 2402.17152, add those of action types).

A batch is **prepared** before it goes to a device: columns become rows of tables, by themselves or by a vocabulary, and
a value that has no row is refused, or has one in common with others.  Numbers have a table of two rows: a vector that
is taken so many times, and that of what is unknown.  Where an action, a user or an item has a list of values, their
vectors are pooled.  Of the action that is to be predicted no feature is looked at: neither of the next action, nor of
one whose item is hidden.  What is known when a prediction is asked for (the user, the time of the request) is known
everywhere.

Shapes: A actions of the batch, B sequences, T input rows, F of them with a known value, I items, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gr.batch import Jagged, SequenceBatch, values_of, with_values
from gr.config import FeatureSection
from gr.embeddings.table import Table, TableSpec
from gr.embeddings.view import View
from gr.embeddings.vocabulary import OpenVocabulary
from gr.errors import UserError, nearest
from gr.labels import ColumnLike, Described
from gr.models.layout import JaggedLayout
from gr.models.model import Catalogue
from gr.models.tasks import MASK, Known, Supervision, Task, sources, taken
from gr.processes import Processes
from gr_kernels.tracing import with_numbers

HOUR, DAY, DAYS = 3600, 86400, 7
NUMBER_ROWS = 2
THURSDAY = 3  # the day of 1970-01-01, where Monday is 0


@dataclass(frozen=True)
class Feature:
    """name: the table's.  of: whose it is, "actions", "users" or "requests".  of_item: whether it is known of an
    action's item, whatever becomes of the action.  column: that a batch must carry, None where it needs none.  rows: of
    the table.  values: of a batch, int64, one (or a list) an action (a request's: one for the action that it asks for)
    or a user: rows, or ids of a vocabulary; float32 where they are numbers.  multi: whether they are lists; pooling: of
    these.  number: what is made of those.  shares_row: whether values without a row have the table's last."""

    name: str
    of: str
    column: str | None
    rows: int
    values: Callable[[SequenceBatch], Tensor | Jagged]
    pooling: str = "mean"
    of_item: bool = False
    number: str | None = None
    shares_row: bool = False
    multi: bool = False

    @property
    def key(self) -> str:
        """The name of its rows among a prepared batch's columns; no column of a dataset has a colon in front."""
        return f":{self.name}"

    def known(
        self, batch: SequenceBatch, layout: JaggedLayout, places_T: Tensor, shown_F: Tensor | None
    ) -> Known:
        """What is known at the input rows ``shown_F`` (all of them if None) of a prepared batch, whose actions (or, of
        users, whose sequences) they are by ``places_T``."""
        column = (batch.user_columns if self.of == "users" else batch.columns)[self.key]
        if shown_F is not None:
            return self.told(taken(column, places_T[shown_F]), shown_F)
        values = None
        if isinstance(column, Jagged) and column.host_offsets is not None:
            values = self._values_of_inputs(column.host_offsets, batch, layout)
        return self.told(taken(column, places_T, values))

    def told(self, values_F: Tensor | Jagged, places_F: Tensor | None = None) -> Known:
        """What is known by values of a prepared batch's column."""
        if self.number is None:
            return Known(values_F, places_F, self.pooling)
        assert isinstance(values_F, Tensor)
        unknown_F = values_F.isnan()
        return Known(unknown_F.long(), places_F, self.pooling, values_F.masked_fill(unknown_F, 1))

    def placed(self, values_V: Tensor, under: str) -> tuple[Tensor, int]:
        """A batch's values as a prepared batch has them, and how many of them nobody knows.  Waits for a device, if
        they lie on one.  Raises UserError where that is refused; ``under``: the config's key of the features."""
        if self.number is not None:
            if values_V.isinf().any():
                first = values_V[values_V.isinf()][0].item()
                raise UserError(
                    f"column '{self.column or self.name}' holds {first} ({under}.{self.name}), which no model can "
                    "read: prepare the dataset with another number, or NaN where nobody knows"
                )
            return values_V, int(values_V.isnan().sum())
        if not self.shares_row:
            if self.column is not None:  # of others it is known that there is a row
                check_rows(self.name, f"column '{self.column}'", values_V, self.rows, under)
            return values_V, 0
        outside_V = (values_V < 0) | (values_V >= self.rows - 1)
        return values_V.masked_fill(outside_V, self.rows - 1), int(outside_V.sum())

    def _values_of_inputs(self, offsets: Tensor, batch: SequenceBatch, layout: JaggedLayout) -> int:
        """How many values the lists at all input rows hold: found on the host, so that no device is waited for."""
        inputs_B = torch.tensor(layout.lengths, dtype=torch.int64)
        if self.of == "users":
            return int((offsets.diff() * inputs_B).sum())
        lengths_B = torch.tensor(batch.lengths, dtype=torch.int64)
        starts_B = lengths_B.cumsum(0) - lengths_B  # an input row has its sequence's action of the same place
        return int((offsets[starts_B + inputs_B] - offsets[starts_B]).sum())


UNDER = "model.input.features"
"""The config's key of a model's features."""


def check_rows(name: str, column: str, values: Tensor, rows: int, under: str = UNDER) -> None:
    """Refuse values without a row of the feature ``name``'s table; ``under``: the config's key of the features.
    Waits for a device, if the values lie on one."""
    if not values.numel():
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or high >= rows:
        wrong = low if low < 0 else high
        mend = "map its values to 0, 1, 2, ..." if low < 0 else f"set it to {high + 1} or more"
        raise UserError(
            f"{column} holds {wrong}, and its table has rows for 0 to {rows - 1} "
            f"({under}.{name}.rows): {mend}, or say unseen: own_row"
        )


class Features:
    """The features of a model and their ``tables``, made as ``like`` says but for names and numbers of rows.
    ``needs``: the columns that a batch must carry.  ``vocabularies``: by name, of those that have one.  ``unseen``: of
    others whose values may have no row, or be unknown, how many such there were in the batch that was prepared last,
    and how many in all.  Raises UserError where one doesn't fit the dataset."""

    def __init__(
        self,
        sections: Mapping[str, FeatureSection],
        data: Catalogue,
        task: Task,
        like: TableSpec,
        processes: Processes,
    ) -> None:
        self.task = task
        self.features = [feature(name, section, data) for name, section in sections.items()]
        self.needs = frozenset(f.column for f in self.features if f.column is not None)
        self.tables: list[Table] = [
            sections[f.name].table.build(replace(like, name=f.name, rows=f.rows, bias=False), processes)
            for f in self.features
        ]
        self.unseen = {f.name: (0, 0) for f in self.features if f.shares_row or f.number is not None}
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
            found = feature.values(batch)
            rows = values_of(found)
            if feature.name in self.vocabularies:
                rows = by_vocabulary(self.vocabularies[feature.name], rows)
            else:
                rows, unseen = feature.placed(rows, UNDER)
                if feature.name in self.unseen:
                    self.unseen[feature.name] = (unseen, rows.numel())
            rows = with_values(found, rows)
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
        where = {
            "users": (part.layout.sequences_T, None),
            "requests": (sources_T + self.task.ahead, None),
            "actions": (sources_T, shown_F),
        }
        known = {f.name: f.known(batch, part.layout, *where[f.of]) for f in self.features}
        return replace(part, features=known)

    def by_kind(self, known: Mapping[str, Known]) -> dict[str, dict[str, Known]]:
        """What is known by what it belongs to: ``items``, the moment at which one is ``shown`` (and the user), or what
        was ``done``, which nobody knows before."""
        found: dict[str, dict[str, Known]] = {"items": {}, "shown": {}, "done": {}}
        for f in self.features:
            if f.name in known:
                kind = "shown" if f.of in ("requests", "users") else "items" if f.of_item else "done"
                found[kind][f.name] = known[f.name]
        return found

    @property
    def of_requests(self) -> list[str]:
        """Names of those of users and of moments."""
        return [f.name for f in self.features if f.of in ("requests", "users")]

    @property
    def columns_of_requests(self) -> list[str]:
        """Columns of actions that are known of a request, beside its time."""
        found = [f.column for f in self.features if f.of == "requests" and f.column != "time"]
        return [column for column in found if column is not None]

    @property
    def of_items(self) -> list[str]:
        """Names of those of items."""
        return [f.name for f in self.features if f.of_item]

    def known_of_items_at(self, batch: SequenceBatch, places_N: Tensor) -> dict[str, Known]:
        """What is known of the items of these actions of a prepared batch, by feature."""
        return {f.name: f.told(taken(batch.columns[f.key], places_N)) for f in self.features if f.of_item}

    def known_of_items(self, items_N: Tensor) -> dict[str, Known]:
        """What is known of items (int64 rows), by feature."""
        offsets = torch.tensor([0, len(items_N)], device=items_N.device)
        batch = SequenceBatch(offsets, offsets[:1], (len(items_N),), {"item": items_N})
        found = {}
        for f in (f for f in self.features if f.of_item):
            column = f.values(batch)
            if f.name in self.vocabularies:
                rows = self.vocabularies[f.name].rows_of(values_of(column))
            else:
                rows, _ = f.placed(values_of(column), UNDER)
            found[f.name] = f.told(with_values(column, rows))
        return found

    def known_at(self, batch: SequenceBatch, name: str, users_A: Tensor | None) -> Known:
        """What a feature knows of every action of a prepared batch, or of every user where it is the users' and
        ``users_A``, the user of each action, is not given."""
        (f,) = (f for f in self.features if f.name == name)
        if f.of != "users":
            return f.told(batch.columns[f.key])
        column = batch.user_columns[f.key]
        return f.told(column if users_A is None else taken(column, users_A))

    def wanted(self, parts: Sequence[Supervision]) -> dict[str, list[Tensor]]:
        """The rows of each table that the inputs of ``parts`` look at."""
        return {f.name: [part.features[f.name].rows_V for part in parts] for f in self.features}


def vectors(part: Supervision, views: Mapping[str, View]) -> Tensor | None:
    """(T, D) the sum of the features' vectors at each input, None without features."""
    return sum_of(part.features, views, part.layout.rows)


def sum_of(features: Mapping[str, Known], views: Mapping[str, View], rows: int) -> Tensor | None:
    """(rows, D) the sum of the vectors of ``features``, None where there are none."""
    total_TD = None
    for name, known in features.items():
        found_TD = vectors_of(known, views[name])
        if known.places_F is not None:
            nothing_TD = found_TD.new_zeros(rows, found_TD.shape[1])
            found_TD = nothing_TD.index_copy(0, known.places_F, found_TD)
        total_TD = found_TD if total_TD is None else total_TD + found_TD
    return total_TD


def vectors_of(known: Known, view: View) -> Tensor:
    """(F, D), of lists pooled."""
    if isinstance(known.rows_F, Jagged):
        return view.pooled(known.rows_V, known.rows_F.offsets, known.pooling)
    found_FD = view.lookup(known.rows_F)
    return found_FD if known.numbers_F is None else found_FD * known.numbers_F[:, None].to(found_FD.dtype)


def feature(name: str, section: FeatureSection, data: Catalogue, under: str = UNDER) -> Feature:
    """The feature that ``section`` describes, which stands in the config as ``under.name``."""
    dataset = data.manifest
    columns: dict[str, ColumnLike] = {info.name: info for info in dataset.columns}
    key = f"{under}.{name}"
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
    if section.catalogue is not None:
        with with_numbers():
            return _of_items(name, section, data, under)
    assert section.column is not None
    if section.column not in columns:
        raise UserError(
            f"config key '{key}.column' is '{section.column}', which is no column of the dataset: "
            f"{nearest(section.column, columns)}"
        )
    if section.column == "item":
        raise UserError(
            f"config key '{key}.column' is 'item', which has a table already: leave the feature out"
        )
    info = columns[section.column]
    if info.of == "users" and section.of_request:
        raise UserError(
            f"config key '{key}.of_request' is for columns of actions, and '{info.name}' is of users"
        )
    of = info.of if info.of == "users" else "requests" if section.of_request else "actions"

    def of_column(batch: SequenceBatch) -> Tensor | Jagged:
        return (batch.user_columns if of == "users" else batch.columns)[info.name]

    if section.number is not None:
        _check_numbers(f"{key}.column", info)
        return Feature(
            name,
            of,
            info.name,
            NUMBER_ROWS,
            lambda batch: _number(of_column(batch), section),
            number=section.number,
        )
    pooling, rows = _pooling(key, f"{key}.column", section, info), _rows(key, section, dataset)
    shares_row = section.unseen == "own_row"
    return Feature(name, of, info.name, rows, of_column, pooling, shares_row=shares_row, multi=info.multi)


def _of_items(name: str, section: FeatureSection, data: Catalogue, under: str) -> Feature:
    """What the catalogue says of an action's item."""
    key, column, shares_row = f"{under}.{name}", section.catalogue, section.unseen == "own_row"
    assert column is not None
    if column not in data.column_names:
        raise UserError(
            f"config key '{key}.catalogue' is '{column}', which is no column of the dataset's catalogue: "
            f"{nearest(column, data.column_names)}"
        )
    codes_I: Tensor | Jagged
    if section.number is not None:
        pooling, rows, codes_I = "mean", NUMBER_ROWS, _number(data.numbers(column), section)
    else:
        pooling = _pooling(key, f"{key}.catalogue", section, data.info(column))
        codes_I = data.codes(column)
        codes = values_of(codes_I)
        rows = section.rows or max(int(codes.max()) + 1 if len(codes) else 0, 1)
        if section.vocabulary is None and not shares_row:
            check_rows(name, f"column '{column}' of the catalogue", codes, rows, under)
        rows += shares_row
    on_device = {values_of(codes_I).device: codes_I}

    def of_batch(batch: SequenceBatch) -> Tensor | Jagged:
        items_A = batch.items_T.clamp_min(0)  # of one that is asked for nothing is looked at
        if items_A.device not in on_device:  # evaluation asks there
            on_device[items_A.device] = codes_I.to(items_A.device)
        return taken(on_device[items_A.device], items_A)

    return Feature(
        name,
        "actions",
        None,
        rows,
        of_batch,
        pooling,
        of_item=True,
        number=section.number,
        shares_row=shares_row,
        multi=isinstance(codes_I, Jagged),
    )


def _check_numbers(key: str, info: ColumnLike) -> None:
    if info.multi or info.type == "string":
        what = "text" if info.type == "string" else "lists, or nothing for some"
        raise UserError(
            f"config key '{key}' is '{info.name}', and that column holds {what}: choose one of numbers, one each (NaN "
            "where nobody knows)"
        )


def _number(values: Any, section: FeatureSection) -> Tensor:
    """float32, as the feature says."""
    numbers: Tensor = values.float()
    return numbers if section.number == "plain" else numbers.sign() * numbers.abs().log1p()


def _pooling(key: str, named_by: str, section: FeatureSection, info: ColumnLike) -> str:
    """How the values of a column are pooled; refuses values of which a table can't have rows, or that need a
    vocabulary."""
    if not info.type.startswith("int") and info.type != "string":
        what = "numbers with decimals" if info.type.startswith("float") else f"values of type {info.type}"
        mend = "choose a column of integers"
    elif info.type == "string" and section.vocabulary is None:
        what, mend = "text", "choose a column of integers"
        if key.startswith(UNDER):  # there are other places, which have no vocabularies
            mend = f"give it a vocabulary ({key}.vocabulary=open)"
    elif section.pooling is not None and not info.multi:
        raise UserError(
            f"config key '{key}.pooling' is {section.pooling}, and column '{info.name}' holds one value each, which "
            "there is nothing to pool with: leave it out"
        )
    else:
        return section.pooling or "mean"
    raise UserError(f"config key '{named_by}' is '{info.name}', and that column holds {what}: {mend}")


def _rows(key: str, section: FeatureSection, dataset: Described) -> int:
    """How many values the column has: of types the dataset knows it, of others the config says it."""
    if section.vocabulary is not None:
        assert section.rows is not None
        return section.rows
    types = len(dataset.action_type_names) if section.column == "type" else 0
    if section.rows is None and not types:
        too = ", or give it a vocabulary too" if key.startswith(UNDER) else ""
        raise UserError(
            f"config key '{key}.rows' is missing, and the dataset doesn't say how many values column "
            f"'{section.column}' has: set it to the largest one plus 1{too}"
        )
    if section.rows is not None and section.rows < types:
        raise UserError(
            f"config key '{key}.rows' is {section.rows}, and the dataset has {types} action types: leave it out"
        )
    return (section.rows or types) + (section.unseen == "own_row")


def _hours(batch: SequenceBatch) -> Tensor:
    """0 .. 23 of each action."""
    return torch.div(batch.columns["time"], HOUR, rounding_mode="floor").remainder(24)


def _days(batch: SequenceBatch) -> Tensor:
    """0 .. 6, Monday to Sunday, of each action."""
    return (torch.div(batch.columns["time"], DAY, rounding_mode="floor") + THURSDAY).remainder(DAYS)
