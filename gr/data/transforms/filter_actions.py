"""Only actions of some types, or with values in a range."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from gr.config import DISTINCT, ComponentConfig
from gr.data.dataset import SequenceDataset
from gr.data.manifest import Manifest
from gr.data.sequences import TYPE, VALUE, Sequences
from gr.data.transforms.transform import Filter
from gr.errors import UserError, nearest


class FilterActions(Filter):
    class Config(ComponentConfig):
        """types: action types by their names in the log.  at_least, at_most: of the value; an unknown one (NaN) is in
        no range.  An action that meets all that is asked for stays."""

        name: Literal["filter_actions"] = "filter_actions"
        types: Annotated[list[str], Field(min_length=1), DISTINCT] | None = None
        at_least: float | None = None
        at_most: float | None = None

        @model_validator(mode="after")
        def _asks_something(self) -> FilterActions.Config:
            if self.types is None and self.at_least is None and self.at_most is None:
                raise ValueError("it keeps everything: give it types, at_least or at_most")
            return self

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        by_value = config.at_least is not None or config.at_most is not None
        self.needs = frozenset([TYPE] * (config.types is not None) + [VALUE] * by_value)

    def check_dataset(self, dataset: SequenceDataset) -> None:
        super().check_dataset(dataset)
        known = dataset.manifest.action_type_names
        if unknown := [name for name in self.config.types or () if name not in known]:
            raise UserError(
                f"data.transforms 'filter_actions' keeps type '{unknown[0]}', which '{dataset.path}' doesn't have: "
                f"{nearest(unknown[0], known)}"
            )

    def kept(self, rows: Sequences, manifest: Manifest) -> np.ndarray:
        kept_A = np.ones(len(rows.items_A), bool)
        if self.config.types is not None:
            codes = [manifest.action_type_names.index(name) for name in self.config.types]
            kept_A &= np.isin(rows.columns[TYPE], codes)  # type: ignore[arg-type]
        if self.config.at_least is not None:
            kept_A &= rows.columns[VALUE] >= self.config.at_least  # type: ignore[operator]
        if self.config.at_most is not None:
            kept_A &= rows.columns[VALUE] <= self.config.at_most  # type: ignore[operator]
        return kept_A
