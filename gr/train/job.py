"""A whole run: ``run(config)`` trains it, ``resume(path)`` goes on with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from gr.processes import Parallel, processes
from gr.train import checkpoint
from gr.train.cursor import Cursor
from gr.train.environment import missing_operators, record
from gr.train.evaluation import Evaluation
from gr.train.folder import RunFolder
from gr.train.kernels import advice_on_kernels, check_kernels
from gr.train.memory import advice_when_out_of_memory
from gr.train.plots import plot_run
from gr.train.selection import check_selection, selection_metric
from gr.train.trainer import Trainer

log = logging.getLogger(__name__)

CHANGEABLE = (
    *("eval", "checkpoint", "log", "data.path", "data.prefetch"),
    *("train.epochs", "train.max_steps", "train.early_stopping", "train.micro_batch_actions"),
    *("train.device", "train.threads", "train.kernels"),
)
"""Keys that may change on resume: none of them changes the batches or the model's mathematics.

(But for ``train.epochs`` and ``train.max_steps`` where the learning rate falls towards the last step.)"""


OnStep = Callable[[RunFolder], None]


def nothing(folder: RunFolder) -> None:
    """Nobody watches the steps."""


@dataclass(frozen=True)
class RunResult:
    """``metrics``: the rows of metrics.jsonl, on the main process.  ``finished``: False if stopped by a signal
    (resume it).  ``selection``: the validation metric by which an epoch is chosen."""

    path: Path
    metrics: list[dict[str, Any]]
    finished: bool
    selection: str = "ndcg@10"

    def evaluation(
        self, split: str = "test", epoch: int | None = None, step: int | None = None
    ) -> dict[str, Any]:
        """The last evaluation of a split: of all, of an epoch, or at a step."""
        rows = [r for r in self.metrics if r["kind"] == "eval" and r["split"] == split]
        rows = [r for r in rows if epoch in (None, r["epoch"]) and step in (None, r["step"])]
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


def run(config: RunConfig, *, on_step: OnStep = nothing) -> RunResult:
    """Train ``config`` in a new folder.  ``on_step``: called with the folder after each step."""
    with (
        processes(config.train.device, config.train.threads) as parallel,
        advice_when_out_of_memory(config),
        advice_on_kernels(config),
    ):
        parts = parallel.together(lambda: build(config, parallel))
        folder = _new_folder(config, parallel)
        with _locked(folder, parallel):
            cursor = Cursor(parts.dataset.manifest.generation)
            return _train(config, parts, folder, cursor, parallel, on_step)


def resume(path: str | Path, overrides: Sequence[str] = (), *, on_step: OnStep = nothing) -> RunResult:
    """Go on with the run in ``path`` from its newest complete checkpoint, or from the start if it has none.

    ``overrides``: dotted, of the keys that ``CHANGEABLE`` lists; others are refused.
    """
    folder, config = saved_run(path, overrides)
    with (
        processes(config.train.device, config.train.threads) as parallel,
        advice_when_out_of_memory(config),
        advice_on_kernels(config),
        _locked(folder, parallel),
    ):
        parts = parallel.together(lambda: build(config, parallel))
        newest = parallel.broadcast(checkpoint.newest(folder.checkpoints) if parallel.is_main else None)
        cursor = Cursor(parts.dataset.manifest.generation)
        if isinstance(newest, Path):
            cursor = parallel.together(lambda: _load(newest, parts))
            cursor.finished = cursor.finished and cursor.epoch >= config.train.epochs
        if parallel.is_main:
            rows = folder.cut_metrics(cursor.metrics_rows)
            if rows < cursor.metrics_rows:
                log.warning(
                    "'%s' has lost rows: %d of the %d that '%s' counts on are left, training goes on with those",
                    *(folder.metrics, rows, cursor.metrics_rows, newest),
                )
                cursor.metrics_rows = rows
            folder.rewrite_config(configs.to_yaml(config))
            where = "its end" if cursor.finished else f"epoch {cursor.epoch + 1}, step {cursor.step}"
            print(f"resuming '{folder.path}' at {where}", flush=True)
        cursor.metrics_rows = parallel.broadcast(cursor.metrics_rows)  # type: ignore[assignment]
        return _train(config, parts, folder, cursor, parallel, on_step)


def saved_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunFolder, RunConfig]:
    """The folder of a run and its config with ``overrides``, if a resume may have them."""
    folder = RunFolder.existing(path)
    saved = configs.load(folder.config)
    config = configs.override(saved, overrides)
    refuse_changes(saved, config)
    return folder, config


def build(config: RunConfig, parallel: Parallel) -> Parts:
    """Dataset, split, model, optimiser and batches of a config, on this process's device."""
    check_selection(config)
    check_kernels(config, parallel.device)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS adds in any order
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
        pin_memory=parallel.device.type == "cuda",
    )
    if not order.rows:
        raise UserError(f"data.split leaves no training sequence of dataset '{config.data.path}': change it")
    if not _has_target(dataset, split):
        raise UserError(
            f"data.split leaves no user of dataset '{config.data.path}' two actions to train on, an input and its "
            "target: hold out fewer, or prepare a log with longer histories"
        )
    if not batches.per_epoch:
        raise UserError(
            f"dataset '{config.data.path}' has {order.rows} training sequences, fewer than train.global_batch "
            f"{config.train.global_batch} with data.tail=drop: lower the batch or keep the tail"
        )
    return Parts(dataset, split, counts, model, optimizer, batches)


def _has_target(dataset: SequenceDataset, split: Split) -> bool:
    """Whether any user keeps two actions to train on; mostly the first block tells."""
    blocks = range(len(dataset.manifest.blocks))
    return any((split.train_stop(dataset.read_block(block)) >= 2).any() for block in blocks)


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
    for key, old, new in differences(saved, wanted):
        if key in ("train.epochs", "train.max_steps") and wanted.schedule.name != "constant":
            raise UserError(
                f"'{key}' cannot change on resume ({old!r} -> {new!r}) where schedule.name is "
                f"{wanted.schedule.name}, for the learning rates so far depended on it: start a new run"
            )
        if not within(key, CHANGEABLE):
            raise UserError(
                f"'{key}' cannot change on resume ({old!r} -> {new!r}): start a new run, "
                f"or change only {', '.join(CHANGEABLE)}"
            )


def differences(one: RunConfig, other: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in one, value in the other) wherever two configs differ, sorted."""
    old, new = _flat(configs.to_dict(one)), _flat(configs.to_dict(other))
    keys = sorted(old.keys() | new.keys())
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def within(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of ``sections`` or lies in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _train(
    config: RunConfig,
    parts: Parts,
    folder: RunFolder,
    cursor: Cursor,
    parallel: Parallel,
    on_step: OnStep,
) -> RunResult:
    if parallel.is_main and (said := missing_operators(parallel.device.type)):
        log.warning(said)
    evaluation = Evaluation(
        parts.dataset, parts.split, config, device=parallel.device, item_counts=parts.item_counts
    )
    trainer = Trainer(
        config, parts.model, parts.optimizer, parts.batches, evaluation, parallel, folder, cursor, on_step
    )
    finished = trainer.train()
    rows = folder.read_metrics() if parallel.is_main else []
    if parallel.is_main:
        try:
            plot_run(folder)
        except Exception as error:  # a picture can never fail a run
            log.warning("no plot of '%s' (%s)", folder.path, error)
    return RunResult(folder.path, rows, finished, selection_metric(config))


def _new_folder(config: RunConfig, parallel: Parallel) -> RunFolder:
    """Rank 0 chooses and makes the folder."""

    def make() -> Path | None:
        return RunFolder.make(config, configs.to_yaml(config), record()).path if parallel.is_main else None

    path = parallel.broadcast(parallel.together(make))
    assert isinstance(path, Path)
    return RunFolder(path)


@contextmanager
def _locked(folder: RunFolder, parallel: Parallel) -> Iterator[None]:
    """No other run trains in ``folder`` meanwhile."""
    with ExitStack() as held:
        parallel.together(lambda: held.enter_context(folder.locked()) if parallel.is_main else None)
        yield


def _load(path: Path, parts: Parts) -> Cursor:
    """Fill the model and the optimiser from a checkpoint of the same data."""
    saved = checkpoint.read_state(path)["cursor"]["generation"]
    if saved != parts.dataset.manifest.generation:
        raise UserError(
            f"'{parts.dataset.path}' is not the dataset that '{path}' was trained on (generation "
            f"{parts.dataset.manifest.generation}, not {saved}): prepare the same data again, or start a new run"
        )
    return checkpoint.load(path, parts.model, parts.optimizer)


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
