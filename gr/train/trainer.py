"""Trainer: epochs of steps, evaluations and checkpoints; every number it makes is a function of config, data, seed.

A step: cut the rank's share into micro-batches (and these, where processes share sequences, into its part of them);
count the targets of the global batch; forward and backward each micro-batch with loss = sum over targets / global
count; clip; move the parameters.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, NoReturn

import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.config import RunConfig
from gr.data.batches import GlobalBatch
from gr.errors import UserError
from gr.eval.evaluator import EvalResult
from gr.models.model import Supervised
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train import checkpoint
from gr.train.cursor import Cursor
from gr.train.folder import RunFolder
from gr.train.frozen import noted
from gr.train.host_copy import HostCopy
from gr.train.log import MetricsLog, StepProgress
from gr.train.memory import give_back_freed_memory, peak_bytes
from gr.train.numerics import seed_generators
from gr.train.parts import Parts
from gr.train.schedule import rate_factor
from gr.train.selection import best_of, better, comparable, family_of, selection_metric
from gr.train.stopping import StopSignal
from gr.train.watch import Watch
from gr.train.work import PFLOP_DAY, Done, Work, said
from gr.train.writer import CheckpointWriter
from gr_kernels.counter_random import derive_key

log = logging.getLogger(__name__)

TRIM_STEPS = 100  # about 1 % of a small model's time


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        processes: Processes,
        folder: RunFolder,
        cursor: Cursor,
        on_step: Callable[[RunFolder], None] = lambda folder: None,
        watch: Watch | None = None,
    ):
        self.config, self.processes, self.folder, self.cursor = config, processes, folder, cursor
        self.model, self.engine = parts.model, parts.engine
        self.batches, self.evaluation = parts.batches, parts.evaluation
        self.selection, self.shown = selection_metric(config), family_of(config).shown_of(config)
        self._noted: set[str] = set()
        self.on_step, self.watch = on_step, watch
        self.one_pass = parts.batches.epochs is not None
        self.epochs = config.train.epochs if parts.batches.epochs is None else parts.batches.epochs
        self.total_steps = sum(map(parts.batches.in_epoch, range(self.epochs)))
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        self.metrics = processes.together(
            lambda: MetricsLog(
                *(folder, config.log.tensorboard, processes.is_main, cursor.step, config.log.prometheus)
            )
        )
        self.progress = StepProgress(self.total_steps, cursor.step, processes.is_main)
        self.work = Work(parts.model, config, processes)
        self.writer = CheckpointWriter(folder, config, processes, self.progress.say, noted(parts.model))
        self.last_loss = float("nan")
        self._unchecked: tuple[HostCopy, GlobalBatch] | None = None
        self._spent_before: float | None = None
        """Seconds that steps had taken when this epoch began; None where this process went on in its middle."""

    def train(self) -> bool:
        """Train to the end of the config, or until told to stop; True if finished.  The state is saved either way."""
        cursor = self.cursor
        try:
            if cursor.finished:
                return True
            with (
                StopSignal() as signal,
                self.writer,
                self.batches.opened(self.processes),
                closing(self._remaining()) as remaining,
            ):
                if cursor.metrics_rows == 0 and not self.one_pass:
                    with self.progress.pause():
                        self.run_baselines()
                stop = False
                for batch in self.progress.waits.timed(remaining):
                    if batch.index == 0:
                        self._spent_before = self.progress.waits.spent - self.progress.waits.last
                    if self._asked_first(batch):
                        with self.progress.pause():
                            self.run_baselines()
                            self.run_evaluations()
                    stop = self.step(batch, stop=bool(signal.received))
                    epoch_ends = batch.index + 1 == self.batches.in_epoch(cursor.epoch)
                    if epoch_ends:
                        self._log_epoch()
                    if self._evaluation_due(epoch_ends):
                        with self.progress.pause():
                            self.run_evaluations()
                    if epoch_ends:
                        cursor.next_epoch()
                    cursor.finished = self._finished()
                    if stop or self._checkpoint_due(epoch_ends):
                        with self.progress.pause():
                            self.save()
                    if stop:
                        break
                self._say_bound()
                if stop:
                    return cursor.finished
                if not cursor.finished:  # there was nothing to do
                    if self.processes.is_main:
                        waits = " yet: the last period waits for later actions (data.split.last)"
                        print(f"nothing is left to train on{waits if self.one_pass else ''}", flush=True)
                    cursor.finished = True
                    self.save()
            return True
        finally:
            self.progress.close()
            self.metrics.close()

    def step(self, batch: GlobalBatch, stop: bool = False) -> bool:
        """One optimiser step on a global batch; True if any rank was asked to stop."""
        started = time.perf_counter()
        config, cursor = self.config.train, self.cursor
        self._at("training", cursor.step + 1)
        key = derive_key(config.seed, "step", cursor.step)
        dropout_key = derive_key(config.seed, "dropout", cursor.step, self.processes.data.rank)
        seed_generators(self.processes.device, dropout_key)

        share, restarted = self.model.learn(batch.share, cursor.step)
        self.engine.restart(restarted)
        share = share.to(self.processes.device)
        micro_batches = self._supervised(share, key)
        own = sum(supervised.count for supervised in micro_batches)
        targets, stops, *sums = self._agree([own, int(stop), *self.work.own(share.lengths, own)])
        context = StepContext(key, self._candidates(micro_batches), number=cursor.step)
        loss = self.engine.forward_backward(micro_batches, context, targets)
        done = self.work.done(sums, targets)
        norm = self.engine.step(rate_factor(self.config.schedule, cursor.step, self.total_steps))
        self._unchecked = (loss, batch)
        cursor.advance(batch.digest)
        cursor.flops, cursor.tokens = cursor.flops + done.flops, cursor.tokens + done.tokens
        if self.engine.skipped:  # everybody's did
            self._stop_broken("update")

        if self._due(self.config.log.every_steps) or cursor.step == 1:
            self._log(loss, norm, batch, targets, done, time.perf_counter() - started)
        self.progress.waits.spent += time.perf_counter() - started
        self.progress.update(
            *(cursor.epoch, self.epochs, cursor.step, self.last_loss, batch.samples, targets),
            done=done,
            status=self._rates_said,
        )
        if self._due(TRIM_STEPS):
            give_back_freed_memory()
        self.writer.poll()
        self.on_step(self.folder)
        self._at("reading")
        return bool(stops)

    def run_evaluations(self) -> None:
        self._at("evaluation")
        self._check_finite()
        evaluation = self.evaluation.at(self.cursor.epoch)
        watched: dict[str, float] = {}
        if not self.config.eval.splits:
            self._watched()
        for number, split in enumerate(self.config.eval.splits):
            result = evaluation.run(split, self.model)
            if not number:  # not before: an evaluation forms the rows of all items, where a tower forms them
                watched = self._watched()
            row = {"kind": "eval", "epoch": self.cursor.epoch, "step": self.cursor.step}
            row |= evaluation.split.describe() | result.row() | watched
            self.cursor.metrics_rows += self.metrics.write(row)
            self._say(row, result)
            if split == "valid":
                self._compare_with_best(row)

    def _watched(self) -> dict[str, float]:
        """The model's figures about itself, for the log; warns where they are bad."""
        figures, said = self.model.watched()
        if said is not None and self.processes.is_main:
            log.warning(said)
        return figures

    def run_baselines(self) -> None:
        """What needs no training, on the same requests: the figures to beat (and the oracle's, not to be beaten)."""
        self._at("baselines")
        evaluation = self.evaluation.at(self.cursor.epoch)
        for split in self.config.eval.splits:
            for name, result in evaluation.baselines(split).items():
                row = {"kind": "baseline", "name": name, "epoch": self.cursor.epoch, "step": self.cursor.step}
                row |= evaluation.split.describe() | result.row()
                self.cursor.metrics_rows += self.metrics.write(row)
                self._say(row, result)

    def save(self) -> None:
        """Publish a checkpoint of this moment."""
        self._at("writing a checkpoint")
        self._check_finite()
        self.writer.save(self.engine, self.cursor)

    # ----------------------------------------------------------------------------------------------------------

    def _at(self, phase: str, step: int | None = None) -> None:
        """Tell the watch which phase begins, so that it can name what this process was doing if it hangs."""
        if self.watch is not None:
            self.watch.at(phase, self.cursor.step if step is None else step)

    def _remaining(self) -> Generator[GlobalBatch]:
        """The global batches from the cursor on."""
        cursor = self.cursor
        while not self._finished():
            epoch = cursor.epoch
            if not self.batches.in_epoch(epoch):  # a period in which nothing happened
                cursor.next_epoch()
                continue
            for batch in self.batches.epoch(epoch, cursor.batch):
                yield batch
                if self._finished() or cursor.epoch != epoch:
                    break

    def _finished(self) -> bool:
        stopping = self.config.train.early_stopping
        return (
            self.cursor.epoch >= self.epochs
            or self.cursor.step >= self.total_steps
            or (stopping is not None and self.cursor.stale >= stopping.patience)
        )

    def _asked_first(self, batch: GlobalBatch) -> bool:
        """Whether a period is evaluated now, before it is trained on: a run that goes through the log once has no other
        moment at which the period is unseen."""
        return self.one_pass and batch.index == 0 and self.cursor.epoch % self.config.eval.every_epochs == 0

    def _evaluation_due(self, epoch_ends: bool) -> bool:
        return not self.one_pass and (
            (epoch_ends and (self.cursor.epoch + 1) % self.config.eval.every_epochs == 0)
            or self._due(self.config.eval.every_steps)
            or self.cursor.step >= self.total_steps
        )

    def _checkpoint_due(self, epoch_ended: bool) -> bool:
        """At the intervals of the config, at the end, and where the best one so far is."""
        return (
            (epoch_ended and self.cursor.epoch % self.config.checkpoint.every_epochs == 0)
            or self._due(self.config.checkpoint.every_steps)
            or self.cursor.best.get("step") == self.cursor.step
            or self.cursor.finished
        )

    def _due(self, every: int | None) -> bool:
        return every is not None and self.cursor.step % every == 0

    def _supervised(self, share: SequenceBatch, key: int) -> list[Supervised]:
        """This process's micro-batches with their targets, as far as their rows are this process's where several
        processes share each sequence."""
        rank, context = self.processes.data.rank, self.processes.context
        return [
            self.model.supervise(micro_batch, key, derive_key(key, "dropout", rank, number)).part_of(context)
            for number, micro_batch in enumerate(self._micro_batches(share))
        ]

    def _micro_batches(self, share: SequenceBatch) -> list[SequenceBatch]:
        """The share, cut.  Where a model or an engine exchanges something in every micro-batch, all processes get the
        same number of them, the last ones perhaps empty."""
        parts = share.split(self.config.train.micro_batch_actions * self.processes.context.size)
        if self.model.collective or self.engine.collective:
            (most,) = self.processes.world.maximum([len(parts)])
            parts += [share.slice(0, 0)] * (most - len(parts))
        return parts

    def _agree(self, values: list[int]) -> list[int]:
        """Sums over ranks (targets, stop requests, work); raises if any rank's previous loss was broken, or a
        checkpoint could not be written."""
        unwritten = int(self.writer.failed)
        *sums, broken, unwritten = self._sum([*values, int(self._is_broken()), unwritten])
        if broken:
            self._stop_broken("loss")
        if unwritten:
            self.writer.wait()
        return sums

    def _candidates(self, micro_batches: list[Supervised]) -> Tensor | None:
        """(G,) int64: the targets of the whole global batch, for models that take them as candidates."""
        if not self.model.needs_global_targets:
            return None
        return self.processes.world.gather(torch.cat([each.targets_S for each in micro_batches]))

    def _log(
        self,
        loss: HostCopy,
        norm: Tensor | None,
        batch: GlobalBatch,
        targets: int,
        done: Done,
        seconds: float,
    ):
        (total,) = self.processes.world.sum([loss.item()])
        if not math.isfinite(total):
            self._stop_broken("loss")
        self.last_loss = total / max(targets, 1)
        cursor = self.cursor
        row: dict[str, Any] = {
            "kind": "train",
            "epoch": cursor.epoch,
            "step": cursor.step,
            "loss": self.last_loss,
            "lr": self.engine.rate,
            "samples": batch.samples,
            "targets": targets,
            "tokens": done.tokens,
            "flops": done.flops,
            "pflop_days": cursor.flops / PFLOP_DAY,
            "data_digest": cursor.data_digest,
        }
        if norm is not None:
            row["grad_norm"] = norm.item()
        row |= self._vocabularies()
        cursor.metrics_rows += self.metrics.write(row)
        if self.watch is not None:
            self.watch.note(
                f"step {cursor.step}: {seconds:.4f} s, {self.progress.waits.last:.4f} s of waiting for it"
            )
        window = self.progress.window
        self.metrics.write_timing(
            {
                "step": cursor.step,
                "step_s": round(seconds, 5),
                "wait_s": round(self.progress.waits.last, 5),
                "samples_per_s": round(window.samples_per_s, 1),
                "tokens_per_s": round(window.actions_per_s, 1),
                **self.work.rates(window.flops_per_s, window.padded_per_s),
            }
        )

    def _rates_said(self) -> str:
        window = self.progress.window
        return said(self.work.rates(window.flops_per_s, window.padded_per_s), self.cursor.flops)

    def _log_epoch(self) -> None:
        """Write the digest of all global batches so far, which is equal for two runs that saw the same batches in the
        same order, and what the epoch cost: seconds of its steps, the process's peak memory, how many numbers train."""
        cursor = self.cursor
        row = {"kind": "epoch", "epoch": cursor.epoch, "step": cursor.step, "data_digest": cursor.data_digest}
        cursor.metrics_rows += self.metrics.write(row)
        if self._spent_before is not None:
            costs = {
                "epoch_s": round(self.progress.waits.spent - self._spent_before, 3),
                "peak_mib": round(peak_bytes(self.processes.device) / 2**20, 1),
                "trained": self.engine.trained,
            }
            self.metrics.write_timing({"step": cursor.step, "epoch": cursor.epoch, **costs})
        self.progress.say(f"epoch {cursor.epoch + 1:<4}  order digest {cursor.data_digest}")

    def _say_bound(self) -> None:
        if self.progress.waits.batches:
            self.progress.say(self.progress.waits.summary(self.processes))

    def _vocabularies(self) -> dict[str, Any]:
        """For each vocabulary, the share of this step's ids without a row of their own, and how many ids have been
        given a row (admitted) and have lost it (evicted) so far; for other tables that take unknown values, that share
        alone."""
        row: dict[str, Any] = {}
        for name, shares in self.model.unseen().items():
            unseen, asked = self._sum([*shares])
            row[f"unseen/{name}"] = unseen / max(asked, 1)
        for name, vocabulary in self.model.vocabularies.items():
            counts = [vocabulary.unseen, vocabulary.asked, *vocabulary.totals()]
            unseen, asked, admitted, evicted = self._sum(counts)
            row |= {
                f"unseen/{name}": unseen / max(asked, 1),
                f"admitted/{name}": admitted,
                f"evicted/{name}": evicted,
            }
        return row

    def _sum(self, counts: list[int]) -> list[int]:
        """Over all processes of the run.  Decisions hang on these sums, and sums over the data or context axis alone
        could let two processes decide differently."""
        return self.processes.world.sum(counts, dtype=torch.int64)

    def _say(self, row: dict[str, Any], result: EvalResult) -> None:
        self.progress.say(summary(row, self.shown, result.judged))
        for note in result.notes:
            if (said := f"{row['split']}: {note}") not in self._noted:  # every evaluation would repeat it
                self._noted.add(said)
                self.progress.say(said)

    def _compare_with_best(self, row: dict[str, Any]) -> None:
        best, metric = self.cursor.best, self.selection
        if metric not in row:
            if self.config.train.early_stopping is None:
                return
            raise UserError(
                f"train.early_stopping looks at {metric}, and the labels of split 'valid' have none (all are the same, "
                "or none is known): choose another metric, or stop by train.epochs",
                everywhere=True,
            )
        if not comparable(best, row, metric) or better(metric, row[metric], best["value"]):
            self.cursor.best, self.cursor.stale = best_of(row, metric), 0
        else:
            self.cursor.stale += 1

    # The flag of a step is read with the next step's counts, or before anything is published: no waiting on the
    # device inside a step.

    def _is_broken(self) -> bool:
        return self._unchecked is not None and not math.isfinite(self._unchecked[0].item())

    def _check_finite(self) -> None:
        """The last loss, and the parameters that its gradients moved: a finite loss may have broken gradients."""
        if self._unchecked is None:
            return
        flags = [int(self._is_broken()), int(not self.engine.finite())]
        loss_broken, parameters_broken = self._sum(flags)
        if loss_broken or parameters_broken:
            self._stop_broken("loss" if loss_broken else "update")
        self._unchecked = None

    def _stop_broken(self, what: str) -> NoReturn:
        assert self._unchecked is not None
        _, batch = self._unchecked
        name = f"nonfinite-step-{self.cursor.step:08d}-rank"
        ids = {
            "step": self.cursor.step,
            "epoch": self.cursor.epoch,
            "ordinals": batch.share.ordinals_B.tolist(),
        }
        self.folder.write(f"{name}-{self.processes.world.rank}.json", json.dumps(ids))
        self.writer.join()
        self.processes.barrier()
        good = checkpoint.newest(self.folder.checkpoints)
        raise UserError(
            f"the {what} of step {self.cursor.step} is not finite: its samples are in "
            f"'{self.folder.path / name}-*.json', the last good checkpoint is "
            f"{good or 'none'}; lower optimizer.lr, set train.clip_norm, or look at the samples",
            everywhere=True,
        )


def summary(row: dict[str, Any], shown: list[str], judged: str) -> str:
    """An evaluation in one line: its metrics ``shown``, over how many ``judged`` (EvalResult)."""
    figures = [f"{name} {row[name]:.4f}" for name in shown if name in row]
    who = row["name"] if row["kind"] == "baseline" else row.get("period", f"epoch {row['epoch'] + 1}")
    return f"{who:<10}  {row['split']:<5} {'  '.join(figures)}  ({row['users']:,} {judged})"
