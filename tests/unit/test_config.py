"""Configs: what is accepted, and the one sentence that says what is not."""

import pickle
from pathlib import Path

import pytest

from gr import config as configs, registry
from gr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "table.yaml")
HSTU = ROOT / "configs/ml-1m/hstu.yaml"


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


def test_missing_keys_files_and_circles(tmp_path):
    with pytest.raises(UserError, match="config key 'data' is missing"):
        configs.from_dict({"model": {"encoder": "hstu"}, "objective": "bce", "optimizer": "adamw"})
    with pytest.raises(UserError, match="no config file"):
        configs.load(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match="extends itself through"):
        configs.load(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("train: [1, 2\n")
    with pytest.raises(UserError, match="not valid YAML"):
        configs.load(tmp_path / "c.yaml")


def test_the_name_of_a_schedule_is_a_value_like_others(tmp_path):
    (tmp_path / "child.yaml").write_text(f"extends: {HSTU}\nschedule: {{name: linear, warmup_steps: 7}}\n")
    schedule = configs.load(tmp_path / "child.yaml", ["schedule.name=cosine"]).schedule
    assert (schedule.name, schedule.warmup_steps) == ("cosine", 7)


@pytest.mark.parametrize(
    "override,sentence",
    [
        ("objective=3", "'objective' needs a name"),
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
