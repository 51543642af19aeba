"""A run, typed.

A config is YAML: ``extends:`` names one or more files it builds on, dotted overrides (``train.epochs=3``) come
last, and the resolved whole is written into the run's folder.  Unknown and ill-typed keys are refused with the
nearest valid name.  Components (encoder, objective, optimiser ...) are chosen by ``name`` from the tables in
``gr.registry`` and bring their own typed ``Config``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gr import registry, yaml12
from gr.errors import UserError
from gr.extends import read_yaml
from gr.overlay import merge, overridden
from gr.sections import (
    COUNT,
    DISTINCT,
    FRACTION,
    POSITIVE,
    SEED,
    ComponentConfig,
    Section,
    component,
    idle_keys,
    validate,
)
from gr.shipped import find_config

__all__ = [
    "COUNT",
    "DISTINCT",
    "FRACTION",
    "POSITIVE",
    "SEED",
    "ComponentConfig",
    "Section",
    "component",
    "merge",
    "overridden",
    "read_yaml",
    "validate",
]  # what components and other readers of YAML need of gr.sections, gr.overlay and gr.extends

log = logging.getLogger(__name__)


def _folder_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(
            "a folder's name is needed, without slashes or a dot in front: use run.dir for a path"
        )
    return name


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) < 1 << 16 or (":" in host and not host.startswith("[")):
        raise ValueError("PORT or HOST:PORT is needed, a port below 65536")
    return text


class RunSection(Section):
    """Where the run is kept.  ``dir``: exactly this folder; without it ``runs/NAME``, numbered if it exists."""

    name: Annotated[str, AfterValidator(_folder_name)] = "run"
    dir: str | None = None


class FollowSection(Section):
    """Waiting for what is appended to the dataset while a run goes through it: looked for every so many seconds, until
    nothing new has come for ``give_up`` seconds."""

    every: POSITIVE = 60
    give_up: POSITIVE = 7200


class ExpectedSection(Section):
    """What the dataset is going to hold, for plans of a run whose data aren't there yet (launch/plan.py): training
    reads the dataset and looks at none of this.

    lengths: of its users' sequences, the shortest, the longest and evenly spaced quantiles between (three of them are
    the least, the median and the most).  columns: of actions beside the item; user_columns: of users; both hold
    integers.  types: how many kinds of actions there are."""

    items: POSITIVE
    users: POSITIVE
    lengths: Annotated[list[POSITIVE], Field(min_length=1)]
    columns: list[str] = ["time"]
    user_columns: list[str] = []
    types: COUNT = 0

    @model_validator(mode="after")
    def _ascending(self) -> ExpectedSection:
        if sorted(self.lengths) != self.lengths:
            raise ValueError("lengths are quantiles: give them from the shortest to the longest")
        return self


class DataSection(Section):
    """What is read.  ``max_length``: inputs kept of each sequence, the latest; its targets are as many.  transforms:
    which actions there are (filters), then what makes a training example of a sequence (samplers), in this order."""

    path: str
    max_length: POSITIVE = 200
    split: component(registry.SPLITS, "data.split", default="leave_one_out")
    transforms: list[component(registry.TRANSFORMS, "data.transforms")] = []
    order: Literal["shuffle", "stream"] = "shuffle"
    window_blocks: POSITIVE = 64
    tail: Literal["keep", "drop"] = "keep"
    prefetch: POSITIVE = 4
    follow: FollowSection | None = None
    expected: ExpectedSection | None = None
    ingest: component(registry.INGEST, "data.ingest") = Field(
        default_factory=lambda: {"name": "arrow"}, validate_default=True
    )

    def idle(self) -> dict[str, str]:
        ahead = getattr(self.ingest.component(), "reads_ahead", True)
        return {} if ahead else {"prefetch": f"data.ingest is {self.ingest.name}, which reads nothing ahead"}


class FeatureSection(Section):
    """A table of its own for something that is known of an action, a user or a request beside the item.

    column: a column of the dataset's actions or users that holds integers from 0 on, or any ids where there is a
    ``vocabulary``, which finds rows for them; one each, or lists.  catalogue, in its place: such a column of the
    dataset's items.  derived, in its place: ``user``,
    a row for each user of the dataset; ``hour_of_day`` or ``day_of_week`` (Monday is 0; both in UTC) of the action, or
    ``hour_of_request``, ``day_of_request`` of the moment for which the next action is predicted.
    of_request: whether such a column of actions is known when an action is predicted, as the page is on which its item
    is shown: then the action's own value is looked at, not the one before.
    rows: of the table, where the dataset doesn't say how many values there are; with a vocabulary, as many as it may
    fill.  unseen: what becomes of a value without a row, which stops the run or has one in common with all others such.
    number, in their place: the column's values are numbers, as they are (``plain``) or as sign(x) log(1 + |x|)
    (``log``), each of which is so many times one learned vector; what is unknown (NaN) is another.
    pooling: of the vectors of a list's values their mean (where nothing is said) or their sum; an empty list has
    zeros."""

    shorthand = "column"
    column: str | None = None
    catalogue: str | None = None
    derived: Literal["user", "hour_of_day", "day_of_week", "hour_of_request", "day_of_request"] | None = None
    of_request: bool = False
    rows: POSITIVE | None = None
    unseen: Literal["fail", "own_row"] = "fail"
    number: Literal["plain", "log"] | None = None
    pooling: Literal["mean", "sum"] | None = None
    table: component(registry.TABLES, "model.input.features.NAME.table", default="local")

    vocabulary: component(registry.VOCABULARIES, "model.input.features.NAME.vocabulary") | None = None

    @model_validator(mode="after")
    def _one_source(self) -> FeatureSection:
        if [self.column, self.catalogue, self.derived].count(None) != 2:
            raise ValueError(
                "give it one of column (of the dataset), catalogue (a column of its items) and derived"
            )
        if self.vocabulary is not None and (self.derived is not None or self.rows is None):
            raise ValueError("a vocabulary is for the ids of a column: give it that column, and rows to fill")
        if self.number is not None and (self.derived is not None or self.vocabulary is not None):
            raise ValueError(
                "number is for columns of numbers: what is derived, and ids of a vocabulary, are none"
            )
        if self.of_request and self.column is None:
            raise ValueError(
                "of_request is said of a column of actions: a catalogue's, and what is derived, know it"
            )
        return self

    def idle(self) -> dict[str, str]:
        if self.derived is not None:
            why = f"derived is {self.derived}, which"
            nothing = {"unseen": f"{why} has a row for each value"}
            return {"rows": f"{why} says how many", "pooling": f"{why} is one value each"} | nothing
        if self.number is not None:
            why = f"number is {self.number}, and a number has no row of its own"
            return dict.fromkeys(("rows", "unseen", "pooling"), why)
        if self.vocabulary is not None:
            return {"unseen": "a vocabulary has rows for those that it doesn't know"}
        return {}


FEATURE = Annotated[
    FeatureSection, BeforeValidator(lambda value: {"column": value} if isinstance(value, str) else value)
]


def _feature_names(features: dict[str, Any]) -> dict[str, Any]:
    if odd := [name for name in features if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise ValueError(f"{odd[0]!r} becomes the name of a table: use letters, digits, _ and - alone")
    if taken := {"items", "item_ids"}.intersection(features):
        raise ValueError(f"'{min(taken)}' is a table of the items: give the feature another name")
    return features


class InputSection(Section):
    """x = dropout(s (E[item] + sum over features of F[value]) + P[position]); s is sqrt(model.dim) with ``scale``,
    else 1.

    positions: how P starts: xavier_normal over the whole of P, truncated_normal with std 1/sqrt(model.dim), or
    normal with std model.table_std, as small as an item's row.  features: what has a table F of its own, by the
    table's name; of the action that is to be predicted nothing is used but what is known of its request."""

    scale: bool = True
    positions: Literal["none", "xavier_normal", "truncated_normal", "normal"] = "xavier_normal"
    extra_positions: COUNT = 0
    dropout: FRACTION = 0.2
    features: Annotated[dict[str, FEATURE], AfterValidator(_feature_names)] = {}

    def idle(self) -> dict[str, str]:
        return {"extra_positions": "positions is none"} if self.positions == "none" else {}


class SimilaritySection(Section):
    """score = <q, e> / temperature, both L2-normalised (eps as the divisor's floor) if asked for.  matryoshka: of how
    many first numbers of q and e the loss is formed as well as of all: vectors can be cut to these afterwards."""

    normalize: bool = True
    eps: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 0.05
    item_bias: bool = False
    matryoshka: Annotated[list[POSITIVE], DISTINCT] = []

    def idle(self) -> dict[str, str]:
        return {} if self.normalize else {"eps": "normalize is false"}


class ParameterGroup(Section):
    """Parameters whose name matches ``match`` (a regular expression, searched) train with these values instead."""

    match: str
    lr: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None

    def idle(self) -> dict[str, str]:
        own = self.lr is not None or self.weight_decay is not None
        return {} if own else {"match": "the group has neither an lr nor a weight_decay of its own"}


class ScheduleSection(Section):
    """Learning rate over steps: linear warm-up, then constant, cosine or linear to ``final_fraction`` of the rate."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: COUNT = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0

    def idle(self) -> dict[str, str]:
        return {"final_fraction": "schedule.name is constant"} if self.name == "constant" else {}


class EarlyStopping(Section):
    """Stop when ``metric`` of the validation split has not improved for ``patience`` evaluations; without a name it
    is the model's first of ndcg@10, mrr, auc."""

    metric: str | None = None
    patience: POSITIVE = 10


class StartFrom(Section):
    """Another run, or its export, whose weights a new run starts from, by name: all that this model has too but for
    tables with a row for each item, user or value, which are of that run's data.  checkpoint: last, best or a step."""

    shorthand = "run"
    run: str
    checkpoint: Annotated[str, BeforeValidator(lambda step: str(step) if type(step) is int else step)] = (
        "last"
    )


START_FROM = Annotated[
    StartFrom, BeforeValidator(lambda value: {"run": value} if isinstance(value, str) else value)
]


class TrainSection(Section):
    """``global_batch`` sequences a step over all processes; a process cuts its share into micro-batches of at most
    ``micro_batch_actions`` actions and accumulates: neither changes the loss but by rounding.

    context: how many processes share each sequence, and hold its rows between them; the others along the data axis
    have other sequences.

    activation_checkpointing: of each layer of the encoder only the input is kept, and the rest is formed again in the
    backward pass: less memory, about a third more time, the same losses.

    timeout: seconds that an exchange between processes may take: whoever waits longer ends, and says for whom."""

    epochs: POSITIVE = 1
    max_steps: POSITIVE | None = None
    seed: SEED = 1
    global_batch: POSITIVE = 128
    micro_batch_actions: POSITIVE = 65536
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: POSITIVE | None = None
    deterministic: bool = True
    kernels: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    engine: component(registry.ENGINES, "train.engine", default="ddp")
    context: POSITIVE = 1
    activation_checkpointing: bool = False
    timeout: POSITIVE = 600
    early_stopping: EarlyStopping | None = None
    start_from: START_FROM | None = None


class LogSection(Section):
    """``every_steps``: a train row in metrics.jsonl; ``tensorboard``: events too, when it is installed; ``plots``:
    pictures of the run at its end; ``prometheus``: PORT (of loopback) or HOST:PORT at which the newest figures are
    served as /metrics."""

    every_steps: POSITIVE = 50
    tensorboard: bool = True
    plots: bool = True
    prometheus: Annotated[str, AfterValidator(_address), BeforeValidator(_as_text)] | None = None


class EvalSection(Section):
    """Full-catalogue evaluation.  ``exclude``: items of the history taken out of the ranking: none, those the model
    was shown (``kept``), or all of the user's.  ``cold``: beside the figures of all, those of targets with fewer
    training actions than this (METRIC/cold), of targets with none (METRIC/new), and of the others (METRIC/warm)."""

    every_epochs: POSITIVE = 1
    every_steps: POSITIVE | None = None
    splits: Annotated[list[str], DISTINCT] = ["test"]
    ks: Annotated[list[POSITIVE], DISTINCT] = [1, 5, 10, 50, 200, 500]
    exclude: Literal["none", "kept", "all"] = "kept"
    batch: POSITIVE = 256
    max_scores: POSITIVE = 2**24
    max_users: POSITIVE | None = None
    buckets: bool = True
    cold: POSITIVE | None = None
    baselines: Annotated[list[str], DISTINCT] = []

    @model_validator(mode="after")
    def _known_baselines(self) -> EvalSection:
        for name in self.baselines:
            registry.check(registry.BASELINES, name, "baseline (eval.baselines)")
        return self

    def idle(self) -> dict[str, str]:
        return {} if self.splits else dict.fromkeys(("every_steps", "baselines"), "eval.splits is empty")


class CheckpointSection(Section):
    """``every_steps`` besides the end of each ``every_epochs``-th epoch; ``keep`` newest ones stay, and the best.

    asynchronous: written by a thread while training goes on.  What moves meanwhile is copied before it does; where
    copies would take a process more than ``copy_mib`` MiB, training waits."""

    every_epochs: POSITIVE = 1
    every_steps: POSITIVE | None = None
    keep: POSITIVE = 2
    asynchronous: bool = False
    copy_mib: POSITIVE = 4096

    def idle(self) -> dict[str, str]:
        return {} if self.asynchronous else {"copy_mib": "asynchronous is false"}


class RunConfig(Section):
    """The whole run."""

    run: RunSection = RunSection()
    data: DataSection
    model: component(registry.MODELS, "model", default="retrieval")
    objective: component(registry.OBJECTIVES, "objective") | None = None
    optimizer: component(registry.OPTIMIZERS, "optimizer")
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = Field(
        default_factory=lambda: TrainSection.model_validate({})  # made when needed: its engine is looked up
    )
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _held_out_splits(self) -> RunConfig:
        split = self.data.split.build()
        for name in self.eval.splits:
            split.check(name)
        if self.data.follow is not None and self.data.split.name != "chronological":
            raise UserError(
                "data.follow waits for newer actions to go through once: use data.split=chronological, or leave it out"
            )
        if self.data.follow is not None and self.schedule.name != "constant":
            raise UserError(
                f"data.follow has no last step, and schedule.name {self.schedule.name} falls towards one: use constant"
            )
        return self

    def idle(self) -> dict[str, str]:
        """Keys of ``eval`` that other models' metrics look at."""
        families = {
            name: registry.resolve(registry.METRICS, name, "metric family") for name in registry.METRICS
        }
        others = frozenset().union(*(family.eval_keys for family in families.values()))
        own = families[self.model.component().judged_by].eval_keys  # type: ignore[attr-defined]
        why = f"the metrics of model {self.model.name} don't look at it"
        idle = {f"eval.{key}": why for key in sorted(others - own)}
        if self.data.split.name == "chronological":
            why = "data.split chronological trains on each period once, and evaluates before it"
            idle |= dict.fromkeys(("train.epochs", "eval.every_steps"), why)
        return idle


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in the YAML file ``path``, or of that name among those that come with gr (``ml-1m/hstu``), with what
    it extends and dotted ``overrides`` (``key.key=value``)."""
    return from_dict(overridden(read_yaml(find_config(path), RunConfig), overrides, RunConfig))


def from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """A config from plain dictionaries, checked."""
    return validate(RunConfig, raw, "")


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``config`` with dotted ``overrides`` applied."""
    return from_dict(overridden(to_dict(config), overrides, RunConfig))


def to_dict(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    return yaml12.dump(to_dict(config))


def warn_of_idle_keys(config: RunConfig) -> None:
    """A line for each key that was set and has no effect beside the others.  They are not refused: a file may set
    one for those that extend it, and an override may take its effect away."""
    for sentence in idle_keys(config):
        log.warning(sentence)
