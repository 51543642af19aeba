"""Tiny encoders with real files, a tiny dataset whose items have titles, pictures of them, and what tests ask of runs
on these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gr.data.dataset import SequenceDataset
from gr.models.step import StepContext
from gr.processes import Processes
from tests.end_to_end.tiny import CONFIG, make_dataset
from tests.precision import tolerance

if TYPE_CHECKING:
    from gr.train.parts import Parts
    from gr.train.runs import OpenRun

WORDS = (
    "red",
    "blue",
    "soft",
    "hard",
    "soap",
    "cream",
    "brush",
    "oil",
    "for",
    "hair",
    "hands",
    "you",
    "new",
    "old",
)
ITEMS = 60
CPU = Processes(torch.device("cpu"))
# Two layers of width 16 on ten tokens, a head, an encoder of width 16 and a loss of 17 terms, all of unit size
CLOSE = tolerance(64, stages=12, size=10.0)
PLAIN = ("model.input.dropout=0", "model.encoder.dropout=0", "train.clip_norm=null")
SHORT = ("objective={name: sampled_softmax, negatives: 16}", "train.max_steps=1", "eval.splits=[]")
FEW = "train.global_batch=2"  # of two users, who have not seen all items


def titles(items: int = ITEMS) -> list[str | None]:
    """Of one to nine words; one is empty and one is missing."""
    found: list[str | None] = []
    for item in range(items):
        count = 1 + item * 7 % 9
        found.append(" ".join(WORDS[(item * (3 + word) + word) % len(WORDS)] for word in range(count)))
    found[3], found[5] = "", None
    return found


def make_titled(path: Path) -> SequenceDataset:
    return make_dataset(path, items=ITEMS, described={"title": titles()})


def make_encoder(path: Path, width: int = 16, seed: int = 0) -> Path:
    """A BERT of two layers with random weights and a tokenizer of few words, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **names)
    fast.save_pretrained(path)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=24,
        initializer_range=0.3,  # else all texts have about one vector
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    return path


def tower_job(folder: Path, name: str, tower: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """A job (tests/distributed/jobs.py) in ``folder``, which has ``data`` with titles and an ``encoder`` of these: run
    NAME, whose losses hang on no process."""
    file = folder / f"{name}.yaml"
    file.write_text(CONFIG.format(run=folder / name, data=folder / "data"))
    asked = {"name": "text", "text": {"encoder": str(folder / "encoder")}, **tower}
    plain = ["model.input.dropout=0", "model.encoder.dropout=0", "train.clip_norm=null"]
    return {"config": file, "overrides": [f"model.item_tower={json.dumps(asked)}", *plain, *overrides]}


def make_pictures(folder: Path, items: int = ITEMS) -> Path:
    """ITEM.png or .jpg, a colour and a gradient each; item 4 has none, 6 is cut off, 8 is text, 9 says it is huge."""
    from PIL import Image

    folder.mkdir()
    ramp = np.linspace(0, 1, 24)[:, None, None] * np.ones((24, 20, 3))
    for item in range(items):
        colour = np.array([item * 37 % 256, item * 91 % 256, item * 53 % 256])
        pixels = Image.fromarray((ramp * colour).astype(np.uint8))
        pixels.save(folder / f"{item}.{'png' if item % 2 else 'jpg'}")
    (folder / "4.jpg").unlink()
    (folder / "6.jpg").write_bytes((folder / "6.jpg").read_bytes()[:200])
    (folder / "8.jpg").write_bytes(b"<html>not found</html>")
    Image.new("1", (9_000, 9_000)).save(folder / "9.png")
    return folder


def make_image_encoder(path: Path, kind: str = "vit") -> Path:
    """A tiny ViT, DeiT, MAE, Swin or ResNet with random weights."""
    import transformers as package

    torch.manual_seed(0)
    small = {"image_size": 16, "patch_size": 8, "initializer_range": 0.3}
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    swin = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    config = {
        "vit": lambda: package.ViTConfig(**small, **layers),
        "deit": lambda: package.DeiTConfig(**small, **layers),
        "mae": lambda: package.ViTMAEConfig(**small, **layers),
        "swin": lambda: package.SwinConfig(**swin, window_size=2),
        "resnet": lambda: package.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    }[kind]()
    model = package.AutoModel.from_config(config)
    for name, parameter in model.named_parameters():  # of some kinds transformers leaves these at zero
        if name.endswith(("_token", "position_embeddings")):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


def first_step(parts: Parts, cut: int | None = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first global batch, which is cut into micro-batches of ``cut`` actions."""
    batch = next(parts.batches.epoch(0)).share
    pieces = [parts.model.supervise(p, 7) for p in batch.split(cut or 10**6)]
    loss = parts.engine.forward_backward(pieces, StepContext(7), sum(p.count for p in pieces))
    return loss.item(), {name: p.grad.clone() for name, p in parts.model.named_dense() if p.grad is not None}


def scores_of(parts_or_run: Parts | OpenRun) -> Tensor:
    """(5, I) of five random queries."""
    with torch.no_grad():
        model = parts_or_run.model
        queries = torch.randn(5, model.items.dim, generator=torch.Generator().manual_seed(0))
        return model.similarity.scores(model.items, queries)
