"""A whole run: ``run(config)`` trains it, ``resume(path)`` goes on with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import deterministic

from gr import config as configs, registry
from gr.config import RunConfig
from gr.data.dataset import SequenceDataset
from gr.data.loader import TrainingBatches
from gr.data.order import Order
from gr.data.popularity import training_counts
from gr.data.split import Split
from gr.errors import UserError
from gr.models.recommender import Recommender
from gr.train import checkpoint
from gr.train.cursor import Cursor
from gr.train.environment import record
from gr.train.evaluation import Evaluation
from gr.train.folder import RunFolder
from gr.train.memory import advice_when_out_of_memory
from gr.train.parallel import Parallel, processes
from gr.train.plots import plot_run
from gr.train.trainer import Trainer

log = logging.getLogger(__name__)

CHANGEABLE = (
    *("run", "eval", "checkpoint", "log", "data.path", "data.prefetch"),
    *("train.epochs", "train.max_steps", "train.early_stopping", "train.micro_batch_actions"),
    *("train.device", "train.threads", "train.kernels"),
)
"""Keys that may change on resume: none of them changes the batches or the model's mathematics."""


@dataclass(frozen=True)
class RunResult:
    """``metrics``: the rows of metrics.jsonl.  ``finished``: False if stopped by a signal (resume it)."""

    path: Path
    metrics: list[dict[str, Any]]
    finished: bool

    def evaluation(self, split: str = "test", epoch: int | None = None) -> dict[str, Any]:
        """The last evaluation of a split, or the one of an epoch."""
        rows = [r for r in self.metrics if r["kind"] == "eval" and r["split"] == split]
        rows = [r for r in rows if epoch is None or r["epoch"] == epoch]
        if not rows:
            raise UserError(f"run '{self.path}' has no evaluation of split '{split}'")
        return rows[-1]


@dataclass(frozen=True)
class Parts:
    """What a config describes, built."""

    dataset: SequenceDataset
    split: Split
    item_counts: torch.Tensor
    model: Recommender
    optimizer: torch.optim.Optimizer
    batches: TrainingBatches


def run(config: RunConfig, *, on_step: Callable[[], None] = lambda: None) -> RunResult:
    """Train ``config`` in a new folder."""
    with processes(config.train.device, config.train.threads) as parallel, advice_when_out_of_memory(config):
        parts = build(config, parallel)
        folder = _new_folder(config, parallel)
        cursor = Cursor(parts.dataset.manifest.generation)
        return _train(config, parts, folder, cursor, parallel, on_step)


def resume(
    path: str | Path, overrides: Sequence[str] = (), *, on_step: Callable[[], None] = lambda: None
) -> RunResult:
    """Go on with the run in ``path`` from its newest complete checkpoint, or from the start if it has none."""
    folder = RunFolder.existing(path)
    saved = configs.load(folder.config)
    config = configs.override(saved, overrides)
    refuse_changes(saved, config)
    with processes(config.train.device, config.train.threads) as parallel, advice_when_out_of_memory(config):
        parts = build(config, parallel)
        newest = parallel.broadcast(checkpoint.newest(folder.checkpoints) if parallel.is_main else None)
        cursor = Cursor(parts.dataset.manifest.generation)
        if isinstance(newest, Path):
            _check_generation(newest, parts.dataset)
            cursor = checkpoint.load(newest, parts.model, parts.optimizer)
            cursor.finished = cursor.finished and cursor.epoch >= config.train.epochs
        if parallel.is_main:
            folder.cut_metrics(cursor.metrics_rows)
            folder.config.write_text(configs.to_yaml(config))
            print(f"resuming '{folder.path}' at epoch {cursor.epoch + 1}, step {cursor.step}", flush=True)
        parallel.barrier()
        return _train(config, parts, folder, cursor, parallel, on_step)


def build(config: RunConfig, parallel: Parallel) -> Parts:
    """Dataset, split, model, optimiser and batches of a config, on this process's device."""
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # our kernels fill theirs
    dataset = SequenceDataset(config.data.path)
    split = build_split(config)
    for name in config.eval.splits:
        split.check(name)
    counts = torch.from_numpy(training_counts(dataset, split))
    model = build_model(config, dataset, counts).to(parallel.device)
    optimizer = registry.resolve(registry.OPTIMIZERS, config.optimizer.name, "optimizer")(
        config.optimizer
    ).build(model)
    order = Order(
        fingerprint=dataset.manifest.fingerprint,
        seed=config.train.seed,
        rows=split.training_rows(dataset.users),
        block_rows=dataset.manifest.block_rows,
        window_blocks=config.data.window_blocks,
        shuffle=config.data.order == "shuffle",
    )
    batches = TrainingBatches(
        dataset,
        split,
        order,
        global_batch=config.train.global_batch,
        max_length=config.data.max_length,
        tail=config.data.tail,
        rank=parallel.rank,
        ranks=parallel.ranks,
        prefetch=config.data.prefetch,
    )
    if not batches.per_epoch:
        raise UserError(
            f"dataset '{config.data.path}' has {order.rows} training sequences, fewer than train.global_batch "
            f"{config.train.global_batch} with data.tail=drop: lower the batch or keep the tail"
        )
    return Parts(dataset, split, counts, model, optimizer, batches)


def build_split(config: RunConfig) -> Split:
    return registry.resolve(registry.SPLITS, config.data.split.name, "data.split")(config.data.split)


def build_model(config: RunConfig, dataset: SequenceDataset, item_counts: torch.Tensor) -> Recommender:
    model = Recommender(config, items=dataset.items, item_counts=item_counts)
    if model.encoder.uses_times and not dataset.has_timestamps:
        raise UserError(
            f"the encoder uses times and dataset '{config.data.path}' has none: "
            "set model.encoder.relative_time=false, or prepare the dataset with a time column"
        )
    return model


def refuse_changes(saved: RunConfig, wanted: RunConfig) -> None:
    """Refuse a resume that would not continue the same mathematics."""
    old, new = _flat(configs.to_dict(saved)), _flat(configs.to_dict(wanted))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not any(key == c or key.startswith(c + ".") for c in CHANGEABLE):
            raise UserError(
                f"'{key}' cannot change on resume ({old.get(key)!r} -> {new.get(key)!r}): start a new run, "
                f"or change only {', '.join(CHANGEABLE)}"
            )


def _train(
    config: RunConfig,
    parts: Parts,
    folder: RunFolder,
    cursor: Cursor,
    parallel: Parallel,
    on_step: Callable[[], None],
) -> RunResult:
    evaluation = Evaluation(
        parts.dataset, parts.split, config, device=parallel.device, item_counts=parts.item_counts
    )

    trainer = Trainer(
        config, parts.model, parts.optimizer, parts.batches, evaluation, parallel, folder, cursor, on_step
    )
    finished = trainer.train() if not cursor.finished else True
    rows = folder.read_metrics() if parallel.is_main else []
    if parallel.is_main:
        plot_run(folder)
    return RunResult(folder.path, rows, finished)


def _new_folder(config: RunConfig, parallel: Parallel) -> RunFolder:
    """Rank 0 chooses and makes the folder; a refusal is everybody's."""
    path: str | None = None
    refusal: UserError | None = None
    if parallel.is_main:
        try:
            folder = RunFolder.choose(config)
            folder.create(configs.to_yaml(config), record())
            path = str(folder.path)
        except UserError as error:
            refusal = error
    path, refusal = parallel.broadcast((path, refusal))  # type: ignore[misc]
    if refusal is not None:
        raise refusal
    assert path is not None
    return RunFolder(path)


def _check_generation(path: Path, dataset: SequenceDataset) -> None:
    saved = checkpoint.read_state(path)["cursor"]["generation"]
    if saved != dataset.manifest.generation:
        raise UserError(
            f"'{dataset.path}' is not the dataset that '{path}' was trained on (generation "
            f"{dataset.manifest.generation}, not {saved}): prepare the same data again, or start a new run"
        )


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
