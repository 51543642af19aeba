"""Towers that can't be are refused in a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.errors import UserError
from gr.modality import reader
from gr.modality.reader import TextReader, TextSection
from gr.train import job
from gr.train.encoding import encode
from gr.train.parts import build
from gr.train.recommend import unseen_items
from gr.train.runs import open_run
from tests.end_to_end.tiny import make_dataset
from tests.towers import CPU, ITEMS, SHORT


@pytest.mark.parametrize(
    ("tower", "overrides", "sentence"),
    [
        ({"name": "text", "text": {"encoder": "./nowhere"}}, [], "no folder './nowhere' with an encoder"),
        ({"name": "text", "text": {"encoder": "package:no_such_package"}}, [], "make setup-encoders"),
        ({"name": "text", "mode": "cached", "text": None}, [], "mode cached reads vectors from a file"),
        ({"name": "text", "mode": "cached", "vectors": "no.parquet"}, [], "no file 'no.parquet'"),
        (
            {"name": "text", "mode": "tuned", "text": None},
            [],
            "mode tuned needs an encoder, and one only: set text.encoder$",
        ),
        ({"name": "fused", "text": None}, [], "one only: set text.encoder or image.encoder$"),
        (
            {"name": "text", "image": {"encoder": "x", "images": "y"}},
            [],
            "a tower of name text reads no image",
        ),
        ({"name": "text"}, ["model.table=mapped", "objective=full_softmax"], "use model.table=local"),
        ({"name": "text"}, ["model.similarity.item_bias=true"], "item_bias is a number for each row"),
        ({"name": "fused"}, ["optimizer=lazy_adam", "objective=full_softmax"], "use optimizer=adamw"),
        (
            {"name": "text", "mode": "tuned", "freeze": 2},
            [],
            "freeze is 2, and the encoder, a BertModel, has 2",
        ),
        (
            {"name": "text", "mode": "tuned"},
            ["optimizer.groups=[{match: ^tables.items.encodr, lr: 0.1}]"],
            "leaves: names begin with tables.items.head, tables.items.encoder, input, encoder$",
        ),
        (
            {"name": "text", "mode": "tuned", "refresh": 2},
            ["objective=in_batch"],
            "candidates outside of the batch",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(config, tower, overrides, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        build(config(tower, *overrides), CPU)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mode", ["frozen", "tuned"])
def test_what_cannot_be_read_is_refused_before_there_is_a_run(folder, config, tmp_path, mode):
    """Or the folder of a run with a slip in it would be there, and be in the way of the next attempt."""
    for wrong, sentence in (
        ({"fields": ["titel"]}, "reads column 'titel', which is none of the items': did you mean 'title'"),
        ({"template": "{title"}, "can't be read"),
        ({"max_tokens": 2}, "max_tokens is 2, and the encoder puts 2 marks around a text"),
    ):
        text = {"encoder": str(folder / "encoder"), **wrong}
        with pytest.raises(UserError, match=sentence):
            job.run(config({"name": "text", "mode": mode, "text": text}, *SHORT))
        assert not (tmp_path / "run").exists()


TEXTLESS = "none of the 60 items has a text (title): set fields or template to columns that have one"


@pytest.mark.parametrize(
    "tower",
    [
        {"name": "text"},
        {"name": "text", "mode": "tuned"},
        {"name": "fused", "mode": "adapters", "adapters": {"name": "lora", "size": 2}},
        {"name": "id", "text": None, "start": {"text": {"encoder": "ENCODER"}}},
        {"name": "text", "text": {"encoder": "ENCODER", "template": "a thing called {title}!"}},
    ],
)
@pytest.mark.parametrize("nothing", ["", " \n", None])
def test_a_catalogue_without_a_text_is_refused_before_there_is_a_run(
    folder, config, tmp_path, tower, nothing
):
    """As one without a picture is: all items would be one."""
    make_dataset(
        tmp_path / "data", items=ITEMS, described={"title": pa.array([nothing] * ITEMS, pa.string())}
    )
    tower = json.loads(json.dumps(tower).replace("ENCODER", str(folder / "encoder")))
    with pytest.raises(UserError, match=re.escape(TEXTLESS)):
        job.run(config(tower, f"data.path={tmp_path / 'data'}", *SHORT))
    assert not (tmp_path / "run").exists()


def test_one_text_far_behind_is_enough(folder, tmp_path, monkeypatch, caplog):
    """And whoever has none is counted, whatever the template says around it."""
    monkeypatch.setattr(reader, "AT_ONCE", 7)
    described = {"title": [*[None] * (ITEMS - 1), "red soap"]}
    catalogue = make_dataset(tmp_path / "data", items=ITEMS, described=described).catalogue
    section = TextSection(encoder=str(folder / "encoder"), template="({title})")
    text = TextReader(section, CPU)
    text.check(catalogue)
    assert len(text.vectors(catalogue).unique(dim=0)) == 2
    assert "59 of 60 items have no text (title)" in caplog.text


def test_vectors_of_items_without_a_text_are_refused(folder, config, tmp_path):
    """Of a catalogue, and of new items."""
    section = TextSection(encoder=str(folder / "encoder"))
    bare = {"title": pa.array([None] * ITEMS, pa.string())}
    make_dataset(tmp_path / "data", items=ITEMS, described=bare)
    pq.write_table(pa.table({"item_id": [1007], "title": [""]}), new := tmp_path / "new.parquet")
    out = str(tmp_path / "vectors.parquet")
    with pytest.raises(UserError, match=re.escape(TEXTLESS)):
        encode(str(tmp_path / "data"), section, out, CPU)
    of_new = re.escape("none of the 1 items has a text (title)")
    with pytest.raises(UserError, match=of_new):
        encode(str(folder / "data"), section, out, CPU, str(new))
    assert not Path(out).exists()
    run = open_run(job.run(config({"name": "text"}, *SHORT)).path)
    with pytest.raises(UserError, match=of_new):
        unseen_items(run, new)
