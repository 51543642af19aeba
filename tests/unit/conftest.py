"""What tests of tiny runs in this process share; a file whose runs are of another kind has fixtures of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gr import config as configs
from gr.config import RunConfig
from gr.data import stores
from tests.end_to_end.tiny import CONFIG, make_dataset
from tests.object_store import ObjectStore


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


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server on loopback with a bucket ``data``, one a session; who uses it takes ``store``."""
    pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ObjectStore()
        server.put("data")
        yield server
        server.stop()


@pytest.fixture
def store(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The server, without faults, in this process's environment; short waits."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "FIRST_PAUSE_S", 0.01)
    object_store.forget()
    return object_store
