"""A whole run: ``run(config)`` trains it, ``resume(path)`` goes on with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from gr import config as configs
from gr.config import FollowSection, RunConfig
from gr.data.dataset import SequenceDataset
from gr.data.manifest import read_manifest
from gr.errors import UserError
from gr.launcher import attempt
from gr.processes import Processes, processes
from gr.train import checkpoint
from gr.train.changes import check_growing, refuse_changes
from gr.train.cursor import Cursor
from gr.train.environment import missing_operators, record
from gr.train.exported import is_export
from gr.train.folder import RunFolder
from gr.train.memory import advice_when_out_of_memory
from gr.train.numerics import numerics
from gr.train.parts import Parts, build
from gr.train.place import AnyPath
from gr.train.plans import plans_of, shown
from gr.train.plots import plot_run
from gr.train.preflight import check_agreement, digest_of
from gr.train.selection import best_of, best_validation, family_of, selection_metric, validations
from gr.train.stopping import StopSignal
from gr.train.trainer import Trainer
from gr.train.watch import Watch

log = logging.getLogger(__name__)


OnStep = Callable[[RunFolder], None]


def nothing(folder: RunFolder) -> None:
    """Nobody watches the steps."""


@dataclass(frozen=True)
class RunResult:
    """``metrics``: the rows of metrics.jsonl, on the main process.  ``finished``: False if stopped by a signal
    (resume it).  ``selection``: the validation metric by which an epoch is chosen.  ``shown``: the metrics that people
    look at first.  ``model``: its kind."""

    path: AnyPath
    metrics: list[dict[str, Any]]
    finished: bool
    selection: str = "ndcg@10"
    shown: list[str] = field(default_factory=list)
    model: str = "retrieval"

    def evaluation(
        self, split: str = "test", epoch: int | None = None, step: int | None = None
    ) -> dict[str, Any]:
        """The last evaluation of a split: of all, of an epoch, or at a step."""
        rows = [r for r in self.metrics if r["kind"] == "eval" and r["split"] == split]
        rows = [r for r in rows if epoch in (None, r["epoch"]) and step in (None, r["step"])]
        if not rows:
            raise UserError(f"run '{self.path}' has no evaluation of split '{split}'")
        return rows[-1]


def run(config: RunConfig, *, on_step: OnStep = nothing) -> RunResult:
    """Train ``config`` in a new folder; where torchrun has started the job again, go on in the folder of its first
    attempt.  ``on_step``: called with the folder after each step."""
    with running(config, config.train.context) as processes, Watch(processes) as watch:
        check_agreement(config, processes)
        if (begun := _begun(config, processes)) is not None:
            return _Training(config, begun, processes, watch, on_step).go_on()
        parts = processes.together(lambda: build(config, processes))
        folder = _new_folder(config, processes)
        try:
            processes.check_shared(folder.path, "run.dir")
        except UserError:
            if processes.is_main:
                folder.give_up()
            raise
        return _Training(config, folder, processes, watch, on_step).begin(parts)


def resume(path: str | Path, overrides: Sequence[str] = (), *, on_step: OnStep = nothing) -> RunResult:
    """Go on with the run in ``path`` from its newest complete checkpoint, or from the start if it has none.

    ``overrides``: dotted, of the keys that ``gr.train.changes.CHANGEABLE`` lists; others are refused.
    """
    folder, config = saved_run(path, overrides)
    with running(config, config.train.context) as processes, Watch(processes) as watch:
        check_agreement(config, processes)
        return _Training(config, folder, processes, watch, on_step).go_on()


def _begun(config: RunConfig, processes: Processes) -> RunFolder | None:
    """The folder in which an earlier attempt of this job began the run, where torchrun has started it again."""
    job, number = attempt()
    if not max(processes.world.maximum([number])):
        return None

    def find() -> AnyPath | None:
        folder = RunFolder.of_job(config, job) if processes.is_main else None
        if folder is None:
            return None
        refuse_changes(configs.load(folder.config), config)
        return folder.path

    path = processes.broadcast(processes.together(find))
    return None if path is None else RunFolder(path)


@contextmanager
def running(config: RunConfig, context: int = 1) -> Iterator[Processes]:
    """The processes of a run, with the settings that its numbers hang on, and advice where memory runs out.
    ``context``: how many share a sequence, which is for training alone."""
    with (
        processes(
            config.train.device, config.train.threads, context, timedelta(seconds=config.train.timeout)
        ) as joined,
        advice_when_out_of_memory(config),
        numerics(config, joined.device),
    ):
        yield joined


def saved_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunFolder, RunConfig]:
    """The folder of a run and its config with ``overrides``, if a resume may have them."""
    if is_export(path):
        raise UserError(
            f"'{path}' is an export, which has weights and no moments: go on with the run that it was taken from"
        )
    folder = RunFolder.existing(path)
    saved = configs.load(folder.config)
    config = configs.override(saved, overrides)
    refuse_changes(saved, config)
    return folder, config


def _new_folder(config: RunConfig, processes: Processes) -> RunFolder:
    """The main process chooses and makes the folder."""

    def make() -> AnyPath | None:
        return RunFolder.make(config, configs.to_yaml(config), record()).path if processes.is_main else None

    path = processes.broadcast(processes.together(make))
    assert path is not None
    return RunFolder(path)


class _Training:
    """One run in its folder, trained by these processes: from its beginning or from where a checkpoint left it, and as
    often again as its dataset has grown meanwhile."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, processes: Processes, watch: Watch, on_step: OnStep
    ) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        self.watch, self.on_step = watch, on_step

    def begin(self, parts: Parts) -> RunResult:
        with self._locked():
            return self._train_and_follow(parts, Cursor(parts.data.dataset.manifest.generation))

    def go_on(self) -> RunResult:
        self.processes.check_shared(self.folder.path, "the run's folder")
        with self._locked():
            return self._train_and_follow(*self._opened())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other run trains in the folder meanwhile."""
        with ExitStack() as held:
            self.processes.together(
                lambda: held.enter_context(self.folder.locked()) if self.processes.is_main else None
            )
            yield

    def _opened(self) -> tuple[Parts, Cursor]:
        """The run as its newest complete checkpoint left it, its files too."""
        config, processes = self.config, self.processes
        newest = checkpoint.newest(self.folder.checkpoints, processes)
        saved = None if newest is None else checkpoint.read_state(newest)["cursor"]
        # an epoch that was begun is gone through to its end; between two, training goes on with the newest data
        begun = saved["generation"] if saved and saved["batch"] else None
        parts = processes.together(
            lambda: build(config, processes, begun, begun=saved and saved["generation"])
        )
        cursor = Cursor(parts.data.dataset.manifest.generation)
        if newest is not None:
            cursor = processes.together(lambda: self._load(newest, parts))
            cursor.finished = cursor.finished and cursor.epoch >= (
                parts.batches.epochs or config.train.epochs
            )
        if processes.is_main:
            self._prepare_folder(cursor, newest)
            if begun is not None and read_manifest(parts.data.dataset.folder).generation != begun:
                print(
                    "the dataset has grown: what was begun is finished with the generation that it began with, the "
                    "next resume goes on with the newest",
                    flush=True,
                )
        return parts, processes.broadcast(cursor)

    def _load(self, path: AnyPath, parts: Parts) -> Cursor:
        """Fill the model and the engine from a checkpoint of the same data, or of what that has grown from."""
        dataset = parts.data.dataset
        now, saved = dataset.manifest.generation, checkpoint.read_state(path)["cursor"]["generation"]
        if saved == now:
            return checkpoint.load(path, parts.model, parts.engine)
        if saved not in dataset.manifest.earlier:
            raise UserError(
                f"'{dataset.path}' is not the dataset that '{path}' was trained on (generation {now}, not {saved}): "
                "prepare the same data again, or start a new run"
            )
        check_growing(self.config, dataset)
        cursor = checkpoint.load(path, parts.model, parts.engine, growing=True)
        cursor.generation, cursor.best, cursor.stale = now, {}, 0  # others are held out now
        return cursor

    def _prepare_folder(self, cursor: Cursor, newest: AnyPath | None) -> None:
        """Files and cursor as of the checkpoint that training goes on from."""
        folder = self.folder
        rows = folder.cut_metrics(cursor.metrics_rows)
        if rows < cursor.metrics_rows:
            log.warning(
                "'%s' has lost rows: %d of the %d that '%s' counts on are left, training goes on with those",
                *(folder.path / folder.metrics.name, rows, cursor.metrics_rows, newest),
            )
            cursor.metrics_rows = rows
        if newest is not None and checkpoint.read_state(newest)["cursor"]["generation"] != cursor.generation:
            print("the dataset has grown: new rows of tables start from their first values", flush=True)
        where = "its end" if cursor.finished else f"epoch {cursor.epoch + 1}, step {cursor.step}"
        self._reconsider_best(cursor)
        folder.rewrite_config(configs.to_yaml(self.config))
        print(f"resuming '{folder.path}' at {where}", flush=True)

    def _reconsider_best(self, cursor: Cursor) -> None:
        """The best validation so far, where the metric or the protocol that chooses it has changed."""
        metric, protocol = selection_metric(self.config), family_of(self.config).protocol_of(self.config)
        now = {"metric": metric, **protocol}
        before = {key: cursor.best.get(key) for key in now}
        if not cursor.best or before == now:
            return
        rows = [r for r in self.folder.read_metrics() if all(r.get(key) == protocol[key] for key in protocol)]
        best, so_far = best_validation(rows, metric), validations(rows, metric)
        cursor.best = {} if best is None else best_of(best, metric)
        cursor.stale = 0 if best is None else len(so_far) - 1 - so_far.index(best)
        cursor.finished = False  # or nothing would be saved where nothing is left to train
        changed = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key])
        found = f"the best of them is epoch {best['epoch'] + 1}" if best else "none so far can be compared"
        print(f"validations are judged otherwise than before ({changed}): {found}", flush=True)

    def _train_and_follow(self, parts: Parts, cursor: Cursor) -> RunResult:
        """Train on what there is; with ``data.follow`` also on what is appended to it meanwhile and afterwards."""
        config = self.config
        self.watch.attach(self.folder, digest_of(config))
        result = self._train(parts, cursor)
        while config.data.follow is not None and result.finished and cursor.step != config.train.max_steps:
            self.watch.at("waiting for newer actions", cursor.step)
            if not self._newer(config.data.follow, parts.data.dataset):
                break
            del parts
            parts, cursor = self._opened()
            result = self._train(parts, cursor)
        return result

    def _train(self, parts: Parts, cursor: Cursor) -> RunResult:
        config, folder, processes = self.config, self.folder, self.processes
        if processes.is_main and (said := missing_operators(processes.device.type)):
            log.warning(said)
        if processes.is_main and (plans := plans_of(parts.model.tables.values())):
            Console().print(shown(plans))
        trainer = Trainer(config, parts, processes, folder, cursor, self.on_step, self.watch)
        finished = trainer.train()
        self.watch.at("ending", cursor.step)
        rows = folder.read_metrics() if processes.is_main else []
        if processes.is_main and config.log.plots:
            try:
                plot_run(folder, trainer.shown)
            except Exception as error:  # a picture can never fail a run
                log.warning("no plot of '%s' (%s)", folder.path, error)
        folder.push()
        return RunResult(folder.path, rows, finished, trainer.selection, trainer.shown, config.model.name)

    def _newer(self, follow: FollowSection, dataset: SequenceDataset) -> bool:
        """Wait until the dataset has grown; False where a signal came first, or nothing did."""
        processes, begun = self.processes, time.monotonic()
        if processes.is_main:
            print(f"waiting for newer actions in '{dataset.path}'", flush=True)
        with StopSignal() as signal:
            while True:
                newest = processes.together(
                    lambda: read_manifest(dataset.folder).generation if processes.is_main else None
                )
                waited = time.monotonic() - begun
                state = (newest != dataset.manifest.generation, waited >= follow.give_up)
                grown, gave_up = processes.broadcast(state)  # the main process's
                (stopped,) = processes.world.maximum([int(bool(signal.received))])
                if grown or gave_up or stopped:
                    return grown and not stopped
                until = time.monotonic() + min(follow.every, follow.give_up)
                while not signal.received and time.monotonic() < until:
                    time.sleep(0.1)
