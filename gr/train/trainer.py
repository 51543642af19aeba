"""Trainer: epochs of steps, evaluations and checkpoints; every number it makes is a function of config, data, seed.

A step: cut the rank's share into micro-batches; count the targets of the global batch; forward and backward each
micro-batch with loss = sum over targets / global count; clip; move the parameters.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from gr.config import RunConfig, to_dict
from gr.data.batches import Batches, GlobalBatch
from gr.errors import UserError
from gr.models.recommender import Recommender
from gr.models.step import StepContext
from gr.models.tasks import Supervision
from gr.processes import Parallel
from gr.train import checkpoint
from gr.train.cursor import Cursor
from gr.train.evaluation import Evaluation
from gr.train.folder import RunFolder
from gr.train.host_copy import HostCopy
from gr.train.log import MetricsLog, StepProgress
from gr.train.memory import give_back_freed_memory
from gr.train.optimizers import set_rate
from gr.train.schedule import rate_factor
from gr.train.selection import selection_metric
from gr.train.stopping import StopSignal
from gr_kernels.counter_random import derive_key

TRIM_STEPS = 100  # about 1 % of a small model's time


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        model: Recommender,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        evaluation: Evaluation,
        parallel: Parallel,
        folder: RunFolder,
        cursor: Cursor,
        on_step: Callable[[RunFolder], None] = lambda folder: None,
    ):
        self.config, self.model, self.optimizer, self.batches = config, model, optimizer, batches
        self.evaluation, self.parallel, self.folder, self.cursor = evaluation, parallel, folder, cursor
        self.on_step = on_step
        self.wrapped = parallel.wrap(model)
        self.total_steps = config.train.epochs * batches.per_epoch
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        self.metrics = MetricsLog(folder, config.log.tensorboard, parallel.is_main, cursor.step)
        self.progress = StepProgress(self.total_steps, cursor.step, parallel.is_main)
        self.last_loss = float("nan")
        self._unchecked: tuple[HostCopy, GlobalBatch] | None = None

    def train(self) -> bool:
        """Train to the end of the config, or until told to stop; True if finished.  The state is saved either way."""
        cursor = self.cursor
        try:
            if cursor.finished:
                return True
            with StopSignal() as signal:
                if cursor.metrics_rows == 0:
                    self.run_baselines()
                for batch in self._remaining():
                    stop = self.step(batch, stop=bool(signal.received))
                    epoch_ends = batch.index + 1 == self.batches.per_epoch
                    if self._evaluation_due(epoch_ends):
                        self.run_evaluations()
                    if epoch_ends:
                        cursor.next_epoch()
                    cursor.finished = self._finished()
                    if stop or self._checkpoint_due(epoch_ends):
                        self.save()
                    if stop:
                        return cursor.finished
            if not cursor.finished:  # there was nothing to do
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
        key = derive_key(config.seed, "step", cursor.step)
        torch.manual_seed(derive_key(config.seed, "dropout", cursor.step, self.parallel.rank))

        share = batch.share.to(self.parallel.device)
        parts = [
            self.model.supervise(part, key, derive_key(key, "dropout", self.parallel.rank, number))
            for number, part in enumerate(share.split(config.micro_batch_actions))
        ]
        targets, stops = self._agree([sum(part.count for part in parts), int(stop)])
        loss = self._forward_backward(parts, StepContext(key, self._candidates(parts)), targets)

        norm = None
        if config.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        rate = set_rate(self.optimizer, rate_factor(self.config.schedule, cursor.step, self.total_steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._unchecked = (loss, batch)
        cursor.advance(batch.digest)

        if self._due(self.config.log.every_steps) or cursor.step == 1:
            self._log(loss, norm, rate, batch, targets, time.perf_counter() - started)
        self.progress.update(cursor.epoch, config.epochs, cursor.step, self.last_loss, batch.samples, targets)
        if self._due(TRIM_STEPS):
            give_back_freed_memory()
        self.on_step(self.folder)
        return bool(stops)

    def run_evaluations(self) -> None:
        self._check_finite()
        for split in self.config.eval.splits:
            result = self.evaluation.run(split, self.model)
            row = {"kind": "eval", "epoch": self.cursor.epoch, "step": self.cursor.step, **result.row()}
            self.cursor.metrics_rows += self.metrics.write(row)
            self.progress.say(summary(row))
            if split == "valid":
                self._compare_with_best(row)

    def run_baselines(self) -> None:
        """What needs no training, on the same requests: the figures to beat (and the oracle's, not to be beaten)."""
        for split in self.config.eval.splits:
            for name, result in self.evaluation.baselines(split).items():
                row = {"kind": "baseline", "name": name, "epoch": 0, "step": 0, **result.row()}
                self.cursor.metrics_rows += self.metrics.write(row)
                self.progress.say(summary(row))

    def save(self) -> None:
        """Publish a checkpoint of this moment."""
        self._check_finite()
        folder, cursor = self.folder.checkpoints, self.cursor
        if self.parallel.is_main:
            self.folder.sync_metrics()
        checkpoint.save(folder, self.model, self.optimizer, cursor, to_dict(self.config), self.parallel)
        if self.parallel.is_main:
            best = cursor.best.get("step")
            checkpoint.prune(
                folder, self.config.checkpoint.keep, cursor.step, None if best is None else int(best)
            )

    # ----------------------------------------------------------------------------------------------------------

    def _remaining(self) -> Iterator[GlobalBatch]:
        """The global batches from the cursor on."""
        cursor = self.cursor
        while not self._finished():
            epoch = cursor.epoch
            for batch in self.batches.epoch(epoch, cursor.batch):
                yield batch
                if self._finished() or cursor.epoch != epoch:
                    break

    def _finished(self) -> bool:
        stopping = self.config.train.early_stopping
        return (
            self.cursor.epoch >= self.config.train.epochs
            or self.cursor.step >= self.total_steps
            or (stopping is not None and self.cursor.stale >= stopping.patience)
        )

    def _evaluation_due(self, epoch_ends: bool) -> bool:
        return (
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

    def _agree(self, values: list[int]) -> tuple[int, int]:
        """Targets of the global batch and stop requests over ranks; raises if any rank's previous loss was broken."""
        targets, stops, broken = self.parallel.sum([*values, int(self._is_broken())], dtype=torch.int64)
        if broken:
            self._stop_broken("loss")
        return targets, stops

    def _candidates(self, parts: list[Supervision]) -> Tensor | None:
        if not self.model.objective.needs_global_targets:
            return None
        return self.parallel.gather(torch.cat([part.targets_S for part in parts]))

    def _forward_backward(self, parts: list[Supervision], context: StepContext, targets: int) -> HostCopy:
        """Gradients of the global mean loss; returns this rank's sum of losses, which never waits for them."""
        # DDP averages over ranks: times their number gives the sum that the contract asks for
        scale = self.parallel.ranks / max(targets, 1)
        total = torch.zeros((), device=self.parallel.device)
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            with self.parallel.accumulating(self.wrapped, last):
                with torch.autocast(
                    self.parallel.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"
                ):
                    loss = self.wrapped(part, context)
                total += loss.detach()
                if last:
                    copy = HostCopy(total)
                (loss * scale).backward()
        return copy

    def _log(
        self,
        loss: HostCopy,
        norm: Tensor | None,
        rate: float,
        batch: GlobalBatch,
        targets: int,
        seconds: float,
    ):
        (total,) = self.parallel.sum([loss.item()])
        if not math.isfinite(total):
            self._stop_broken("loss")
        self.last_loss = total / max(targets, 1)
        cursor = self.cursor
        row: dict[str, Any] = {
            "kind": "train",
            "epoch": cursor.epoch,
            "step": cursor.step,
            "loss": self.last_loss,
            "lr": rate,
            "samples": batch.samples,
            "targets": targets,
            "data_digest": cursor.data_digest,
        }
        if norm is not None:
            row["grad_norm"] = norm.item()
        cursor.metrics_rows += self.metrics.write(row)
        window = self.progress.window
        self.metrics.write_timing(
            {
                "step": cursor.step,
                "step_s": round(seconds, 5),
                "samples_per_s": round(window.samples_per_s, 1),
                "tokens_per_s": round(window.actions_per_s, 1),
            }
        )

    def _compare_with_best(self, row: dict[str, Any]) -> None:
        metric = selection_metric(self.config)
        if not self.cursor.best or row[metric] > self.cursor.best["value"]:
            self.cursor.best = {"epoch": row["epoch"], "step": row["step"], "value": row[metric]}
            self.cursor.stale = 0
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
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all()
        flags = [int(self._is_broken()), int(not finite)]
        loss_broken, parameters_broken = self.parallel.sum(flags, dtype=torch.int64)
        if loss_broken or parameters_broken:
            self._stop_broken("loss" if loss_broken else "update")
        self._unchecked = None

    def _stop_broken(self, what: str) -> NoReturn:
        assert self._unchecked is not None
        _, batch = self._unchecked
        file = self.folder.path / f"nonfinite-step-{self.cursor.step:08d}-rank-{self.parallel.rank}.json"
        ids = {
            "step": self.cursor.step,
            "epoch": self.cursor.epoch,
            "ordinals": batch.share.ordinals_B.tolist(),
        }
        file.write_text(json.dumps(ids))
        self.parallel.barrier()
        good = checkpoint.newest(self.folder.checkpoints)
        raise UserError(
            f"the {what} of step {self.cursor.step} is not finite: its samples are in "
            f"'{file.with_name(file.name.rpartition('-')[0])}-*.json', the last good checkpoint is "
            f"{good or 'none'}; lower optimizer.lr, set train.clip_norm, or look at the samples",
            everywhere=True,
        )


def summary(row: dict[str, Any]) -> str:
    """An evaluation in one line."""
    shown = [
        f"{name} {row[name]:.4f}" for name in ("hr@10", "ndcg@10", "hr@50", "hr@200", "mrr") if name in row
    ]
    who = row["name"] if row["kind"] == "baseline" else f"epoch {row['epoch'] + 1}"
    return f"{who:<10}  {row['split']:<5} {'  '.join(shown)}  ({row['users']:,} users)"
