"""Runs beside each other on the same held-out users: hits, what they were worth, and paired differences.

A user's hit says whether the target is among the first k items.  On a generated stream its expectation is known too:
the probability, by the dataset's oracle, of the model's k first items.  Both have the same mean over streams, but the
expectation is free of the luck of the draw, which is most of the variance where a target is one of many equals.

Shapes: B sequences of a request, U users, R runs and the oracle, I catalogue size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gr.embeddings.ranks import ranks_in
from gr.errors import UserError
from gr.modes import evaluating
from gr.train.evaluation import Evaluation
from gr.train.runs import OpenRun, open_run

ORACLE = "oracle"


@dataclass(frozen=True)
class Mean:
    """A mean over users and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values_U: Tensor) -> Mean:
        return cls(float(values_U.mean()), float(values_U.std()) / math.sqrt(len(values_U)))


@dataclass(frozen=True)
class PairedRow:
    """A run's share of hits among ``users`` held-out ones, their expectation, and how far both are above the previous
    run's on the same users.  ``share``: of the oracle's expectation.  The oracle itself comes last."""

    name: str
    users: int
    hits: Mean
    expected: Mean
    share: float
    hits_above: Mean | None
    expected_above: Mean | None


def paired(runs: Mapping[str, str | Path], split: str = "test", k: int = 10) -> list[PairedRow]:
    """The runs in the folders ``runs`` and their stream's oracle, in the given order, in this process.

    Raises UserError unless all were trained on one dataset that has an oracle, and rank the whole catalogue.
    """
    opened = {name: open_run(folder) for name, folder in runs.items()}
    hits_RU, expected_RU = _hits(opened, split, k)
    rows = []
    for index, name in enumerate([*opened, ORACLE]):
        follows = 0 < index < len(opened)
        rows.append(
            PairedRow(
                name=name,
                users=hits_RU.shape[1],
                hits=Mean.of(hits_RU[index]),
                expected=Mean.of(expected_RU[index]),
                share=float(expected_RU[index].mean() / expected_RU[-1].mean()),
                hits_above=Mean.of(hits_RU[index] - hits_RU[index - 1]) if follows else None,
                expected_above=Mean.of(expected_RU[index] - expected_RU[index - 1]) if follows else None,
            )
        )
    return rows


def print_paired(rows: list[PairedRow], title: str) -> None:
    view = Table(title=title, title_justify="left")
    for column in (
        "model",
        "hits",
        "above the row before",
        "expected hits",
        "above the row before",
        "share of the oracle",
    ):
        view.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        view.add_row(
            row.name,
            *(_text(mean) for mean in (row.hits, row.hits_above, row.expected, row.expected_above)),
            f"{row.share:.1%}",
        )
    Console().print(view)


def _text(value: Mean | None) -> str:
    return "" if value is None else f"{value.mean:.4f} ±{value.error:.4f}"


def to_json(rows: list[PairedRow]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]


def _hits(opened: Mapping[str, OpenRun], split: str, k: int) -> tuple[Tensor, Tensor]:
    """(R, U) float64 each: hits and their expectation, the oracle's in the last row."""
    first = next(iter(opened.values()))
    for run in opened.values():
        if run.config.eval.exclude != "none":
            raise UserError(
                f"'{run.folder.path}' takes items out of the ranking (eval.exclude={run.config.eval.exclude}), and "
                "the oracle knows what the whole catalogue is worth: train with eval.exclude=none"
            )
        if run.data.dataset.manifest.fingerprint != first.data.dataset.manifest.fingerprint or (
            run.config.data.split != first.config.data.split
        ):
            raise UserError(
                f"'{run.folder.path}' and '{first.folder.path}' have different data or splits: compare runs of one"
            )
    evaluation = Evaluation(first.data.dataset, first.data.split, first.config, first.data.catalogue)
    oracle = evaluation.baseline(ORACLE)
    scorers = [*(run.model for run in opened.values()), oracle]
    hits: list[list[Tensor]] = [[] for _ in scorers]
    expected: list[list[Tensor]] = [[] for _ in scorers]
    for request in evaluation.requests(split):
        probability_BI = oracle.scores(request.batch).double()
        for scorer, hit, worth in zip(scorers, hits, expected, strict=True):
            with evaluating(scorer):
                scores_BI = scorer.scores(request.batch)
            if torch.isnan(scores_BI).any():
                raise UserError(
                    f"{type(scorer).__name__} scored items as NaN: the model has diverged, train it again"
                )
            hit.append((ranks_in(scores_BI, request.targets_B) <= k).double())
            worth.append(probability_BI.gather(1, scores_BI.topk(k).indices).sum(1))
    return torch.stack([torch.cat(h) for h in hits]), torch.stack([torch.cat(w) for w in expected])
