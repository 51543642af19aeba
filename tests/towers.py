"""A tiny encoder of text with real files, and a tiny dataset whose items have titles."""

from __future__ import annotations

from pathlib import Path

import torch

from gr.data.dataset import SequenceDataset
from tests.end_to_end.tiny import make_dataset

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
