"""Encoders of text called for a step: one lookup of words for all its chunks, attention as it is written where texts
are short, and what transformers itself gives."""

from __future__ import annotations

import pytest
import torch

from gr.config import validate
from gr.modality.encoder import PLAIN, TextEncoder
from gr.modality.reader import TextReader, TextSection
from tests.packages import needs
from tests.towers import CLOSE, CPU, make_encoder

needs("transformers")
WORDS, WIDTH = 40, 16


def saved(path, kind):
    """An encoder of a ``kind`` of transformers with random weights."""
    import transformers

    bert = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    sizes = {
        "Bert": bert,
        "Roberta": bert,
        "MPNet": bert,
        "DistilBert": {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "OPT": {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
        },
    }
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS, max_position_embeddings=24, pad_token_id=1, **sizes[kind]
    )
    model = getattr(transformers, f"{kind}Model")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return str(path)


def texts(*shape, seed=0):
    """Ids and mask of texts of which each second one is shorter than the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids_nL = torch.randint(4, WORDS, shape, generator=generator)
    mask_nL = torch.ones_like(ids_nL)
    mask_nL[::2, shape[1] // 2 :] = 0
    return torch.where(mask_nL == 1, ids_nL, 1), mask_nL


def gradients(outputs, encoder):
    """Of every parameter, for gradients of the outputs that are unlike each other."""
    encoder.zero_grad()
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(outputs, [torch.randn(out.shape, generator=generator) for out in outputs])
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet", "DistilBert", "OPT"])
def test_words_looked_up_for_all_chunks_are_those_of_each(tmp_path, kind):
    encoder = TextEncoder(saved(tmp_path, kind), "mean")
    chunks = [texts(3, 8), texts(1, 5, seed=1), texts(4, 8, seed=2)]
    one_by_one = [encoder(*chunk) for chunk in chunks]
    expected = gradients(one_by_one, encoder)
    together = [encoder(*inputs) for inputs in encoder.prepared(chunks)]
    assert all(torch.equal(one, other) for one, other in zip(one_by_one, together, strict=True))
    found = gradients(together, encoder)
    assert found.keys() == expected.keys() and any("embed" in name for name in found)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1.0)
        torch.testing.assert_close(found[name] / scale, gradient / scale, **CLOSE, msg=name)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet", "DistilBert", "OPT"])
@pytest.mark.parametrize("plain", [False, True])
def test_vectors_are_those_of_transformers(tmp_path, kind, plain):
    from transformers import AutoModel

    path = saved(tmp_path, kind)
    encoder, model = TextEncoder(path, "mean", plain=plain).eval(), AutoModel.from_pretrained(path).eval()
    ids_nL, mask_nL = texts(4, 8)
    with torch.no_grad():
        hidden = model(input_ids=ids_nL, attention_mask=mask_nL).last_hidden_state
        expected = (hidden * mask_nL[:, :, None]).sum(1) / mask_nL.sum(1, keepdim=True)
        torch.testing.assert_close(encoder(ids_nL, mask_nL), expected, **CLOSE)


def test_one_lookup_of_a_step_writes_one_gradient_of_the_table(tmp_path):
    """What a lookup a chunk would cost: a gradient as large as the table for each."""
    encoder = TextEncoder(saved(tmp_path, "Bert"), "mean")
    seen = []
    encoder.model.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given))
    outputs = [encoder(*inputs) for inputs in encoder.prepared([texts(2, 8), texts(2, 6), texts(2, 8)])]
    assert len(outputs) == 3 and len(seen) == 1
    assert list(encoder.prepared([])) == []


def test_an_encoder_that_takes_tokens_alone_is_given_these(tmp_path):
    encoder = TextEncoder(saved(tmp_path, "Bert"), "cls")
    chunks = [texts(3, 8), texts(2, 5, seed=1)]
    expected = [encoder(*chunk) for chunk in chunks]
    whole = encoder.model.forward
    encoder.model.forward = lambda input_ids, attention_mask: whole(input_ids, attention_mask)
    found = [encoder(*inputs) for inputs in encoder.prepared(chunks)]
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize(("most", "how"), [(PLAIN, "eager"), (PLAIN + 1, "sdpa")])
def test_attention_of_short_texts_is_computed_as_it_is_written(tmp_path, most, how):
    section = validate(TextSection, {"encoder": str(make_encoder(tmp_path / "e")), "max_tokens": most}, "")
    reader = TextReader(section, CPU)
    before = reader.fingerprint
    assert reader.encoder().config._attn_implementation == how
    assert reader.fingerprint == before, "what is kept beside a dataset is what it was"
