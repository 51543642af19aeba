"""Towers that can't be are refused in a sentence."""

from __future__ import annotations

import pytest

from gr.errors import UserError
from gr.train import job
from gr.train.parts import build
from tests.towers import CPU, SHORT


@pytest.mark.parametrize(
    ("tower", "overrides", "sentence"),
    [
        ({"name": "text", "text": {"encoder": "./nowhere"}}, [], "no folder './nowhere' with an encoder"),
        ({"name": "text", "text": {"encoder": "package:no_such_package"}}, [], "make setup-encoders"),
        ({"name": "text", "mode": "cached", "text": None}, [], "mode cached reads vectors from a file"),
        ({"name": "text", "mode": "cached", "vectors": "no.parquet"}, [], "no file 'no.parquet'"),
        ({"name": "text", "mode": "tuned", "text": None}, [], "mode tuned needs an encoder"),
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
