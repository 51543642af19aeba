"""Opening a run that was trained, or its export, to evaluate it or to recommend with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from gr import config as configs
from gr.config import RunConfig
from gr.errors import UserError
from gr.models.model import Model
from gr.processes import Processes
from gr.train import checkpoint, exported
from gr.train.folder import RunFolder
from gr.train.parts import Data, build_model, open_data
from gr.train.place import AnyPath


@dataclass(frozen=True)
class OpenRun:
    """A run with the parameters of one checkpoint; the model is in evaluation mode."""

    folder: RunFolder
    config: RunConfig
    data: Data
    model: Model
    step: int
    epoch: int


def open_run(
    path: str | Path,
    checkpoint_name: str = "last",
    processes: Processes | None = None,
    data_path: str | None = None,
) -> OpenRun:
    """The run in ``path`` as of a checkpoint: ``last``, ``best`` (by the validation split) or a step number; or the
    export there, which is of one.  ``data_path``: where the run's dataset is, if not where the config says.

    Several processes open it together (``Processes.together``).
    """
    processes = processes or Processes(torch.device("cpu"))
    config, folder = config_of(path, data_path), RunFolder(path)
    chosen = None if exported.is_export(path) else find_checkpoint(folder, checkpoint_name)
    data = open_data(config)
    model = build_model(config, data, processes)
    if chosen is None:
        cursor = exported.load(path, model, checkpoint_name, processes.world)
    else:
        cursor = checkpoint.load(chosen, model)
    check_generation(data, cursor.generation, path)
    return OpenRun(folder, config, data, model.eval(), cursor.step, cursor.epoch)


def config_of(path: str | Path, data_path: str | None = None) -> RunConfig:
    """The config of the run or export in ``path``, reading its dataset at ``data_path`` if that is given."""
    if exported.is_export(path):
        exported.check(path, exported.read_manifest(path), ["config.yaml"])
    folder = RunFolder.existing(path)
    config = configs.load(folder.config)
    return config if data_path is None else configs.override(config, [f"data.path={json.dumps(data_path)}"])


def check_generation(data: Data, generation: str, path: str | Path) -> None:
    """Refuse a dataset that isn't the one of the run in ``path``."""
    if generation != data.dataset.manifest.generation:
        raise UserError(
            f"'{data.dataset.path}' is not the dataset that run '{path}' was trained on (its generation differs): "
            "prepare the same data again"
        )


def find_checkpoint(folder: RunFolder, name: str) -> AnyPath:
    """The path of a checkpoint: ``last``, ``best`` or a step number."""
    last = checkpoint.newest(folder.checkpoints)
    if last is None:
        raise UserError(f"run '{folder.path}' has no complete checkpoint yet: let it train, or --resume it")
    if name == "last":
        return last
    steps = dict(checkpoint.listed(folder.checkpoints))
    if name == "best":
        best = checkpoint.read_state(last)["cursor"]["best"]
        if not best:
            raise UserError(
                f"run '{folder.path}' has no best checkpoint: it evaluated no validation split "
                "(data.split.holdout=2 and eval.splits=[valid, test])"
            )
        name = str(int(best["step"]))
        if int(name) not in steps:  # another metric chose then, and the checkpoint was pruned
            raise UserError(
                f"run '{folder.path}' is best at step {name} (by {best['metric']}), of which no checkpoint was kept: "
                f"choose one of {', '.join(map(str, steps))}"
            )
    if not name.isdigit() or int(name) not in steps:
        raise UserError(
            f"run '{folder.path}' has no checkpoint '{name}': it has last, best and the steps "
            f"{', '.join(map(str, steps))}"
        )
    chosen = steps[int(name)]
    if (damage := checkpoint.damaged(chosen)) is not None:
        raise UserError(f"checkpoint '{chosen}' is damaged ({damage}): choose another one")
    return chosen
