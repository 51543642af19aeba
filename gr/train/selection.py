"""Which checkpoint is the best one: by a validation metric, never by the test split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gr.config import RunConfig
from gr.errors import UserError, nearest


def selection_metric(config: RunConfig) -> str:
    """The validation metric that chooses: early stopping's, or ndcg@10 (mrr where no 10 is in eval.ks)."""
    if config.train.early_stopping is not None:
        return config.train.early_stopping.metric
    return "ndcg@10" if 10 in config.eval.ks else "mrr"


def check_selection(config: RunConfig) -> None:
    """Refuse an early stopping that could never look at its metric."""
    if config.train.early_stopping is None:
        return
    if "valid" not in config.eval.splits:
        raise UserError(
            "train.early_stopping looks at split 'valid': add it to eval.splits, or stop by train.epochs"
        )
    metric = selection_metric(config)
    names = {"mrr", *(f"{kind}@{k}" for kind in ("hr", "ndcg") for k in config.eval.ks)}
    if metric not in names:
        raise UserError(
            f"train.early_stopping.metric '{metric}' is not evaluated ({nearest(metric, names)}): "
            "change it, or add its k to eval.ks"
        )


def best_validation(metrics: Iterable[dict[str, Any]], metric: str = "ndcg@10") -> dict[str, Any] | None:
    """The first row of metrics.jsonl with the highest validation ``metric``; None where nothing was validated."""
    rows = [r for r in metrics if r["kind"] == "eval" and r["split"] == "valid"]
    return max(rows, key=lambda r: r[metric], default=None)
