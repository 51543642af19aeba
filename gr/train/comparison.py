"""A trained run beside baselines on a held-out split, in one process or several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gr import config as configs
from gr.config import RunConfig
from gr.data.outputs import output_file
from gr.errors import UserError
from gr.eval.evaluator import EvalResult
from gr.progress import Progress, default_progress
from gr.train.evaluation import baseline_kind
from gr.train.job import running
from gr.train.runs import config_of, open_run
from gr.train.selection import judged_by
from gr.train.watch import watching


@dataclass(frozen=True)
class Comparison:
    """``results``: baselines first, then the run under its encoder's name, ``model``.  dim: it was scored by so many
    first numbers of vectors; None: by all."""

    run: str
    split: str
    model: str
    step: int
    epoch: int
    results: dict[str, EvalResult]
    is_main: bool
    dim: int | None = None


def compare(
    run: str,
    split: str = "test",
    baselines: Sequence[str] = (),
    overrides: Sequence[str] = (),
    checkpoint: str = "last",
    output: str | None = None,
    data_path: str | None = None,
    dim: int | None = None,
) -> Comparison:
    """Evaluate; every process of the group calls this, and all get the results.

    run: a run's folder, or an export.  overrides: changes to its config, of ``eval`` and train.timeout.  output: a
    file to be written afterwards, checked before the work.  data_path: where the dataset is, if not where the config
    says.  dim: score by so many first numbers of vectors.  Raises UserError.
    """
    config = _config(run, data_path, baselines, overrides, output)
    model = getattr(config.model, "encoder", getattr(config.model, "network", config.model)).name
    results: dict[str, EvalResult] = {}
    with running(config) as joined, watching(joined) as watch:
        opened = joined.together(lambda: open_run(run, checkpoint, joined, data_path, dim))
        data = opened.data
        evaluation = opened.evaluation(joined, config)
        data.catalogue.count_once(joined)
        requests = joined.together(lambda: evaluation.requests(split))
        progress = default_progress() if joined.is_main else Progress()
        for name in [*baselines, model]:
            watch.at(f"evaluation of {name}", opened.step)
            scorer = opened.model if name == model else joined.together(partial(evaluation.baseline, name))
            with progress.stage(name, requests.share, evaluation.judged) as stage:
                results[name] = evaluation.run(split, scorer, advance=stage.advance)
        return Comparison(run, split, model, opened.step, opened.epoch, results, joined.is_main, dim)


def to_json(done: Comparison) -> str:
    """Everything of a comparison, buckets included, as JSON: figures, the rule behind them, kinds of targets."""
    rows = {
        name: {**result.row(), "notes": result.notes, "buckets": result.buckets}
        for name, result in done.results.items()
    }
    of = {"run": done.run, "step": done.step, "epoch": done.epoch}
    content = {**of, **({} if done.dim is None else {"dim": done.dim}), "results": rows}
    return json.dumps(content, indent=1) + "\n"


def _config(
    run: str, data_path: str | None, baselines: Sequence[str], overrides: Sequence[str], output: str | None
) -> RunConfig:
    """The run's config with its overrides; refuses what can be known before the work."""
    try:
        config = configs.override(config_of(run, data_path), overrides)
        for key, why in config.idle().items():
            if any(override.partition("=")[0] == key for override in overrides):
                raise UserError(f"'{key}' has no effect on run '{run}' ({why}): leave it out")
        for name in baselines:
            baseline_kind(name, judged_by(config))
        if output is not None:
            output_file(output)
    except UserError as error:
        error.everywhere = True  # every process reads the same
        raise
    return config
