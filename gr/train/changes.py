"""What of its config a run may change where it goes on, and what has to stay for its mathematics to go on too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gr import config as configs
from gr.config import FeatureSection, RunConfig
from gr.data.dataset import SequenceDataset
from gr.errors import UserError
from gr.train.preflight import flat

CHANGEABLE = (
    *("eval", "checkpoint", "log", "data.path", "data.prefetch", "data.ingest", "data.follow"),
    "data.expected",
    *("train.epochs", "train.max_steps", "train.early_stopping", "train.micro_batch_actions"),
    *("train.device", "train.threads", "train.kernels", "train.engine", "model.table"),
    *("train.context", "train.timeout", "train.activation_checkpointing", "model.input.features.*.table"),
    *("model.user.fields.*.table", "model.item.fields.*.table"),
    "model.item_tower.recompute",
    *("model.item_tower.text.encoder", "model.item_tower.image.encoder", "model.item_tower.image.images"),
    "model.item_tower.vectors",
    "train.start_from",
)
"""Keys that may change on resume: none of them changes the batches or the model's mathematics.

(But for ``train.epochs`` and ``train.max_steps`` where the learning rate falls towards the last step.)"""


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
    old, new = flat(configs.to_dict(one)), flat(configs.to_dict(other))
    keys = sorted(old.keys() | new.keys())
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def within(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of ``sections`` or lies in one; in their names * stands for any key."""
    words = key.split(".")
    return any(
        len(named) <= len(words) and all(name in ("*", word) for name, word in zip(named, words))
        for named in (section.split(".") for section in sections)
    )


def check_growing(config: RunConfig, dataset: SequenceDataset) -> None:
    """Refuse to go on with more data where something hangs on how much there is."""
    grown = f"'{dataset.path}' has grown since"
    if config.schedule.name != "constant":
        raise UserError(
            f"{grown}, and with schedule.name {config.schedule.name} the learning rate falls towards a last step, "
            "which the new actions move: start a new run, or use a constant rate from the beginning"
        )
    for name, feature in features_of(config).items():
        if feature.derived == "user":
            raise UserError(
                f"{grown}, and feature '{name}' has a row for each user by their number, which new users change: start "
                "a new run, with a vocabulary for user ids"
            )


def features_of(config: RunConfig) -> dict[str, FeatureSection]:
    """Of a model that reads sequences, or of both sides of one that reads impressions."""
    model: Any = config.model
    if hasattr(model, "input"):
        return model.input.features
    return {**model.user.fields, **model.item.fields}
