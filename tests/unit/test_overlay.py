"""One config over another: a component keeps its keys until it becomes another one."""

import itertools
from pathlib import Path
from typing import Literal

import pytest

from gr import config as configs
from gr.config import ComponentConfig, Section, component, overridden
from gr.data.making.sources.base import make_source
from gr.errors import UserError
from gr.overlay import parse_override

ROOT = Path(__file__).resolve().parents[2]
HSTU = ROOT / "configs/ml-1m/hstu.yaml"
BASE = """
data: {path: nowhere}
model: {encoder: hstu}
objective: {name: sampled_softmax, negatives: 16}
optimizer: adamw
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"name": "sampled_softmax", "negatives": 16}),
        (["objective=sampled_softmax"], {"name": "sampled_softmax", "negatives": 16}),
        (["objective.name=sampled_softmax"], {"name": "sampled_softmax", "negatives": 16}),
        (["objective={name: sampled_softmax, shared: true}"], {"negatives": 16, "shared": True}),
        (["objective.shared=true"], {"negatives": 16, "shared": True}),
        (["objective=sampled_softmax", "objective.negatives=32"], {"negatives": 32}),
        (["objective.negatives=32", "objective=sampled_softmax"], {"negatives": 32}),
        (["objective=bpr"], {"name": "bpr", "negatives": 1}),
        (["objective.name=bpr"], {"name": "bpr", "negatives": 1}),
        (["objective=bpr", "objective.negatives=4"], {"name": "bpr", "negatives": 4}),
        (["objective.negatives=4", "objective=bpr"], {"name": "bpr", "negatives": 4}),
        (["objective={negatives: 4}", "objective.name=bpr"], {"name": "bpr", "negatives": 4}),
        (["objective=full_softmax"], {"name": "full_softmax"}),
        (["objective=bce", "objective=bpr"], {"name": "bpr", "negatives": 1}),
    ],
)
def test_a_component_is_merged_with_itself_and_replaced_by_another(file, overrides, expected):
    objective = configs.load(file, overrides).objective
    assert {key: getattr(objective, key) for key in expected} == expected


@pytest.mark.parametrize(
    "written",
    [
        "objective: sampled_softmax",
        "objective: {name: sampled_softmax}",
        "objective:\n  name: sampled_softmax",
    ],
)
def test_a_name_alone_can_be_overridden_into(file, written):
    file.write_text(BASE.replace("objective: {name: sampled_softmax, negatives: 16}", written))
    config = configs.load(file, ["objective.negatives=16", "optimizer.lr=0.5", "model.encoder.layers=3"])
    assert config.objective.negatives == 16
    assert (config.optimizer.name, config.optimizer.lr) == ("adamw", 0.5)
    assert config.model.encoder.layers == 3


@pytest.mark.parametrize(
    ("written", "overrides", "expected"),
    [
        ("", [], {"name": "leave_one_out", "holdout": 2}),
        ("", ["data.split.holdout=1"], {"name": "leave_one_out", "holdout": 1}),
        ("split: {holdout: 1}", [], {"name": "leave_one_out", "holdout": 1}),
        ("split: {holdout: 1}", ["data.split=leave_one_out"], {"holdout": 1}),
        ("split: {holdout: 1}", ["data.split=records"], {"name": "records", "train": 0.9}),
        ("split: {holdout: 1}", ["data.split.name=records", "data.split.train=0.5"], {"train": 0.5}),
        ("split: leave_one_out", ["data.split.holdout=1"], {"name": "leave_one_out", "holdout": 1}),
        ("split: records", ["data.split.train=0.5"], {"name": "records", "train": 0.5}),
    ],
)
def test_a_component_that_was_not_named_is_the_default_one(file, written, overrides, expected):
    file.write_text(BASE.replace("path: nowhere", f"path: nowhere, {written}"))
    split = configs.load(file, overrides).data.split
    assert {key: getattr(split, key) for key in expected} == expected


def test_keys_of_another_component_are_refused_and_not_dropped(file):
    with pytest.raises(UserError, match=r"unknown config key 'objective\.logq'"):
        configs.load(file, ["objective.logq=true", "objective=bpr"])


def test_files_are_laid_over_each_other_by_the_same_rule(tmp_path, file):
    for name, text in {
        "same": "objective: sampled_softmax",
        "keys": "objective: {shared: true}",
        "other": "objective: bpr",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(f"extends: base.yaml\n{text}\n")
    same, keys, other = (configs.load(tmp_path / f"{n}.yaml").objective for n in ("same", "keys", "other"))
    assert same.negatives == keys.negatives == 16 and keys.shared
    assert (other.name, other.negatives) == ("bpr", 1)


def test_a_resolved_config_is_overridden_by_the_same_rule(file):
    config = configs.load(file)
    assert configs.override(config, ["objective=sampled_softmax"]) == config
    assert configs.override(config, ["objective=bpr"]).objective.negatives == 1


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["schedule.name=cosine", "run.name=x", "train.seed=3"]))
)
def test_the_names_of_runs_and_schedules_are_values_like_others(tmp_path, file, order):
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: base.yaml\nrun: {name: mine, dir: here}\nschedule: {name: linear, warmup_steps: 7}\n"
    )
    config = configs.load(child, order)
    assert (config.run.name, config.run.dir) == ("x", "here")
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 7)


def test_a_section_is_not_made_of_what_is_none(file):
    with pytest.raises(UserError, match=r"config key 'train' is 5, and keys of it are set besides"):
        configs.load(file, ["train=5", "train.epochs=3"])
    with pytest.raises(UserError, match=r"config key 'eval\.ks' is \{'0': 5\}"):
        configs.load(file, ["eval.ks.0=5"])
    assert configs.load(file, ["train.early_stopping.patience=3"]).train.early_stopping.patience == 3


def test_short_forms_of_a_schema_are_laid_over_as_well():
    columns = {
        "user": "u",
        "item": "i",
        "fields": {"device": "dev", "price": {"column": "eur", "type": "float"}},
    }
    settings = ["columns.fields.device.type=string", "columns.fields.price=usd"]
    fields = make_source("log", {"columns": columns}, settings).options.columns.fields
    assert (fields["device"].column, fields["device"].type) == ("dev", "string")
    assert (fields["price"].column, fields["price"].type) == ("usd", "float")


class Inner:
    class Config(ComponentConfig):
        name: Literal["inner"] = "inner"
        width: int = 1


class Outer:
    class Config(ComponentConfig):
        name: Literal["outer"] = "outer"
        part: component({"inner": f"{__name__}:Inner"}, "outer.part") = "inner"


class Other:
    class Config(ComponentConfig):
        name: Literal["other"] = "other"
        part: str = "x"


def test_a_component_inside_a_component_is_known_by_the_name_of_the_outer_one():
    """Whichever of the file and the overrides says it."""

    class Whole(Section):
        outer: component(
            {"outer": f"{__name__}:Outer", "other": f"{__name__}:Other"}, "outer", default="other"
        )

    for raw, overrides in (
        ({"outer": "outer"}, ["outer.part=inner", "outer.part.width=3"]),
        ({"outer": {"name": "outer", "part": "inner"}}, ["outer.part.width=3"]),
        ({"outer": {"name": "outer", "part": {"name": "inner", "width": 3}}}, ["outer.part=inner"]),
        ({}, ["outer.part.width=3", "outer.part=inner", "outer=outer"]),
    ):
        assert overridden(raw, overrides, Whole)["outer"]["part"] == {"name": "inner", "width": 3}


def test_a_mark_alone_is_a_value_as_the_shell_gives_it():
    assert parse_override("csv.delimiter=\t") == {"csv": {"delimiter": "\t"}}
    for mark in (",", "|", "||", ";", ":", "::", "#", "%", "'", '"', "\\", "-"):
        assert parse_override(f"csv.delimiter={mark}") == {"csv": {"delimiter": mark}}
    for value, meant in (("~", None), ("[]", []), ("{}", {}), ("''", ""), ('""', ""), ("", None), ("-1", -1)):
        assert parse_override(f"a={value}") == {"a": meant}
    with pytest.raises(UserError, match="is not valid YAML"):
        parse_override("csv.delimiter=\t,")
