"""Which checkpoint is the best one: by a validation metric, never by the test split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gr import registry
from gr.config import RunConfig
from gr.errors import UserError, nearest
from gr.eval.family import MetricFamily

PROTOCOL = ("exclude", "of_users")
"""Keys of an evaluation's row beside which its figures mean something: others are not compared with it."""

LOWER_IS_BETTER = ("loss", "log_loss", "ne")


def judged_by(config: RunConfig) -> str:
    """The metric family of the config's model."""
    return config.model.component().judged_by  # type: ignore[attr-defined]


def family_of(config: RunConfig) -> type[MetricFamily]:
    """The class of that family."""
    return metric_family(judged_by(config))


def metric_family(name: str) -> type[MetricFamily]:
    """The class of the metric family ``name`` (gr.registry.METRICS)."""
    return registry.resolve(registry.METRICS, name, "metric family")


def metric_names(config: RunConfig) -> list[str]:
    """What an evaluation of the config's model gives."""
    return family_of(config).names_of(config)


def selection_metric(config: RunConfig) -> str:
    """The validation metric that chooses: early stopping's where it names one, or the first of the model's that is one
    of ndcg@10, mrr, auc."""
    if config.train.early_stopping is not None and config.train.early_stopping.metric is not None:
        return config.train.early_stopping.metric
    known = metric_names(config)
    preferred = [name for want in ("ndcg@10", "mrr", "auc") for name in known if name.split("/")[0] == want]
    return (preferred or known)[0]


def check_selection(config: RunConfig) -> None:
    """Refuse an early stopping that could never look at its metric."""
    if config.train.early_stopping is None:
        return
    if "valid" not in config.eval.splits:
        raise UserError(
            "train.early_stopping looks at split 'valid': add it to eval.splits, or stop by train.epochs"
        )
    metric, names = selection_metric(config), set(metric_names(config))
    if metric not in names:
        more = ", or add its k to eval.ks" if "@" in metric and judged_by(config) == "catalogue" else ""
        raise UserError(
            f"train.early_stopping.metric '{metric}' is not evaluated ({nearest(metric, names)}): change it{more}"
        )


def better(metric: str, one: float, other: float) -> bool:
    """Whether the value ``one`` of a metric is better than ``other``."""
    return one < other if falls(metric) else one > other


def falls(metric: str) -> bool:
    """Whether a metric is the better the lower."""
    return metric.split("/")[0] in LOWER_IS_BETTER


def validations(metrics: Iterable[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The rows of metrics.jsonl that validate by ``metric`` as the newest one of them does, in their order: rows
    under another protocol are other figures."""
    rows = [r for r in metrics if r["kind"] == "eval" and r["split"] == "valid" and metric in r]
    return [r for r in rows if all(r.get(key) == rows[-1].get(key) for key in PROTOCOL)]


def best_validation(metrics: Iterable[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The first row with the best validation ``metric``; None where nothing was validated."""
    best = None
    for row in validations(metrics, metric):
        if best is None or better(metric, row[metric], best[metric]):
            best = row
    return best


def best_of(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What a cursor keeps of its best validation: where it was, its value, and what that value means."""
    kept = {"epoch": row["epoch"], "step": row["step"], "value": row[metric], "metric": metric}
    return kept | {key: row[key] for key in PROTOCOL if key in row}


def comparable(best: Mapping[str, Any], row: Mapping[str, Any], metric: str) -> bool:
    """Whether a kept best value and an evaluation's row are figures of the same metric and protocol."""
    return best.get("metric") == metric and all(best.get(key) == row.get(key) for key in PROTOCOL)
