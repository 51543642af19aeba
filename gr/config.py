"""A run, typed.

A config is YAML: ``extends:`` names one or more files it builds on, dotted overrides (``train.epochs=3``) come
last, and the resolved whole is written into the run's folder.  Unknown and ill-typed keys are refused with the
nearest valid name.  Components (encoder, objective, optimiser ...) are chosen by ``name`` from the tables in
``gr.registry`` and bring their own typed ``Config``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
)

from gr import registry
from gr.errors import UserError, nearest

POSITIVE = Annotated[int, Field(gt=0)]
FRACTION = Annotated[float, Field(ge=0, lt=1)]
SEED = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Section(BaseModel):
    """A part of the config: immutable, strictly typed, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ComponentConfig(Section):
    """Base of the configs that components bring; ``name`` is the key in the registry's table."""

    name: str


def component(table: dict[str, str], path: str) -> Any:
    """The type of a key whose value is a component's config: looked up by ``name`` in ``table`` when validated."""

    def parse(value: Any) -> Any:
        if isinstance(value, ComponentConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or "name" not in value:
            raise UserError(f"'{path}' needs a name: {nearest('', table)}")
        component_class = registry.resolve(table, str(value["name"]), f"{path}.name")
        return validate(component_class.Config, value, path)

    return SerializeAsAny[Annotated[ComponentConfig, BeforeValidator(parse)]]


def _folder_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(
            "a folder's name is needed, without slashes or a dot in front: use run.dir for a path"
        )
    return name


class RunSection(Section):
    """Where the run is kept.  ``dir``: exactly this folder; without it ``runs/NAME``, numbered if it exists."""

    name: Annotated[str, AfterValidator(_folder_name)] = "run"
    dir: str | None = None


class DataSection(Section):
    """What is read.  ``max_length``: inputs kept of each sequence, the latest; its targets are as many."""

    path: str
    max_length: POSITIVE = 200
    split: component(registry.SPLITS, "data.split") = Field(  # type: ignore[valid-type]
        default_factory=lambda: {"name": "leave_one_out"}, validate_default=True
    )
    order: Literal["shuffle", "stream"] = "shuffle"
    window_blocks: POSITIVE = 64
    tail: Literal["keep", "drop"] = "keep"
    prefetch: POSITIVE = 4
    ingest: component(registry.INGEST, "data.ingest") = Field(  # type: ignore[valid-type]
        default_factory=lambda: {"name": "arrow"}, validate_default=True
    )


class InputSection(Section):
    """x = dropout(s E[item] + P[position]); s is sqrt(model.dim) with ``scale``, else 1.

    positions: how P starts: xavier_normal over the whole of P, truncated_normal with std 1/sqrt(model.dim), or
    normal with std model.table_std, as small as an item's row."""

    scale: bool = True
    positions: Literal["none", "xavier_normal", "truncated_normal", "normal"] = "xavier_normal"
    extra_positions: Annotated[int, Field(ge=0)] = 0
    dropout: FRACTION = 0.2


class SimilaritySection(Section):
    """score = <q, e> / temperature, both L2-normalised (eps as the divisor's floor) if asked for."""

    normalize: bool = True
    eps: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 0.05
    item_bias: bool = False


class ModelSection(Section):
    dim: POSITIVE = 50
    table_std: Annotated[float, Field(ge=0)] = 0.02
    task: component(registry.TASKS, "model.task") = Field(  # type: ignore[valid-type]
        default_factory=lambda: {"name": "next_item"}, validate_default=True
    )
    input: InputSection = InputSection()
    encoder: component(registry.ENCODERS, "model.encoder")  # type: ignore[valid-type]
    similarity: SimilaritySection = SimilaritySection()


class ParameterGroup(Section):
    """Parameters whose name matches ``match`` (a regular expression, searched) train with these values instead."""

    match: str
    lr: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class ScheduleSection(Section):
    """Learning rate over steps: linear warm-up, then constant, cosine or linear to ``final_fraction`` of the rate."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


class EarlyStopping(Section):
    """Stop when ``metric`` of the validation split has not improved for ``patience`` evaluations."""

    metric: str = "ndcg@10"
    patience: POSITIVE = 10


class TrainSection(Section):
    """``global_batch`` sequences a step over all processes; a process cuts its share into micro-batches of at most
    ``micro_batch_actions`` actions and accumulates: neither changes the loss but by rounding."""

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
    early_stopping: EarlyStopping | None = None


class LogSection(Section):
    """``every_steps``: a train row in metrics.jsonl; ``tensorboard``: events too, when it is installed."""

    every_steps: POSITIVE = 50
    tensorboard: bool = True


class EvalSection(Section):
    """Full-catalogue evaluation.  ``exclude``: items of the history taken out of the ranking: none, those the model
    was shown (``kept``), or all of the user's."""

    every_epochs: POSITIVE = 1
    every_steps: POSITIVE | None = None
    splits: list[str] = ["test"]
    ks: list[POSITIVE] = [1, 5, 10, 50, 200, 500]
    exclude: Literal["none", "kept", "all"] = "kept"
    batch: POSITIVE = 256
    max_scores: POSITIVE = 2**24
    max_users: POSITIVE | None = None
    buckets: bool = True
    baselines: list[str] = []


class CheckpointSection(Section):
    """``every_steps`` besides the end of each ``every_epochs``-th epoch; ``keep`` newest ones stay, and the best."""

    every_epochs: POSITIVE = 1
    every_steps: POSITIVE | None = None
    keep: POSITIVE = 2


class RunConfig(Section):
    """The whole run."""

    run: RunSection = RunSection()
    data: DataSection
    model: ModelSection
    objective: component(registry.OBJECTIVES, "objective")  # type: ignore[valid-type]
    optimizer: component(registry.OPTIMIZERS, "optimizer")  # type: ignore[valid-type]
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in the YAML file ``path``, with what it extends and dotted ``overrides`` (``key.key=value``)."""
    raw = read_yaml(path)
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return from_dict(raw)


def from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """A config from plain dictionaries, checked."""
    return validate(RunConfig, raw, "")


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``config`` with dotted ``overrides`` applied."""
    raw = to_dict(config)
    for text in overrides:
        raw = merge(raw, parse_override(text))
    return from_dict(raw)


def to_dict(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping with its ``extends:`` (paths relative to the file) merged under it."""
    file = Path(path).resolve()
    if file in _seen:
        raise UserError(
            f"'{file}' extends itself through {' -> '.join(p.name for p in _seen)}: break the circle"
        )
    try:
        raw = yaml.load(file.read_text(), Loader=_Loader) or {}  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise UserError(f"no config file '{path}': configs/ has the ones that come with gr") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"'{path}' must hold a mapping of keys, not a {type(raw).__name__}")
    bases = raw.pop("extends", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, read_yaml(file.parent / base, (*_seen, file)))
    return merge(merged, raw)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``change`` over ``base``, mappings merged key by key; one that names another component replaces it whole.

    (The names of runs and of schedules are values like others: the rest of their section stays.)"""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            named = key not in ("run", "schedule") and "name" in value and "name" in old
            other = named and value["name"] != old["name"]
            merged[key] = dict(value) if other else merge(old, value)
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=1`` -> ``{'a': {'b': 1}}``; the value is YAML."""
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise UserError(f"'{text}' is not an override: write key.key=value, for example train.epochs=3")
    try:
        nested: Any = yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise UserError(f"the value of '{text}' is not valid YAML: quote it") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def validate(section: type[Section], raw: Any, prefix: str) -> Any:
    """``raw`` as a ``section``; ``prefix`` is the dotted key it stands under.  UserError names the bad key."""
    try:
        return section.model_validate(dict(raw) if isinstance(raw, Mapping) else raw)
    except ValidationError as error:
        raise UserError(_sentence(error, section, prefix)) from None


def _sentence(error: ValidationError, section: type[Section], prefix: str) -> str:
    """The first problem of a validation error as one sentence, with the dotted key."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join([*([prefix] if prefix else []), *location])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        parent = _section_at(section, location[:-1])
        return f"unknown config key '{key}': {nearest(location[-1], parent.model_fields)}{more}"
    if first["type"] == "missing":
        return f"config key '{key}' is missing: set it in the file or as {key}=VALUE{more}"
    return f"config key '{key}' is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"


def _section_at(section: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    for part in location:
        if (field := section.model_fields.get(part)) is None:
            break
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), section)
    return section
