"""Fields of a user and of an item: categories, each with a table of its own, and numbers.

A batch is prepared before it goes to a device: values become rows of tables, and what has none is refused.

Shapes: S impressions, F fields of a side, D width of the tables, C numbers of a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from gr.batch import Jagged, SequenceBatch
from gr.config import DISTINCT, FEATURE, FeatureSection, Section
from gr.embeddings.table import Table, TableSpec
from gr.embeddings.view import View
from gr.errors import UserError, nearest
from gr.labels import ColumnLike
from gr.models.features import Feature, feature
from gr.models.model import Catalogue
from gr.models.tasks import taken
from gr.processes import Processes


def _closed(fields: dict[str, FeatureSection]) -> dict[str, FeatureSection]:
    for name, section in fields.items():
        if section.vocabulary is not None:
            raise ValueError(f"'{name}' has a vocabulary, which fields can't have: give it a column of rows")
        if section.number is not None:
            raise ValueError(f"'{name}' has numbers, which fields can't have: name their column in numbers")
        if section.of_request:
            raise ValueError(
                f"'{name}' says of_request, and a field is always what the request knows: leave it out"
            )
        if section.derived == "user":
            raise ValueError(
                f"'{name}' is a user's row of the dataset, which a request doesn't know: give it a column of rows"
            )
    return fields


class SideSection(Section):
    """What is known of one side.  fields: categories, by the names of their tables, each as a feature of a sequence
    model is described (``column: item`` is the item itself).  numbers: columns that are taken as they are."""

    fields: Annotated[dict[str, FEATURE], AfterValidator(_closed), Field(min_length=1)]
    numbers: Annotated[list[str], DISTINCT] = []


@dataclass(frozen=True)
class Known:
    """What is known of one side at S impressions.  rows: by field, int64 rows of its table, or S lists of them.
    numbers_SC: float32."""

    rows: Mapping[str, Tensor | Jagged]
    numbers_SC: Tensor

    def wanted(self) -> dict[str, list[Tensor]]:
        """The rows of each table that are looked at."""
        return {n: [r.values if isinstance(r, Jagged) else r] for n, r in self.rows.items()}


@dataclass(frozen=True)
class Looked:
    """One side of S impressions, looked up.

    vectors_SFD: of its fields.  numbers_SC: as they are.  firsts_SF: a number a field, of the tables' bias column;
    None where the tables have none.
    """

    vectors_SFD: Tensor
    numbers_SC: Tensor
    firsts_SF: Tensor | None

    @property
    def flat(self) -> Tensor:
        """(S, F D + C): what a tower reads."""
        return torch.cat([self.vectors_SFD.flatten(1), self.numbers_SC], dim=1)


class Side:
    """The fields and numbers of one side ("user" or "item"), and the fields' ``tables``.  ``needs``: the columns that a
    batch must carry; ``reads``: by which config key each.  ``unseen``: of fields whose values may have no row, how many
    had none in the batch that was prepared last, and how many there were.  Raises UserError where one doesn't fit the
    dataset."""

    def __init__(
        self, name: str, section: SideSection, data: Catalogue, like: TableSpec, processes: Processes
    ) -> None:
        self.name, self.under = name, f"model.{name}.fields"
        self.fields = [_field(field, given, data, self.under) for field, given in section.fields.items()]
        columns: dict[str, ColumnLike] = {info.name: info for info in data.manifest.columns}
        for number in section.numbers:
            _check_number(f"model.{name}.numbers", number, columns)
        self.of_users = frozenset(n for n in section.numbers if columns[n].of == "users")
        self.numbers = list(section.numbers)
        self.unseen = {f.name: (0, 0) for f in self.fields if f.shares_row}
        self.reads = {f.column: f"{self.under}.{f.name}" for f in self.fields if f.column is not None}
        self.reads |= dict.fromkeys(self.numbers, f"model.{name}.numbers")
        self.needs = frozenset(self.reads)
        self.tables: list[Table] = [
            section.fields[f.name].table.build(replace(like, name=f.name, rows=f.rows), processes)
            for f in self.fields
        ]
        self.width = len(self.fields) * like.dim + len(self.numbers)

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch with the rows of every field as columns; as it is, if it has them."""
        columns, user_columns = dict(batch.columns), dict(batch.user_columns)
        if all(f.key in (user_columns if f.of == "users" else columns) for f in self.fields):
            return batch
        for field in self.fields:
            found = field.values(batch)
            rows = found.values if isinstance(found, Jagged) else found
            rows, unseen = field.placed(rows, self.under)
            if field.shares_row:
                self.unseen[field.name] = (unseen, rows.numel())
            found = replace(found, values=rows) if isinstance(found, Jagged) else rows
            # as the other columns are, so that going to a device waits for nothing
            pinned = batch.offsets_B1.is_pinned()
            (user_columns if field.of == "users" else columns)[field.key] = (
                found.pin_memory() if pinned else found
            )
        for number in self.numbers:
            values = (user_columns if number in self.of_users else columns)[number]
            if not values.isfinite().all():
                place = int((~values.isfinite()).nonzero()[0])
                raise UserError(
                    f"column '{number}' holds {values[place].item()} (model.{self.name}.numbers), which no network can "
                    "read: prepare the dataset with numbers in their place"
                )
        return replace(batch, columns=columns, user_columns=user_columns)

    def known(self, batch: SequenceBatch, places_S: Tensor, sequences_S: Tensor) -> Known:
        """What is known of the actions ``places_S`` of a prepared batch, which are of the sequences ``sequences_S``."""

        def at(name: str, of_users: bool) -> Any:
            column = (batch.user_columns if of_users else batch.columns)[name]
            return taken(column, sequences_S if of_users else places_S)

        rows = {f.name: at(f.key, f.of == "users") for f in self.fields}
        numbers = [at(name, name in self.of_users).float() for name in self.numbers]
        nothing = torch.empty(len(places_S), 0, device=places_S.device)
        return Known(rows, torch.stack(numbers, dim=1) if numbers else nothing)

    def look_up(self, known: Known, views: Mapping[str, View]) -> Looked:
        """The fields' vectors (and, of tables with a bias column, their numbers) at the impressions."""
        vectors = [self._vectors(f, known.rows[f.name], views[f.name]) for f in self.fields]
        firsts = []
        for field in self.fields:
            view = views[field.name]
            if view.bias_U is not None:
                ones = View(view.bias_U[:, None], None, view.numbering)
                firsts.append(self._vectors(field, known.rows[field.name], ones))
        vectors_SFD = torch.stack(vectors, dim=1)
        numbers_SC = known.numbers_SC.to(vectors_SFD.dtype)
        return Looked(vectors_SFD, numbers_SC, torch.cat(firsts, dim=1) if firsts else None)

    def squares(self, known: Known, views: Mapping[str, View]) -> Tensor:
        """The sum of squares of all that the impressions look up, a row as often as it is looked up."""
        total: Tensor | None = None
        for field in self.fields:
            view, rows = views[field.name], known.rows[field.name]
            looked = rows.values if isinstance(rows, Jagged) else rows
            of_rows = view.weight_UD.square().sum(1)
            if view.bias_U is not None:
                of_rows = of_rows + view.bias_U.square()
            # rows are few beside impressions, or the other way round: each is squared once
            found = F.embedding(view.place(looked), of_rows[:, None]).sum()
            total = found if total is None else total + found
        assert total is not None
        return total

    @staticmethod
    def _vectors(field: Feature, rows: Tensor | Jagged, view: View) -> Tensor:
        if isinstance(rows, Jagged):
            return view.pooled(rows.values, rows.offsets, field.pooling)
        return view.lookup(rows)


def _field(name: str, section: FeatureSection, data: Catalogue, under: str) -> Feature:
    if section.column == "item":
        return Feature(name, "actions", None, data.rows, lambda batch: batch.items_T)
    return feature(name, section, data, under)


def _check_number(key: str, name: str, columns: Mapping[str, ColumnLike]) -> None:
    if name not in columns:
        raise UserError(
            f"config key '{key}' has '{name}', which is no column of the dataset: {nearest(name, columns)}"
        )
    info = columns[name]
    if info.multi or info.type == "string":
        what = "lists" if info.multi else "text"
        raise UserError(
            f"config key '{key}' has '{name}', and that column holds {what}: choose one of numbers"
        )


def fields_of(sides: Sequence[SideSection]) -> dict[str, FeatureSection]:
    """All fields of the sides, by the names of their tables; UserError where two have one name."""
    found: dict[str, FeatureSection] = {}
    for side in sides:
        for name, section in side.fields.items():
            if name in found:
                raise UserError(
                    f"model.user and model.item both have a field '{name}': give each its own name"
                )
            found[name] = section
    return found
