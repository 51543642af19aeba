"""Opening a run that was trained, or its export, to evaluate it or to recommend with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gr import config as configs
from gr.config import RunConfig
from gr.errors import UserError
from gr.models.model import Model
from gr.models.retrieval import Retrieval
from gr.processes import Processes
from gr.train import checkpoint, exported
from gr.train.checkpoint import find_checkpoint
from gr.train.evaluation import Evaluation
from gr.train.folder import RunFolder
from gr.train.parts import Data, build_model, open_data
from gr.train.place import AnyPath
from gr.train.starting import start


@dataclass(frozen=True)
class OpenRun:
    """A run with the parameters of one checkpoint; the model is in evaluation mode."""

    folder: RunFolder
    config: RunConfig
    data: Data
    model: Model
    step: int
    epoch: int

    def evaluation(self, processes: Processes | None = None, config: RunConfig | None = None) -> Evaluation:
        """Of models like this one on the run's held-out splits, as ``config`` says (the run's own without it)."""
        data = self.data
        return Evaluation(
            data.dataset,
            data.split,
            config or self.config,
            data.catalogue,
            judged_by=self.model.judged_by,
            processes=processes,
            columns=self.model.needs,
        )


def open_run(
    path: str | Path,
    checkpoint_name: str = "last",
    processes: Processes | None = None,
    data_path: str | None = None,
    dim: int | None = None,
) -> OpenRun:
    """The run in ``path`` as of a checkpoint: ``last``, ``best`` (by the validation split) or a step number; or the
    export there, which is of one.  ``data_path``: where the run's dataset is, if not where the config says.
    dim: score by so many first numbers of vectors.

    Several processes open it together (``Processes.together``).
    """
    processes = processes or Processes(torch.device("cpu"))
    config, folder = config_of(path, data_path), RunFolder(path)
    chosen = None if exported.is_export(path) else find_checkpoint(folder, checkpoint_name)
    data = open_data(config, trained_on(path, chosen))
    model = build_model(config, data, processes, loaded=True)
    start(model, config, processes, begun=True)
    if chosen is None:
        cursor = exported.load(path, model, checkpoint_name, processes.world)
    else:
        cursor = checkpoint.load(chosen, model)
    if dim is not None:
        _cut(model, dim, path)
    check_generation(data, cursor.generation, path)
    begun = cursor.epoch + (cursor.batch > 0)
    data = replace(data, split=data.split.on(data.dataset).at(begun))
    return OpenRun(folder, config, data, model.eval(), cursor.step, cursor.epoch)


def _cut(model: Model, dim: int, path: str | Path) -> None:
    if not isinstance(model, Retrieval):
        raise UserError(
            f"run '{path}' scores given items and has no vectors to cut: leave --dim out", everywhere=True
        )
    model.cut_to(dim)


def config_of(path: str | Path, data_path: str | None = None) -> RunConfig:
    """The config of the run or export in ``path``, reading its dataset at ``data_path`` if that is given."""
    if exported.is_export(path):
        exported.check(path, exported.read_manifest(path), ["config.yaml"])
    folder = RunFolder.existing(path)
    config = configs.load(folder.config)
    return config if data_path is None else configs.override(config, [f"data.path={json.dumps(data_path)}"])


def trained_on(path: str | Path, chosen: AnyPath | None) -> str:
    """The generation of the dataset that the checkpoint ``chosen``, or without one the export in ``path``, is of."""
    if chosen is None:
        return exported.read_manifest(path).generation
    return checkpoint.read_state(chosen)["cursor"]["generation"]


def check_generation(data: Data, generation: str, path: str | Path) -> None:
    """Refuse a dataset that isn't the one of the run in ``path``."""
    if generation != data.dataset.manifest.generation:
        raise UserError(
            f"'{data.dataset.path}' is not the dataset that run '{path}' was trained on (its generation differs): "
            "prepare the same data again"
        )
