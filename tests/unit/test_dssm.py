"""A user tower that sees who asks and nothing else."""

from __future__ import annotations

import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.processes import Processes
from gr.train import job
from gr.train.parts import build
from gr.train.runs import open_run
from tests.end_to_end.tiny import CONFIG, make_dataset

CPU = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dssm")
    make_dataset(path / "data")
    return path


def load(folder, layers, *overrides, features="{user: {derived: user}}"):
    file = folder / "tiny.yaml"
    file.write_text(CONFIG.format(run=folder / f"run-{layers}", data=folder / "data"))
    section = f"model.input={{positions: none, dropout: 0, scale: false, features: {features}}}"
    dssm = [f"model.encoder={{name: dssm, layers: {layers}}}", section]
    return configs.load(file, [*dssm, "objective={name: bce, outside: sequence}", *overrides])


def test_without_layers_a_query_is_the_user_s_row(folder):
    """It is trained, evaluated and opened again; items' vectors move by their own gradients."""
    result = job.run(load(folder, 0, "train.epochs=1"))
    run = open_run(result.path)
    before = build(load(folder, 0), CPU).model
    assert not list(run.model.parameters()) and run.model.device.type == "cpu"
    for name in ("items", "user"):
        assert not torch.equal(run.model.tables[name].weight, before.tables[name].weight)
    request = next(iter(build(load(folder, 0), CPU).evaluation.requests("test")))
    with torch.no_grad():
        queries = run.model.encode(request.batch)
    rows = run.model.tables["user"].weight
    assert all((rows == query).all(1).any() for query in queries if query.any())


def test_layers_stand_behind_it(folder):
    model = build(load(folder, 2), CPU).model
    assert {name for name, _ in model.named_parameters()} == {
        f"encoder.layers.{layer}.{part}" for layer in range(2) for part in ("weight", "bias")
    }


def test_without_features_there_is_nothing_to_see(folder):
    with pytest.raises(UserError, match=r"sees model.input.features and no items: name some"):
        build(load(folder, 0, features="{}"), CPU)
