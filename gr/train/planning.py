"""Plans on paper of a run: on the data that it will read, where they are there, else on what its config expects.

Shapes: G sequences of a global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gr import config as configs
from gr.batch import SequenceBatch
from gr.config import ExpectedSection, RunConfig
from gr.data.folder import Folder
from gr.data.manifest import MANIFEST
from gr.errors import UserError
from gr.models.model import Catalogue
from gr.processes import Axis, Processes
from gr.scaling.machine import Machine
from gr.scaling.plan import Imagined, Plan, Planner, Source
from gr.train.parts import Data, build_batches, open_data


@dataclass(frozen=True)
class OfDataset:
    """A dataset's own batches: the first one of a run."""

    data: Data

    @property
    def catalogue(self) -> Catalogue:
        return self.data.catalogue

    def batches(
        self, config: RunConfig, needs: frozenset[str], processes: int
    ) -> tuple[np.ndarray, SequenceBatch]:
        whole = self._first(config, frozenset({"item"}), 1)
        share = self._first(config, needs, processes) if processes > 1 or needs != {"item"} else whole
        return np.asarray(whole.lengths, np.int64), share

    def _first(self, config: RunConfig, needs: frozenset[str], processes: int) -> SequenceBatch:
        """Rank 0's share among so many processes: dealt so that all have nearly as much."""
        cpu = Processes(torch.device("cpu"), data=Axis(0, processes))
        config = configs.override(config, ["data.ingest=arrow"])  # the same batches, and no cluster is asked
        batches = build_batches(config, self.data, needs, cpu)
        for epoch in range(batches.epochs or config.train.epochs):
            if batches.in_epoch(epoch):
                with batches.opened(cpu), closing(batches.epoch(epoch)) as reading:
                    return next(reading).share
        raise UserError("no period of the dataset is over yet: there is nothing to plan with")


def source(config: RunConfig, lengths: list[int] | None = None) -> tuple[RunConfig, Source]:
    """Where the batches of plans come from, and the config with it.  lengths: quantiles in place of a dataset's or the
    config's."""
    there = _is_there(config.data.path)
    if there and lengths is None:
        cpu = Processes(torch.device("cpu"))
        data = open_data(config)
        data.catalogue.count_once(cpu)
        return config, OfDataset(replace(data, split=data.split.on(data.dataset, cpu)))
    expected = config.data.expected
    if expected is None and there:
        expected = _expected(open_data(config))
    if lengths is not None and expected is not None:
        expected = expected.model_copy(update={"lengths": sorted(lengths)})
    config = config.model_copy(update={"data": config.data.model_copy(update={"expected": expected})})
    return config, Imagined(config)


def _is_there(path: str) -> bool:
    try:
        Folder(path).read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _expected(data: Data) -> ExpectedSection:
    """What is to be expected of a dataset that is there, but for its lengths."""
    manifest = data.dataset.manifest
    columns = [info.name for info in manifest.columns if info.of == "actions" and info.name != "item"]
    of_users = [info.name for info in manifest.columns if info.of == "users"]
    return ExpectedSection(
        items=manifest.items,
        users=manifest.users,
        lengths=[1],
        columns=columns,
        user_columns=of_users,
        types=len(manifest.action_type_names),
    )


def plan_run(
    config: RunConfig,
    machine: Machine,
    nodes: Sequence[int],
    varied: dict[str, Sequence[Any]],
    lengths: list[int] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[Plan]:
    """Plans of a run on so many machines of that kind, and of all values of what is varied; best first.  say: is given
    a sentence of each pair that can't be."""
    config, batches = source(config, lengths)
    return Planner(config, batches, machine).grid(nodes, varied, say)
