"""Data that aren't there: a catalogue and batches as ``data.expected`` describes them, for plans on paper.

Shapes: B sequences, T actions in the batch, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.config import ExpectedSection, RunConfig
from gr.data.columns import ColumnInfo
from gr.errors import UserError

MOST_COUNTED = 1 << 27
"""Items whose training counts are imagined one by one."""


@dataclass(frozen=True)
class ImaginedManifest:
    """What the dataset would say of itself."""

    columns: Sequence[ColumnInfo]
    action_type_names: list[str]
    users: int


@dataclass(frozen=True)
class ImaginedCatalogue:
    """The items that ``expected`` speaks of, each seen once in training."""

    expected: ExpectedSection

    @property
    def rows(self) -> int:
        return self.expected.items

    @property
    def training_counts(self) -> Tensor:
        if self.rows > MOST_COUNTED:
            raise UserError(
                f"the config counts how often each of {self.rows:,} expected items is seen, which no plan can imagine: "
                "use uniform sampling (objective.sampling=uniform, objective.logq=false, model.l2=0.0)"
            )
        return torch.ones(self.rows, dtype=torch.int64)

    @property
    def manifest(self) -> ImaginedManifest:
        columns = [ColumnInfo("item", "int64")]
        columns += [ColumnInfo(name, "int64") for name in self.expected.columns]
        columns += [ColumnInfo(name, "int64", "users") for name in self.expected.user_columns]
        types = [str(number) for number in range(self.expected.types)]
        return ImaginedManifest(columns, types, self.expected.users)

    @property
    def column_names(self) -> list[str]:
        return []

    def info(self, name: str) -> ColumnInfo:
        raise UserError(self._nothing(name))

    def codes(self, name: str) -> Tensor:
        raise UserError(self._nothing(name))

    def numbers(self, name: str) -> Tensor:
        raise UserError(self._nothing(name))

    def column(self, name: str) -> Any:
        raise UserError(self._nothing(name))

    def kept(self, kind: str, about: dict[str, Any]) -> None:
        return None

    def keep(self, kind: str, about: dict[str, Any], table: Any) -> None:
        return None

    def _nothing(self, name: str) -> str:
        return (
            f"the model looks at column '{name}' of the items, of which data.expected says nothing: plan with a "
            "dataset that is there (data.path)"
        )


def drawn_lengths(quantiles: Sequence[int], count: int, most: int) -> np.ndarray:
    """(count,) int64 lengths of a distribution with these evenly spaced quantiles, none above ``most``: its own
    quantiles in the middle of ``count`` equal parts, so that their mean is the distribution's."""
    places = (np.arange(count) + 0.5) / count
    spread = np.linspace(0, 1, len(quantiles)) if len(quantiles) > 1 else np.array([0.0])
    return np.minimum(np.rint(np.interp(places, spread, quantiles)), most).astype(np.int64)


def heaviest_share(lengths: np.ndarray, processes: int) -> np.ndarray:
    """Of a global batch the lengths that one process gets: dealt longest first, to and fro, as nearly as level."""
    ordered = np.sort(lengths)[::-1]
    turn, place = np.divmod(np.arange(len(ordered)), processes)
    return ordered[np.where(turn % 2, processes - 1 - place, place) == 0]


def batch(
    config: RunConfig, needs: frozenset[str], expected: ExpectedSection, inputs_B: np.ndarray, ahead: int
) -> SequenceBatch:
    """A batch of sequences with so many inputs each (and ``ahead`` actions more), its items drawn evenly: as many
    distinct rows as there can be, so that what is exchanged is an upper bound.  Values of a feature's column are rows
    of its table."""
    lengths = [int(n) + ahead for n in inputs_B]
    rng = np.random.default_rng(0)
    actions = sum(lengths)
    most = _most(config, expected)
    times = torch.arange(actions, dtype=torch.int64) * 60

    def drawn(name: str, count: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, most.get(name, 2), count))

    columns = {
        name: times if name == "time" else drawn(name, actions)
        for name in sorted({"item", *needs} - set(expected.user_columns))
    }
    of_users = {name: drawn(name, len(lengths)) for name in sorted(needs & set(expected.user_columns))}
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    ordinals = torch.from_numpy(rng.integers(0, expected.users, len(lengths)))
    return SequenceBatch(offsets, ordinals, tuple(lengths), columns, of_users)


def _most(config: RunConfig, expected: ExpectedSection) -> Mapping[str, int]:
    """How many values each column has."""
    most = {"item": expected.items, "type": max(expected.types, 1)}
    model: Any = config.model
    features = model.input.features if hasattr(model, "input") else {**model.user.fields, **model.item.fields}
    for feature in features.values():
        if feature.column is not None and feature.rows is not None and feature.column != "item":
            most[feature.column] = min(feature.rows, most.get(feature.column, feature.rows))
    return most
