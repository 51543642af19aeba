"""Texts of items: columns of a catalogue through a template, then tokens, jagged.

Shapes: n items, V tokens of all of them.
"""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.errors import UserError
from gr.modality.digest import digest

log = logging.getLogger(__name__)

CHARACTERS_A_TOKEN = 64
"""No more characters of a text than so many for each token that is kept are given to a tokenizer."""
AT_ONCE = 4096
"""Texts that are made, or tokenised, at a time."""
SPECIMEN = "The red, RED & naïve Ärger: don't pay $1,234.50 (50 %) for l'été/3x2cm #no_1 東京タワー, сад, قمر 🙂\t..."
FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "roberta-prelayernorm",
)
"""Kinds of encoders that have fewer places than they say."""


class Template:
    """``fields`` of the catalogue one after another, or a text with their names in braces: "{title}. {plot}"."""

    def __init__(self, fields: Sequence[str], template: str | None) -> None:
        self.pattern = template if template is not None else " ".join(f"{{{field}}}" for field in fields)
        try:
            parsed = list(string.Formatter().parse(self.pattern))  # no more: it would look into values
        except ValueError as error:
            raise UserError(f"template {self.pattern!r} can't be read ({error}): correct it") from None
        self.names = [name for _, name, _, _ in parsed if name is not None]
        plain = all(name and not spec and not how for _, name, spec, how in parsed if name is not None)
        if not self.names or not plain:
            raise UserError(
                f"template {self.pattern!r} must have names of the catalogue's columns in braces and "
                "nothing else there, such as '{title}'"
            )
        self._parsed = [(literal, name) for literal, name, _, _ in parsed]

    def texts(self, column: Callable[[str], Any], rows: int) -> tuple[list[str], int]:
        """The text of each item, white space made one blank each, and how many items have nothing in any column that
        it names; ``column``: gives a column of theirs."""
        values = {name: as_texts(name, column(name), rows) for name in dict.fromkeys(self.names)}
        texts, empty = [], 0
        for row in zip(*values.values()):
            said = dict(zip(values, row))
            empty += not any(value.strip() for value in row)
            text = "".join(literal + (said[name] if name else "") for literal, name in self._parsed)
            texts.append(" ".join(text.split()))
        return texts, empty


def as_texts(name: str, column: Any, rows: int) -> list[str]:
    """A column as texts: of lists their elements with a blank between them, of nothing an empty text."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if len(array) != rows:
        raise UserError(f"column '{name}' has {len(array)} rows and there are {rows} items")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not _is_readable(array.type):
        raise UserError(
            f"column '{name}' is of type {array.type}, which is no text: give items text, numbers or lists of these"
        )
    return [_text(value) for value in array.to_pylist()]


def _is_readable(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    bytes_kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return not pa.types.is_nested(kind) and not any(is_kind(kind) for is_kind in bytes_kinds)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(_text(part) for part in value)
    return str(value)


@dataclass(frozen=True)
class Tokens:
    """ids_V: int32; item i has those from offsets_n1[i] to offsets_n1[i + 1] (int64), one at least.  pad: the id that
    stands behind the shorter ones (some encoders count places by it)."""

    offsets_n1: Tensor
    ids_V: Tensor
    pad: int = 0

    def __len__(self) -> int:
        return len(self.offsets_n1) - 1

    @property
    def lengths_n(self) -> Tensor:
        return self.offsets_n1.diff()

    def inputs(self, rows_m: Tensor) -> tuple[Tensor, ...]:
        """(m, L) ids and mask of items ``rows_m``, both int64, as long as the longest of them."""
        lengths_m = self.lengths_n[rows_m]
        longest = int(lengths_m.max()) if len(rows_m) else 0
        place_L = torch.arange(longest)
        mask_mL = place_L < lengths_m[:, None]
        source_mL = (self.offsets_n1[rows_m, None] + place_L).clamp_max(len(self.ids_V) - 1)
        return torch.where(mask_mL, self.ids_V[source_mL].long(), self.pad), mask_mL.long()

    @property
    def held(self) -> int:
        return self.ids_V.nbytes + self.offsets_n1.nbytes

    @staticmethod
    def shaped(count: int, length: int) -> tuple[Tensor, ...]:
        """(m, L) ids and mask."""
        return torch.zeros(count, length, dtype=torch.int64), torch.ones(count, length, dtype=torch.int64)

    def to_table(self) -> pa.Table:
        lists = pa.ListArray.from_arrays(self.offsets_n1.int().numpy(), self.ids_V.numpy())
        return pa.table({"tokens": lists})

    @staticmethod
    def of_table(table: pa.Table, pad: int) -> Tokens:
        lists = table["tokens"].combine_chunks()
        offsets = torch.tensor(lists.offsets.to_numpy(), dtype=torch.int64)
        return Tokens(offsets - offsets[0], torch.tensor(lists.flatten().to_numpy(), dtype=torch.int32), pad)


@dataclass(frozen=True)
class Unread:
    """Texts of ``rows`` items of which a plan knows no more than that each has ``most`` tokens at most."""

    rows: int
    most: int

    @property
    def lengths_n(self) -> Tensor:
        return torch.tensor([self.most]).expand(self.rows)  # a number in memory

    @property
    def held(self) -> int:
        return 4 * self.rows * self.most + 8 * (self.rows + 1)

    shaped = staticmethod(Tokens.shaped)

    def inputs(self, rows_m: Tensor) -> tuple[Tensor, ...]:
        raise TypeError("texts that nobody has read are for plans")


def tokenised(texts: Sequence[str], tokenizer: Any, most: int) -> Tokens:
    """``texts`` as their tokenizer writes them, cut to ``most`` tokens with what marks begin and end.

    A text of megabytes costs no more than one of ``most`` tokens."""
    limit = CHARACTERS_A_TOKEN * most
    marks = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    nothing = next((mark for mark in marks if mark is not None), 0)
    lists: list[list[int]] = []
    for start in range(0, len(texts), AT_ONCE):
        some = [text[:limit] for text in texts[start : start + AT_ONCE]]
        ids = tokenizer(some, truncation=True, max_length=most, padding=False)["input_ids"]
        lists += [of_text or [nothing] for of_text in ids]
    lengths = torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
    flat = torch.tensor([token for ids in lists for token in ids], dtype=torch.int32)
    return Tokens(F.pad(lengths.cumsum(0), (1, 0)), flat, tokenizer.pad_token_id or 0)


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells a tokenizer from others, whatever a release of tokenizers writes of it: its vocabulary, and how it
    cuts a text with something of everything in it.  32 hexadecimal digits."""
    said = [sorted(tokenizer.get_vocab().items()), tokenizer(SPECIMEN)["input_ids"]]
    return digest(json.dumps(said))


def say_empty(empty: int, items: int, columns: Sequence[str]) -> None:
    """A line where items have no text: they all have one vector."""
    if empty:
        log.warning(
            "%s of %s items have no text (%s): they share one vector",
            f"{empty:,}",
            f"{items:,}",
            ", ".join(columns),
        )


def places_of(config: Any) -> int | None:
    """How many tokens an encoder has places for; None where it says nothing of it."""
    places = getattr(config, "max_position_embeddings", None)
    if places is None or places < 1:
        return None
    # RoBERTa and its kin count places from the one behind the padding's
    taken = (config.pad_token_id or 0) + 1 if config.model_type in FROM_PADDING else 0
    return int(places) - taken


def most_tokens(tokenizer: Any, config: Any, wanted: int) -> int:
    """``wanted``, or as many as the encoder has places for."""
    most = min(wanted, places_of(config) or wanted, tokenizer.model_max_length)
    if most <= (marks := tokenizer.num_special_tokens_to_add()):
        raise UserError(
            f"max_tokens is {wanted}, and the encoder puts {marks} marks around a text, so that it would read nothing "
            f"of it: set it to {marks + 1} at least"
        )
    return most
