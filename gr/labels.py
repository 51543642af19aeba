"""Labels: what is true of an action or not, by a threshold or a set of one of its columns.

Shapes: A actions, K tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from gr.config import DISTINCT, Section
from gr.errors import UserError, nearest

TYPE = "type"
"""The column whose numbers are codes of names."""


GIVEN = ("item", "time")
"""Columns that every prediction is given."""
REQUESTED = ("user_id", "item_ids", "time")
"""Columns that files of scores have beside those of tasks."""


def _plain(tasks: dict[str, Any]) -> dict[str, Any]:
    if odd := [name for name in tasks if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise ValueError(f"{odd[0]!r} becomes a part of metrics' names: use letters, digits, _ and - alone")
    if taken := [name for name in tasks if name in REQUESTED]:
        raise ValueError(
            f"{taken[0]!r} is another column of the files that scores are written to: choose another name"
        )
    return tasks


class LabelTask(Section):
    """An action has the label if its ``column`` is ``at_least`` so much, or ``any_of`` these; one of the two is
    given.  Action types are called by the log's names.  weight: of its loss among the tasks'."""

    column: str
    at_least: Annotated[float, Field(ge=-(2**53), le=2**53)] | None = None
    any_of: Annotated[list[int | float | str], DISTINCT, Field(min_length=1)] | None = None
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0

    @model_validator(mode="after")
    def _one_rule(self) -> LabelTask:
        if (self.at_least is None) == (self.any_of is None):
            raise ValueError("give it either at_least, a number, or any_of, a list")
        return self


TASKS = Annotated[dict[str, LabelTask], Field(min_length=1), AfterValidator(_plain)]
"""The type of a config's key that names tasks."""


def idle_weights(tasks: Mapping[str, LabelTask]) -> dict[str, str]:
    """Of a section with ``tasks``, the keys that change nothing (Section.idle): a loss is their weighted mean."""
    if len({task.weight for task in tasks.values()}) > 1:
        return {}
    why = "it is the only task" if len(tasks) == 1 else "all tasks weigh the same"
    return {f"tasks.{name}.weight": why for name in tasks}


class ColumnLike(Protocol):
    """What is known of a column: ``gr.data.columns.ColumnInfo``."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...

    @property
    def of(self) -> str: ...

    @property
    def multi(self) -> bool: ...


class Described(Protocol):
    """What a dataset says of its columns: ``gr.data.manifest.Manifest``."""

    @property
    def columns(self) -> Sequence[Any]:
        """Each a :class:`ColumnLike`."""
        ...

    @property
    def action_type_names(self) -> list[str]: ...

    @property
    def users(self) -> int: ...


@dataclass(frozen=True)
class Rule:
    """A task with its names resolved: ``column`` >= ``at_least``, or one of ``any_of``."""

    column: str
    at_least: float | None
    any_of: tuple[float, ...] = ()

    def of(self, column_A: Tensor) -> Tensor:
        """(A,) float32: 1 or 0, NaN where the column is NaN: nobody knows."""
        if self.at_least is not None:
            # of float32 torch compares float32 with the threshold as float32: 4.1 is at least 4.1
            label_A = column_A >= self.at_least
        else:
            label_A = torch.zeros_like(column_A, dtype=torch.bool)
            for value in self.any_of:  # no tensor of them: it would have to go to the device in every step
                label_A = label_A | (column_A == value)
        label_A = label_A.float()
        return label_A.masked_fill(column_A.isnan(), torch.nan) if column_A.is_floating_point() else label_A


class Labels:
    """The labels of tasks, for columns of a dataset.  ``names``: of the tasks, in the config's order.  ``columns``:
    those that are looked at.  ``weights``: of their losses.  Raises UserError where a task doesn't fit the dataset's
    columns."""

    def __init__(self, tasks: Mapping[str, LabelTask], dataset: Described) -> None:
        self.names = list(tasks)
        self.weights = [task.weight for task in tasks.values()]
        self.rules = [_rule(f"model.tasks.{name}", task, dataset) for name, task in tasks.items()]
        self.columns = frozenset(rule.column for rule in self.rules)

    def refuse_given(self, given: Mapping[str, str]) -> None:
        """Refuse to predict what a prediction is told.  given: the columns that it is told of the action that it is
        asked about, and by which config key each."""
        for name, rule in zip(self.names, self.rules):
            if rule.column in given:
                raise UserError(
                    f"config key '{given[rule.column]}' tells a prediction column '{rule.column}', which is what "
                    f"model.tasks.{name} predicts: leave it out there, or predict another column"
                )

    def of(self, columns: Mapping[str, Any]) -> Tensor:
        """(A, K) float32 of columns of A values each: 1 where an action has the label, 0 where not, NaN unknown."""
        return torch.stack([rule.of(columns[rule.column]) for rule in self.rules], dim=1)

    def check(self, columns: Mapping[str, Any]) -> None:
        """Refuse values other than 0 and 1 (and NaN) in columns of which 1 alone is the label.  Waits for a device, if
        they lie on one."""
        for rule in self.rules:
            if rule.any_of != (1,) or rule.column == TYPE:
                continue
            values = columns[rule.column]
            wrong = ~((values == 0) | (values == 1))
            if values.is_floating_point():
                wrong &= ~values.isnan()
            if wrong.any():
                raise UserError(
                    f"column '{rule.column}' holds {values[wrong][0].item():g}, and a label that is 1 or isn't "
                    "(model.tasks, any_of: [1]) is 0 or 1: name the values that count in any_of, or a threshold in "
                    "at_least, or prepare the dataset again"
                )


def _rule(key: str, task: LabelTask, dataset: Described) -> Rule:
    known: dict[str, ColumnLike] = {info.name: info for info in dataset.columns if info.of == "actions"}
    if task.column not in known:
        raise UserError(
            f"config key '{key}.column' is '{task.column}', which is no column of the dataset's actions: "
            f"{nearest(task.column, known)}"
        )
    info = known[task.column]
    if info.name in GIVEN:
        raise UserError(
            f"config key '{key}.column' is '{info.name}', which a prediction is given: choose a column of what became "
            "of the action"
        )
    if info.multi or info.type == "string":
        what = "holds lists" if info.multi else "is text"
        raise UserError(
            f"config key '{key}.column' is '{task.column}', and that column {what}: choose a column of numbers, "
            "one an action"
        )
    if info.name == TYPE:
        return Rule(TYPE, None, _codes(key, task, dataset.action_type_names))
    if names := [value for value in task.any_of or () if isinstance(value, str)]:
        raise UserError(
            f"config key '{key}.any_of' has '{names[0]}', and column '{task.column}' holds numbers: give numbers"
        )
    values: Sequence[Any] = task.any_of or ()
    if not info.type.startswith("int"):
        return Rule(task.column, task.at_least, tuple(float(value) for value in values))
    # integers are compared as such: as float32 they would lose digits
    if broken := [value for value in values if value != int(value)]:
        raise UserError(
            f"config key '{key}.any_of' has {broken[0]}, and column '{task.column}' holds integers: give integers"
        )
    least = None if task.at_least is None else math.ceil(task.at_least)
    return Rule(task.column, least, tuple(int(value) for value in values))


def _codes(key: str, task: LabelTask, names: Sequence[str]) -> tuple[int, ...]:
    if task.any_of is None:
        raise UserError(
            f"config key '{key}.at_least' is {task.at_least:g}, and action types have no order: name those that have "
            f"the label in {key}.any_of ({nearest('', names)})"
        )
    for value in task.any_of:
        if str(value) not in names:
            raise UserError(
                f"config key '{key}.any_of' has '{value}', which is no action type of the dataset: "
                f"{nearest(str(value), names)}"
            )
    return tuple(names.index(str(value)) for value in task.any_of)
