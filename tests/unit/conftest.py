"""What tests of tiny runs in this process share; a file whose runs are of another kind has fixtures of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gr import config as configs
from gr.config import RunConfig
from tests.end_to_end.tiny import CONFIG, make_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny dataset."""
    path = tmp_path_factory.mktemp("tiny") / "data"
    make_dataset(path)
    return path


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``config("train.epochs=1")``: the tiny config, 10 steps an epoch, with overrides."""
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", data=data))
    return lambda *overrides: configs.load(file, overrides)
