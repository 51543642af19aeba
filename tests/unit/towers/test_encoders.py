"""Encoders of text: their kinds, where they are found, and which are refused."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file

from gr.adapters.insert import insert
from gr.adapters.section import AdapterSection
from gr.errors import UserError
from gr.modality import encoder as encoders
from gr.modality.encoder import config_of, load_tokenizer, transformers
from gr.modality.find import loaded
from gr.train.parts import build
from tests.packages import needs
from tests.towers import CLOSE, CPU, ITEMS, first_step, make_image_encoder

needs("transformers")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_prompt_is_words_before_a_text_and_no_part_of_its_vector(folder, pooling):
    """Words whose embeddings it has would do the same in its place."""
    encoder = encoders.TextEncoder(str(folder / "encoder"), pooling).eval()
    insert(encoder.model, AdapterSection(name="prompt", size=3), 7)
    words = torch.tensor([[5, 9, 11]]).expand(2, -1)
    ids, mask = torch.tensor([[2, 7, 8, 3], [2, 6, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        encoder.model.prompt.vectors.copy_(encoder.model.get_input_embeddings()(words[0]))
        whole = torch.cat([words, ids], 1), torch.cat([torch.ones_like(words), mask], 1)
        hidden = encoder.model(input_ids=whole[0], attention_mask=whole[1]).last_hidden_state[:, 3:]
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        wanted = hidden[:, 0] if pooling == "cls" else mean
        torch.testing.assert_close(encoder(ids, mask), wanted, **CLOSE)


def encoder_like(folder, path, name, **settings):
    """A tiny encoder of another kind, with the tokenizer of the folder's."""
    import transformers as package

    shutil.copytree(folder / "encoder", path, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 18, "hidden_size": 16}
    torch.manual_seed(0)
    package.AutoModel.from_config(getattr(package, name)(**layers | settings)).save_pretrained(path)
    return str(path)


def test_encoders_that_are_narrower_outside_than_inside(folder, config, tmp_path):
    """OPT's small ones give vectors as wide as a word's, Electra takes words narrower than what it gives."""
    opt = {"word_embed_proj_dim": 8, "ffn_dim": 32, "pad_token_id": 0}
    opt = encoder_like(folder, tmp_path / "opt", "OPTConfig", **opt)
    for tower in ({"mode": "tuned"}, {"mode": "adapters", "adapters": {"name": "prompt", "size": 3}}):
        items = build(config({"name": "text", "text": {"encoder": opt}, **tower}), CPU).model.items
        assert items.content.all().shape == (ITEMS, 8)
    electra = encoder_like(
        folder, tmp_path / "electra", "ElectraConfig", embedding_size=8, intermediate_size=32
    )
    tower = {"mode": "adapters", "adapters": {"name": "prompt", "size": 3}, "text": {"encoder": electra}}
    loss, gradients = first_step(build(config({"name": "text", **tower}), CPU))
    assert gradients["tables.items.encoder.model.prompt.vectors"].shape == (3, 8)


def test_an_encoder_that_counts_places_from_its_padding_has_fewer(folder, config, tmp_path):
    """RoBERTa: with two marks, and places for 7 of which one is the padding's and one before it."""
    settings = {"intermediate_size": 32, "max_position_embeddings": 7, "pad_token_id": 1}
    text = {"encoder": encoder_like(folder, tmp_path / "roberta", "RobertaConfig", **settings)}
    items = build(config({"name": "text", "mode": "tuned", "text": text}), CPU).model.items
    assert items.content.items.lengths_n.max() == 5 and items.catalogue().isfinite().all()
    tower = {"mode": "adapters", "adapters": {"name": "prompt", "size": 1}, "text": text}
    with pytest.raises(UserError, match="has places for 5"):
        build(config({"name": "text", **tower}), CPU)


def test_odd_encoders_are_refused(folder, config, tmp_path, monkeypatch):
    def refused(encoder):
        with pytest.raises(UserError) as found:
            build(config({"name": "text", "text": {"encoder": str(encoder)}}), CPU).model.items.catalogue()
        assert "\n" not in str(found.value)
        return str(found.value)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in (folder / "encoder").iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    assert "has no weights" in refused(pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert "are a pickle (pytorch_model.bin)" in refused(pickled)
    (pickled / "model.safetensors").write_bytes(b"not safe, and not long enough")
    assert "can't be loaded" in refused(pickled)
    make_image_encoder(tmp_path / "vit")
    assert "is a vit, which reads no text" in refused(tmp_path / "vit")
    some = {"embeddings.LayerNorm.bias": torch.zeros(16)}
    save_file(some, pickled / "model.safetensors", metadata={"format": "pt"})
    assert "has no weights for embeddings.LayerNorm.weight" in refused(pickled)
    (pickled / "config.json").unlink()
    assert "has no config.json" in refused(pickled)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refused("nobody/no-such-encoder")


def test_who_asks_the_hub_says_so_once(monkeypatch, caplog, capfd):
    """And not of each time that there was no answer."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    transformers()

    def load(encoder, local_files_only=False):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
        raise OSError("no answer\nat all")

    with pytest.raises(UserError, match=r"can't be loaded \(no answer\)"):
        loaded("nobody/nothing", load)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "encoder 'nobody/nothing' is fetched from the hub"
    ]
    assert "Retrying" not in capfd.readouterr().err


def test_code_that_comes_with_an_encoder_is_not_run(tmp_path, monkeypatch):
    """Nor is anybody asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Mine: pass\n")
    mine = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "mine.Mine")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": mine}))
    with pytest.raises(UserError, match="comes with code of its own, which is never run"):
        config_of(str(tmp_path))
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "was_run").exists()
