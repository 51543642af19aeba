"""Evaluation of a run: the dataset's held-out requests, a scorer and the evaluator, joined as the config says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor, distributed as dist, nn

from gr import registry
from gr.config import RunConfig
from gr.data.dataset import SequenceDataset
from gr.data.popularity import training_counts, training_sequences
from gr.data.requests import HeldOutRequests, requests
from gr.data.split import Split
from gr.errors import UserError
from gr.eval.evaluator import Advance, EvalResult, evaluate
from gr.eval.protocols import Scorer


class Evaluation:
    """Evaluates scorers on the held-out splits of a dataset, as often as wanted.

    Keeps what does not change between evaluations: which blocks hold targets, and the items' popularity.
    item_counts: (I,) training actions of each item; counted from the dataset when needed and not given.
    device: where modules score; other scorers work on the CPU.  The users are shared out over the ranks of the
    process group, where one is initialised.  columns: of actions that the scorers need beside ``item``; all of
    numbers without it.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        split: Split,
        config: RunConfig,
        *,
        device: torch.device | str = "cpu",
        item_counts: Tensor | None = None,
        columns: Iterable[str] | None = None,
    ):
        self.columns = columns
        self.dataset, self.split, self.config, self.device = dataset, split, config, device
        self._given_counts = item_counts
        self._requests: dict[str, HeldOutRequests] = {}

    def run(
        self,
        name: str,
        scorer: Scorer,
        *,
        advance: Advance | None = None,
    ) -> EvalResult:
        """Metrics of ``scorer`` on the held-out split ``name``, the same on every rank."""
        config = self.config.eval
        held_out = self.requests(name)
        result = evaluate(
            scorer,
            held_out,
            items=self.dataset.items,
            ks=config.ks,
            split=name,
            max_scores=config.max_scores,
            device=self.device if isinstance(scorer, nn.Module) else "cpu",
            item_counts=self.item_counts if config.buckets else None,
            buckets=config.buckets,
            population=lambda: held_out.population,
            advance=advance,
        )
        if not result.users:
            raise UserError(
                f"no user of '{self.dataset.path}' has a held-out action in split '{name}': "
                "take it out of eval.splits, or change data.split",
                everywhere=True,
            )
        return result

    def baselines(self, name: str, names: Sequence[str] | None = None) -> dict[str, EvalResult]:
        """Metrics of the baselines ``names`` (eval.baselines without it), each fitted to the training actions."""
        chosen = self.config.eval.baselines if names is None else names
        return {baseline: self.run(name, self.baseline(baseline)) for baseline in chosen}

    def baseline(self, name: str) -> Scorer:
        """The baseline ``name`` ready to score; it has seen training actions only.  It works on the CPU."""
        kind = registry.resolve(registry.BASELINES, name, "baseline (eval.baselines)")
        if not hasattr(kind, "fit"):  # knows the dataset's generator
            return kind(self.dataset)
        return kind().fit(training_sequences(self.dataset, self.split), self.dataset.items)

    def requests(self, name: str) -> HeldOutRequests:
        """This rank's requests of split ``name``."""
        if name not in self._requests:
            config = self.config.eval
            self._requests[name] = requests(
                self.dataset,
                self.split,
                name,
                max_length=self.config.data.max_length,
                exclude=config.exclude,
                batch=config.batch,
                rank=dist.get_rank() if dist.is_initialized() else 0,
                world=dist.get_world_size() if dist.is_initialized() else 1,
                max_users=config.max_users,
                columns=self.columns,
            )
        return self._requests[name]

    @cached_property
    def item_counts(self) -> Tensor:
        if self._given_counts is not None:
            return self._given_counts
        return torch.from_numpy(training_counts(self.dataset, self.split))
