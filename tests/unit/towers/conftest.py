"""What tests of towers share: a folder with a dataset and an encoder, and tiny runs on these."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from gr import config as configs
from gr.data.dataset import SequenceDataset
from gr.modality.reader import TextReader, TextSection
from gr.modality.vectors import as_table
from gr.train import job
from tests.end_to_end.tiny import CONFIG
from tests.packages import needs
from tests.towers import CPU, make_encoder, make_titled


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    needs("transformers")
    path = tmp_path_factory.mktemp("towers")
    make_titled(path / "data")
    make_encoder(path / "encoder")
    return path


@pytest.fixture
def config(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "plot_run", lambda folder, shown: None)  # pictures take longer than runs
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", data=folder / "data"))

    def load(tower, *overrides, run="run"):
        tower = {"text": {"encoder": str(folder / "encoder")}, **tower}
        tower = {key: value for key, value in tower.items() if value is not None}
        given = [f"model.item_tower={json.dumps(tower)}", f"run.dir={tmp_path / run}", *overrides]
        return configs.load(file, given)

    return load


@pytest.fixture
def vectors_of_titles(folder, tmp_path):
    """A file of them, as an encoder made them."""
    catalogue = SequenceDataset(folder / "data").catalogue
    found = TextReader(TextSection(encoder=str(folder / "encoder")), CPU).vectors(catalogue)
    pq.write_table(as_table(catalogue.ids, found), file := tmp_path / "vectors.parquet")
    return file, catalogue.ids, found
