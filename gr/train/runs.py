"""Opening a run that was trained, to evaluate it or to recommend with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gr import config as configs
from gr.config import RunConfig
from gr.data.dataset import SequenceDataset
from gr.data.popularity import training_counts
from gr.data.split import Split
from gr.errors import UserError
from gr.models.recommender import Recommender
from gr.train import checkpoint
from gr.train.folder import RunFolder
from gr.train.job import build_model, build_split


@dataclass(frozen=True)
class OpenRun:
    """A run with the parameters of one checkpoint; the model is in evaluation mode.

    ``item_counts``: (I,) training actions of each item.
    """

    folder: RunFolder
    config: RunConfig
    dataset: SequenceDataset
    split: Split
    item_counts: torch.Tensor
    model: Recommender
    step: int
    epoch: int


def open_run(path: str | Path, checkpoint_name: str = "last", device: torch.device | str = "cpu") -> OpenRun:
    """The run in ``path`` as of a checkpoint: ``last``, ``best`` (by the validation split) or a step number."""
    folder = RunFolder.existing(path)
    config = configs.load(folder.config)
    chosen = find_checkpoint(folder, checkpoint_name)
    dataset = SequenceDataset(config.data.path)
    split = build_split(config)
    counts = torch.from_numpy(training_counts(dataset, split))
    model = build_model(config, dataset, counts)
    cursor = checkpoint.load(chosen, model)
    if cursor.generation != dataset.manifest.generation:
        raise UserError(
            f"'{dataset.path}' is not the dataset that run '{path}' was trained on (its generation differs): "
            "prepare the same data again"
        )
    model = model.to(device).eval()
    return OpenRun(folder, config, dataset, split, counts, model, cursor.step, cursor.epoch)


def find_checkpoint(folder: RunFolder, name: str) -> Path:
    """The path of a checkpoint: ``last``, ``best`` or a step number."""
    last = checkpoint.newest(folder.checkpoints)
    if last is None:
        raise UserError(f"run '{folder.path}' has no complete checkpoint yet: let it train, or --resume it")
    if name == "last":
        return last
    if name == "best":
        best = checkpoint.read_state(last)["cursor"]["best"]
        if not best:
            raise UserError(
                f"run '{folder.path}' has no best checkpoint: it evaluated no validation split "
                "(data.split.holdout=2 and eval.splits=[valid, test])"
            )
        name = str(best["step"])
    steps = dict(checkpoint.listed(folder.checkpoints))
    if not name.isdigit() or int(name) not in steps:
        raise UserError(
            f"run '{folder.path}' has no checkpoint '{name}': it has last, best and the steps "
            f"{', '.join(map(str, steps))}"
        )
    chosen = steps[int(name)]
    if (damage := checkpoint.damaged(chosen)) is not None:
        raise UserError(f"checkpoint '{chosen}' is damaged ({damage}): choose another one")
    return chosen
