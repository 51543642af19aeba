"""Configs: what is accepted, and the one sentence that says what is not."""

import pickle
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
from pydantic import create_model

from gr import config as configs, registry
from gr.config import RunConfig, Section, validate
from gr.errors import UserError
from gr.overlay import section_of
from gr.programs import evaluate

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "table.yaml")
HSTU, RANKING = ROOT / "configs/ml-1m/hstu.yaml", ROOT / "configs/ml-1m/ranking.yaml"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_that_comes_along_loads_and_survives_a_round_trip(file):
    if "encoder" not in configs.read_yaml(file).get("model", {}):
        pytest.skip("a protocol: others extend it")
    config = configs.load(file)
    assert configs.from_dict(configs.to_dict(config)) == config


def test_extends_overrides_and_numbers_in_scientific_notation(tmp_path):
    (tmp_path / "child.yaml").write_text(f"extends: {HSTU}\noptimizer: {{lr: 3e-4}}\n")
    config = configs.load(
        tmp_path / "child.yaml", ["train.epochs=3", "model.encoder.dropout=0", "train.clip_norm=1"]
    )
    assert config.optimizer.lr == 3e-4
    assert config.train.epochs == 3
    assert config.model.encoder.dropout == 0.0
    assert config.model.encoder.layers == 2  # from the extended file
    assert configs.override(config, ["train.epochs=4"]).train.epochs == 4


def test_another_component_replaces_the_old_one_with_its_keys(tmp_path):
    (tmp_path / "child.yaml").write_text(
        f"extends: {HSTU}\nmodel: {{encoder: {{name: gru4rec, hidden: 8}}}}\n"
    )
    assert configs.load(tmp_path / "child.yaml").model.encoder.hidden == 8


@pytest.mark.parametrize(
    "override,sentence",
    [
        ("train.epochz=3", "unknown config key 'train.epochz': did you mean 'epochs'?"),
        ("trian.epochs=3", "unknown config key 'trian': did you mean 'train'?"),
        ("train.epochs=three", "config key 'train.epochs' is 'three': input should be a valid integer"),
        ("train.epochs=2.5", "config key 'train.epochs' is 2.5: input should be a valid integer"),
        ("train.epochs=0", "config key 'train.epochs' is 0: input should be greater than 0"),
        ("model.encoder.layrs=3", "unknown config key 'model.encoder.layrs': did you mean 'layers'?"),
        ("model.encoder.name=hsut", "unknown model.encoder.name 'hsut': did you mean 'hstu'?"),
        ("model.input.positions=none2", "config key 'model.input.positions' is 'none2'"),
        ("objective=focal", "unknown objective.name 'focal'"),
        ("train.epochs", "'train.epochs' is not an override: write key.key=value"),
        ("optimizer.lr=-1", "config key 'optimizer.lr' is -1: input should be greater than 0"),
    ],
)
def test_a_refusal_names_the_key_and_the_nearest_valid_one(override, sentence):
    with pytest.raises(UserError) as refusal:
        configs.load(HSTU, [override])
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


def test_missing_keys_and_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="config key 'data' is missing"):
        configs.from_dict({"model": {"encoder": "hstu"}, "objective": "bce", "optimizer": "adamw"})
    with pytest.raises(UserError, match="no config file"):
        configs.load(tmp_path / "nowhere.yaml")
    (tmp_path / "c.yaml").write_text("train: [1, 2\n")
    with pytest.raises(UserError, match=r"c\.yaml' is not valid YAML, line 2: expected"):
        configs.load(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text(
        f"extends: {HSTU}\ntrain: {{epochs: 1}}\ndata: {{path: x}}\ntrain: {{seed: 2}}\n"
    )
    with pytest.raises(UserError, match=r"d\.yaml', line 4: 'train' stands twice .* \(first in line 2\)"):
        configs.load(tmp_path / "d.yaml")
    for text, kind in (("", "nothing"), ("- a\n", "a list"), ("false\n", "a boolean"), ("a\n", "a text")):
        (tmp_path / "e.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"e\.yaml' must hold a mapping of keys, and holds {kind}"):
            configs.load(tmp_path / "e.yaml")


def test_a_base_that_has_a_mistake_is_named_with_the_file_that_extends_it(tmp_path):
    (tmp_path / "child.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(UserError, match=r"child\.yaml' extends 'base\.yaml': no config file 'base\.yaml'"):
        configs.load(tmp_path / "child.yaml")
    (tmp_path / "base.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(
        UserError, match=r"'base\.yaml' \(which '.*child\.yaml' extends\), line 2: 'a' stands twice"
    ):
        configs.load(tmp_path / "child.yaml")


@pytest.mark.parametrize(
    "given", ["3", "[base.yaml, 3]", "{a: base.yaml}", "true", "''", "[[base.yaml]]", "~", "1.5"]
)
def test_extends_is_a_path_or_paths(tmp_path, given):
    (tmp_path / "base.yaml").write_text("train: {epochs: 3}\n")
    (tmp_path / "child.yaml").write_text(f"extends: {given}\n")
    with pytest.raises(
        UserError, match=r"child\.yaml' extends .*: give the path of a file, or a list of paths$"
    ):
        configs.load(tmp_path / "child.yaml")


def test_circles_of_extends_are_refused_and_diamonds_read_once(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: [a.yaml]\n")
    with pytest.raises(UserError, match=r"'a\.yaml' extends itself through a\.yaml -> b\.yaml -> a\.yaml"):
        configs.load(tmp_path / "a.yaml")
    (tmp_path / "0.yaml").write_text(f"extends: {HSTU}\n")
    (tmp_path / "twice.yaml").write_text("extends: [0.yaml, 0.yaml]\n")
    with pytest.raises(UserError, match=r"twice\.yaml' extends a file twice"):
        configs.load(tmp_path / "twice.yaml")
    for i in range(1, 40):  # 2^39 ways lead to the first
        (tmp_path / f"{i}.yaml").write_text(f"extends: [left-{i}.yaml, right-{i}.yaml]\n")
        for side in ("left", "right"):
            (tmp_path / f"{side}-{i}.yaml").write_text(f"extends: {i - 1}.yaml\n")
    assert configs.load(tmp_path / "39.yaml") == configs.load(HSTU)


@pytest.mark.parametrize(
    "override,sentence",
    [
        ("objective=3", "'objective' needs a name"),
        ("optimizer=", "'optimizer' needs a name"),
        ("objective=adamw", "unknown objective.name 'adamw'"),
        ("train=5", "config key 'train' is 5: it must be a mapping of keys"),
        (
            "train={epochs: 1, epochs: 2}",
            "the value of 'train={epochs: 1, epochs: 2}', line 1: 'epochs' stands twice",
        ),
        ("data.max_length=1:30", "config key 'data.max_length' is '1:30': input should be a valid integer"),
        ("data.max_length=1_000", "config key 'data.max_length' is '1_000': input should be a valid integer"),
        ("data.max_length=true", "config key 'data.max_length' is True: input should be a valid integer"),
        (f"data.max_length={10**30}", f"config key 'data.max_length' is {10**30}: input should be less than"),
        (f"optimizer.lr={10**400}", "config key 'optimizer.lr' is 10000"),
        (
            "data.split.holdout=true",
            "config key 'data.split.holdout' is True: input should be a valid integer",
        ),
        ("data.split.holdout=1.0", "config key 'data.split.holdout' is 1.0: input should be a valid integer"),
        (
            "train.deterministic=yes",
            "config key 'train.deterministic' is 'yes': input should be a valid boolean (write",
        ),
        ("run.name=010", "config key 'run.name' is 10: input should be a valid string (put it in quotes)"),
        ('run.name="a\\0b"', "config key 'run.name' is 'a\\x00b'"),
        ("optimizer.lr=1e999", "config key 'optimizer.lr' is inf: input should be a finite number"),
        (
            "eval.splits=[test, test]",
            "config key 'eval.splits' is ['test', 'test']: value error, 'test' stands in",
        ),
        ("eval.ks=[10, 5, 10]", "config key 'eval.ks' is [10, 5, 10]: value error, 10 stands in it twice"),
        ("eval.baselines=[popularity, popularity]", "config key 'eval.baselines' is"),
        (
            "eval.baselines=[popularty]",
            "unknown baseline (eval.baselines) 'popularty': did you mean 'popularity'?",
        ),
        ("eval.splits=[tset]", "unknown split 'tset': did you mean 'test'?"),
        ("eval.splits=[valid]", "split 'valid' is not held out by data.split"),
        ("data.split={name: global_time, valid_from: 5, test_from: 3}", "data.split.valid_from is after"),
        ("objective={name: 3}", "unknown objective.name '3'"),
        ("eval.ks=[0]", "config key 'eval.ks.0' is 0: input should be greater than 0"),
        ("model.similarity.temperature=0", "config key 'model.similarity.temperature' is 0"),
        ("model.similarity.eps=0", "config key 'model.similarity.eps' is 0"),
        ("train.clip_norm=0", "config key 'train.clip_norm' is 0"),
        (f"train.seed={2**63}", f"config key 'train.seed' is {2**63}: input should be less than"),
    ],
)
def test_values_that_could_not_work_are_refused(override, sentence):
    with pytest.raises(UserError) as refusal:
        configs.load(HSTU, [override])
    assert str(refusal.value).startswith(sentence)


def test_a_config_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(UserError, match="cannot be read"):
            configs.load(path)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".hidden", "a\\b"])
def test_a_runs_name_is_a_folders(name):
    with pytest.raises(UserError, match=r"run\.name.*without slashes"):
        configs.load(HSTU, [f"run.name={name!r}"])


def test_a_components_config_builds_it_also_as_a_copy_and_in_another_process():
    config = configs.load(HSTU, ["data.split.holdout=2"])
    encoder = config.model.encoder.build(config.model.dim, config.data.max_length)
    assert type(encoder) is registry.resolve(registry.ENCODERS, "hstu", "encoder")
    assert len(encoder.layers) == 2 and encoder.uses_times
    wider = config.model.encoder.model_copy(update={"heads": 3})
    reloaded = configs.from_dict(configs.to_dict(config))
    sent = pickle.loads(pickle.dumps(config))
    assert wider.build(50, 10).layers[0].config.heads == 3
    for one in (config, reloaded, sent):
        assert one == config
        assert type(one.data.split.build()).__name__ == "LeaveOneOut"
        assert one.data.split.build().names == ("valid", "test")
    assert type(configs.load(HSTU, ["optimizer=sgd"]).optimizer.build()).__name__ == "SGD"


# --- every key of every section -----------------------------------------------------------------------------------


def keys(section, path=()):
    """(path, field) of all keys below a section of the config, components' too."""
    for name, field in section.model_fields.items():
        inner, choice = section_of(Annotated[(field.annotation, *field.metadata, None)])
        if choice is not None:
            for component in choice.table:
                for below, found in keys(choice.config(component)):
                    yield (*path, name, component, *below), found
        elif inner is not None and get_origin(field.annotation) is not list:
            yield from keys(inner, (*path, name))
        else:
            yield (*path, name), field


def kinds(annotation):
    """The plain types in an annotation, however deep."""
    if isinstance(annotation, type) or not get_args(annotation):
        return {annotation}
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return set().union(*(kinds(argument) for argument in get_args(annotation)))


KEYS = {".".join(path): field for path, field in keys(RunConfig)}
NUMBERS = {key: field for key, field in KEYS.items() if kinds(field.annotation) & {int, float}}


def refused(field, value, where="key"):
    Model = create_model(
        "Model", __base__=Section, key=(Annotated[(field.annotation, *field.metadata, None)], ...)
    )
    with pytest.raises(UserError) as refusal:
        validate(Model, {"key": value}, "")
    assert str(refusal.value).startswith(f"config key '{where}' is ")


def test_the_keys_are_found():
    assert (
        len(NUMBERS) > 60
        and {"optimizer.adamw.lr", "eval.ks", "model.retrieval.similarity.temperature"} <= NUMBERS.keys()
    )
    assert {"data.split.leave_one_out.holdout", "train.early_stopping.patience"} <= NUMBERS.keys()


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_finite_and_no_boolean(key):
    field = NUMBERS[key]
    for value in (True, False, float("inf"), -float("inf"), float("nan"), "3", 10**400):
        if get_origin(field.annotation) is list:
            refused(field, [value, value], "key.0")
        else:
            refused(field, value)


@pytest.mark.parametrize("key", [key for key, field in KEYS.items() if kinds(field.annotation) == {bool}])
def test_a_boolean_is_no_number_and_no_word(key):
    for value in (0, 1, "yes", "on", "true", 1.0):
        refused(KEYS[key], value)


def test_no_choice_is_of_numbers():
    """A Literal of numbers takes true for 1."""
    for key, field in KEYS.items():
        literals = [o for o in (field.annotation, *get_args(field.annotation)) if get_origin(o) is Literal]
        assert all(kinds(literal) == {str} for literal in literals), key


# --- keys without effect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "with_effect"),
    [
        (["schedule.final_fraction=0.5"], "schedule.final_fraction", ["schedule.name=cosine"]),
        (["objective.logq=true"], "objective.logq", ["objective.sampling=popularity"]),
        (["model.input.positions=none"], "model.input.extra_positions", ["model.input.extra_positions=0"]),
        (
            ["model.similarity.normalize=false", "model.similarity.eps=1e-3"],
            "model.similarity.eps",
            ["model.similarity.normalize=true"],
        ),
        (
            ["model.encoder.activation=softmax", "model.encoder.divisor=7"],
            "model.encoder.divisor",
            ["model.encoder.activation=silu"],
        ),
        (
            ["model.task={name: cloze, last_probability: 1, mask_probability: 0.5}"],
            "model.task.mask_probability",
            ["model.task.last_probability=0.5"],
        ),
        (
            ["optimizer.groups=[{match: table}]"],
            "optimizer.groups.0.match",
            ["optimizer.groups=[{match: table, lr: 1}]"],
        ),
        (["eval.baselines=[popularity]", "eval.splits=[]"], "eval.baselines", ["eval.splits=[test]"]),
        (["eval.every_steps=9", "eval.splits=[]"], "eval.every_steps", ["eval.splits=[test]"]),
        (["data.ingest=direct", "data.prefetch=9"], "data.prefetch", ["data.ingest=arrow"]),
    ],
)
def test_a_key_without_effect_is_said(caplog, overrides, key, with_effect):
    config = configs.load(HSTU, overrides)
    configs.warn_of_idle_keys(config)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"config key '{key}' is ")
    assert " and has no effect: " in record.getMessage()
    caplog.clear()
    configs.warn_of_idle_keys(configs.override(config, with_effect))
    configs.warn_of_idle_keys(configs.load(HSTU))
    assert not caplog.records


@pytest.mark.parametrize("override", ["eval.ks=[3]", "eval.exclude=all", "eval.max_scores=9"])
def test_a_key_of_other_metrics_than_the_models_is_said(caplog, override):
    configs.warn_of_idle_keys(configs.load(HSTU, [override]))
    configs.warn_of_idle_keys(configs.load(RANKING, ["eval.max_users=9", "eval.buckets=false"]))
    assert not caplog.records
    configs.warn_of_idle_keys(configs.load(RANKING, [override]))
    (record,) = caplog.records
    key = override.partition("=")[0]
    assert record.getMessage().startswith(f"config key '{key}' is ")
    assert record.getMessage().endswith("has no effect: the metrics of model ranking don't look at it")


def test_weights_that_are_all_the_same_are_said(caplog):
    config = configs.load(RANKING)
    tasks = [f"model.tasks.{name}.weight" for name in config.model.tasks]
    configs.warn_of_idle_keys(configs.override(config, [f"{key}=3" for key in tasks]))
    said = [record.getMessage() for record in caplog.records]
    assert [text.split("'")[1] for text in said] == tasks and "weigh" in said[0]
    caplog.clear()
    configs.warn_of_idle_keys(configs.override(config, [f"{tasks[0]}=3"]))
    assert not caplog.records


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("eval.splits=[valid]", "'eval.splits' is not looked at when evaluating: say --split"),
        ("eval.baselines=[prior]", "'eval.baselines' is not looked at when evaluating: say --baselines"),
        ("eval.buckets=true", "'eval.buckets' is not looked at when evaluating: say --buckets"),
        (
            "eval.every_steps=3",
            "and eval.* but for eval.every_epochs and eval.every_steps",
        ),
        ("train.seed=3", "'train.seed=3' cannot change when evaluating: only train.timeout can, and eval.*"),
    ],
)
def test_evaluating_takes_no_key_that_it_does_not_look_at(override, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        evaluate.parse(["--run", "runs/x", "eval.ks=[3]", override])
    assert evaluate.parse(["--run", "runs/x", "eval.ks=[3]"]).overrides == ["eval.ks=[3]"]


# --- from Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (None, "a config must be a mapping of keys, not nothing"),
        ([1], "a config must be a mapping of keys, not a list"),
        ({"optimizer": {"name": "adamw", "lr": float("nan")}}, "config key 'optimizer.lr' is nan"),
        ({"optimizer": {"name": ["adamw"]}}, "unknown optimizer.name '['adamw']'"),
        ({"optimizer": {"name": "adamw", 3: 4}}, "config key 'optimizer.3' is no text"),
        ({"data": {"path": "x", 3: 4}}, "config key 'data.3' is no text"),
        ({"eval": {"splits": ["test", "test"]}}, "config key 'eval.splits' is ['test', 'test']"),
        ({"train": {"epochs": 10**5000}}, "config key 'train.epochs' is a number of thousands of digits"),
        ({"train": {"epochs": True}}, "config key 'train.epochs' is True"),
        ({"objective": configs.load(HSTU).optimizer}, "'objective' cannot be 'adamw', which is another kind"),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, dict) else next(iter(value)),
)
def test_dictionaries_from_python_get_the_same_sentences(raw, sentence):
    if isinstance(raw, dict):
        raw = {**configs.to_dict(configs.load(HSTU)), **raw}
    with pytest.raises(UserError) as refusal:
        configs.from_dict(raw)
    assert str(refusal.value).startswith(sentence)


def test_a_component_made_in_python_is_taken_as_it_is():
    config = configs.load(HSTU, ["model.encoder.layers=5"])
    raw = {**configs.to_dict(configs.load(HSTU)), "model": {"encoder": config.model.encoder}}
    assert configs.from_dict(raw).model.encoder is config.model.encoder


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(registry.ENCODERS, "far", "nowhere_installed.far:Far")
    with pytest.raises(UserError, match=r"model\.encoder\.name 'far' needs the package 'nowhere_installed'"):
        configs.load(HSTU, ["model.encoder=far"])
    monkeypatch.setitem(registry.ENCODERS, "lost", "gr.models.lost:Lost")
    with pytest.raises(ModuleNotFoundError):  # a mistake in the table is no user's
        configs.load(HSTU, ["model.encoder=lost"])
