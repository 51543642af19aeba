"""Texts of items, as tokens."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from gr.errors import UserError
from gr.modality.chunks import BUCKET, chunks
from gr.modality.content import encoded
from gr.modality.reader import TextReader, TextSection
from gr.modality.texts import Template, as_texts, tokenised
from tests.towers import CLOSE, CPU, ITEMS, titles


def test_templates():
    columns = {"title": ["a  b", None], "tags": [["x", "y"], []], "year": [1999, 2000]}

    def texts(fields, template=None):
        return Template(fields, template).texts(lambda name: pa.array(columns[name]), 2)

    assert texts(["title", "tags"]) == (["a b x y", ""], 1)
    assert texts([], "{title} ({year})") == (["a b (1999)", "(2000)"], 0)
    assert texts([], "called {title}") == (["called a b", "called"], 1)
    assert Template([], "{title.real}").names == ["title.real"]  # a column, and nothing of a value
    for wrong in ("no field", "{title", "{}", "{title!r}", "{title:>99999999999}"):
        with pytest.raises(UserError, match="template"):
            Template(["title"], wrong)
    for column in ([b"\xff"], [{"a": 1}], [[{"a": 1}]]):
        with pytest.raises(UserError, match="which is no text"):
            as_texts("title", pa.array(column), 1)
    assert as_texts("title", pa.array(["a", None]).dictionary_encode(), 2) == ["a", ""]


def test_a_tokenizer_is_given_no_more_of_a_text_than_can_count(folder):
    reader, given = TextReader(TextSection(encoder=str(folder / "encoder")), CPU), []

    class Watching:
        def __getattr__(self, name):
            return getattr(reader.tokenizer, name)

        def __call__(self, texts, **settings):
            given.extend(map(len, texts))
            return reader.tokenizer(texts, **settings)

    tokenised(["red " * 100_000, "blue"], Watching(), 8)
    assert given == [8 * 64, 4]


def test_odd_texts_have_vectors(folder, caplog):
    reader = TextReader(TextSection(encoder=str(folder / "encoder"), max_tokens=8), CPU)
    texts = ["", None, "   \n ", "red " * 2_500_000, "🙂" * 40, "סבון لليدين", "a\0b\u202e red"]
    tokens = reader.tokens_of(lambda name: pa.array(texts), ["title"], len(texts))
    assert tokens.lengths_n.tolist()[:4] == [2, 2, 2, 8] and tokens.lengths_n.max() == 8
    assert "3 of 7 items have no text (title)" in caplog.text
    assert encoded(reader.encoder(), tokens, CPU, 4).own_RE.isfinite().all()
    short = TextReader(TextSection(encoder=str(folder / "encoder"), max_tokens=2), CPU)
    with pytest.raises(UserError, match=r"max_tokens is 2, .* set it to 3 at least"):
        short.tokens_of(lambda name: pa.array(texts), ["title"], len(texts))


def test_texts_of_a_chunk_are_about_as_long():
    """None is padded by as many tokens as a bucket has, none is left out."""
    lengths = torch.randint(1, 160, (300,), generator=torch.Generator().manual_seed(0))
    parts = chunks(lengths, 64)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    assert all(1 <= len(part) <= 64 for part in parts) and len(parts) <= 160 // BUCKET
    assert all(lengths[part].max() - lengths[part].min() < BUCKET for part in parts)


def test_a_text_is_encoded_by_itself(folder, config):
    """Whatever it is padded beside."""
    reader = TextReader(TextSection(encoder=str(folder / "encoder")), CPU)
    encoder = reader.encoder()
    tokens = tokenised([t or "" for t in titles()], reader.tokenizer, 20)
    widths = []
    watch = encoder.register_forward_pre_hook(lambda module, given: widths.append(given[0].shape[1]))
    together = encoded(encoder, tokens, CPU, 16).own_RE
    watch.remove()
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]  # what takes longest comes first
    with torch.no_grad():
        for item in range(0, ITEMS, 7):
            alone = encoder(*tokens.inputs(torch.tensor([item])))
            torch.testing.assert_close(together[item], alone[0], **CLOSE)
