"""manifest.json: what this gr can't read is refused in one sentence that says why."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from gr.data.dataset import SequenceDataset
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    writer = DatasetWriter(tmp_path / "data", "small")
    offsets, items = np.array([0, 2, 3]), np.array([0, 1, 0], dtype=np.int32)
    writer.add(Sequences.of(np.array([5, 6]), offsets, item=items))
    return writer.finish(pa.table({"item_id": [7, 8], "count": [2, 1]}))


def without(name):
    return lambda raw: {key: value for key, value in raw.items() if key != name}


def with_block(change):
    return lambda raw: {**raw, "blocks": [change(block) for block in raw["blocks"]]}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (without("generation"), "missing 'generation'"),
        (lambda raw: {**without("items")(raw), "salt": 1, "pepper": 2}, "missing 'items', unknown 'salt', 'pepper'"),
        (without("schema_version"), "missing 'schema_version'"),
        (lambda raw: {**raw, "schema_version": 1, "salt": 1}, "schema version 1, where this gr reads 2"),
        (lambda raw: {**raw, "blocks": 3}, "'blocks' is no list"),
        (with_block(without("digest")), "block 0: missing 'digest'"),
        (with_block(lambda block: {**block, "salt": 1}), "block 0: unknown 'salt'"),
        (with_block(lambda block: 4), "block 0: no table of keys"),
    ],
)  # fmt: skip
def test_another_versions_manifest_is_refused(dataset, change, difference):
    file = dataset.path / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError) as error:
        SequenceDataset(dataset.path)
    assert str(error.value) == (
        f"the dataset at '{dataset.path}' was prepared by another version of gr (manifest.json: {difference}): "
        "prepare it again"
    )


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is damaged, it is not JSON"), ("[1]", "is not a manifest")]
)
def test_what_is_no_manifest_is_refused(dataset, text, sentence):
    (dataset.path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=f"manifest.json' {sentence}.*: prepare the dataset again$"):
        SequenceDataset(dataset.path)


def test_what_may_be_missing(dataset):
    file = dataset.path / "manifest.json"
    file.write_text(json.dumps(without("provenance")(json.loads(file.read_text()))))
    assert SequenceDataset(dataset.path).manifest.provenance == {}
