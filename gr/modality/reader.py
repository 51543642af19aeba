"""How items become what an encoder takes, and vectors: an encoder with what it reads, as a config says it; of text.

Shapes: I items of a catalogue, E width of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from typing import Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from gr.config import POSITIVE, Section
from gr.embeddings.shares import Shares
from gr.errors import UserError, nearest
from gr.modality import vectors
from gr.modality.content import Items, encoded
from gr.modality.digest import digest
from gr.modality.encoder import (
    PLAIN,
    POOLING,
    Encoder,
    TextEncoder,
    config_of,
    load_tokenizer,
    settings_digest,
    unread,
    width_of,
)
from gr.modality.surroundings import Described
from gr.modality.texts import (
    AT_ONCE,
    Template,
    Tokens,
    Unread,
    most_tokens,
    say_empty,
    tokenised,
    tokenizer_digest,
)
from gr.processes import Processes
from gr_kernels.tracing import on_paper_now


class TextSection(Section):
    """How a text becomes a vector.  encoder: a folder, ``package:NAME`` or a name at the hub.  fields, template: the
    columns of the catalogue, or a text with their names in braces.  batch: texts that it takes at once."""

    encoder: str
    pooling: POOLING = "mean"
    fields: Annotated[list[str], Field(min_length=1)] = ["title"]
    template: str | None = None
    max_tokens: POSITIVE = 32
    batch: POSITIVE = 128

    def idle(self) -> dict[str, str]:
        return {} if self.template is None else {"fields": "template says which columns"}

    def parsed(self) -> Template:
        """How columns become a text."""
        return Template(self.fields, self.template)

    def texts(self, column: Any, names: Iterable[str], rows: int) -> tuple[list[str], int]:
        """The text of each of ``rows`` items, and how many have nothing to read; ``names``: the columns that there
        are."""
        template = self.parsed()
        for name in template.names:
            if name not in names:
                raise UserError(
                    f"model.item_tower reads column '{name}', which is none of the items': {nearest(name, names)}"
                )
        return template.texts(column, rows)


class Reader(ABC):
    """What an encoder reads of items, and the vectors that it gives them where nothing moves it.

    section: has encoder, pooling and batch.  ``width``: E.
    """

    reads: Literal["text", "pictures"]

    def __init__(self, section: Any, processes: Processes) -> None:
        self.section, self.processes = section, processes
        self.config = config_of(section.encoder)
        if unread(self.config) == self.reads:
            raise UserError(
                f"encoder '{section.encoder}' is a {self.config.model_type}, which reads no {self.reads}: choose "
                "one that does"
            )
        self.width = width_of(self.config)

    @abstractmethod
    def encoder(self, dropout: float = 0.0) -> Encoder:
        """With its pre-trained weights, on the processes' device."""

    @cached_property
    def weights_digest(self) -> str:
        """Of the encoder, which is loaded for it where it wasn't yet."""
        return self.encoder().weights_digest()

    @property
    def fingerprint(self) -> str:
        """The encoder's weights and its kind: 32 hexadecimal digits."""
        return digest(self.weights_digest + self.config.to_json_string())

    @abstractmethod
    def items(self, catalogue: Described) -> Items:
        """What it reads of the whole catalogue."""

    @abstractmethod
    def check(self, catalogue: Described) -> None:
        """Refuse a catalogue of which it can't read what the config says, before anything is made of a run."""

    @abstractmethod
    def foreseen(self, catalogue: Described) -> Items:
        """The same for a plan, as far as it can be read where the plan is made."""

    @abstractmethod
    def items_in(self, items: pa.Table) -> Items:
        """What it reads of items that a table describes."""

    @abstractmethod
    def about(self, items: Any) -> dict[str, Any]:
        """What tells these items' contents from others (JSON)."""

    @abstractmethod
    def read_of(self, catalogue: Described) -> dict[str, str]:
        """Of :meth:`made_of`, what is about the items and how they are read."""

    def made_of(self, catalogue: Described) -> dict[str, str]:
        """See :meth:`gr.embeddings.table.Table.made_of`; all processes ask together."""
        return {"settings": settings_digest(self.config)} | self.read_of(catalogue)

    def said(self, items: Any) -> None:  # noqa: B027  (most have nothing to say)
        """A line in the log about those that couldn't be read, if it hasn't been said; all processes call this
        together."""

    def vectors_of(self, items: pa.Table) -> Tensor:
        """(n, E) float32 of n items that a table describes; all processes ask together."""
        return self.processes.world.gather(self.shares_of(items).own_RE)

    def shares_of(self, items: pa.Table) -> Shares:
        """The same, a stretch on each process."""
        return self.encoded(self.encoder(), self.items_in(items))

    def vectors(self, catalogue: Described) -> Tensor:
        """(I, E) float32 of the whole catalogue, kept beside the dataset; all processes ask together."""
        return self.processes.world.gather(self.shares(catalogue).own_RE)

    def shares(self, catalogue: Described) -> Shares:
        """The same, a stretch on each process; the first one reads what is kept, and keeps what is new, for all."""
        items, processes = self.items(catalogue), self.processes
        about = {
            "encoder": self.fingerprint,
            "pooling": self.section.pooling,
            "batch": self.section.batch,
            **self.about(items),
        }
        whole_IE = torch.empty(0, self.width)
        table = catalogue.kept("vectors", about) if processes.is_main else None
        if table is not None:
            whole_IE = vectors.of_table(table, "what is kept beside the dataset")
        if processes.broadcast(table is not None):
            return Shares.dealt(catalogue.rows, whole_IE, processes.world)
        found = self.encoded(self.encoder(), items)
        whole_IE = found.collected()
        if processes.is_main:
            ids = catalogue.column("item_id").combine_chunks()
            catalogue.keep("vectors", about, vectors.as_table(ids, whole_IE))
        return found

    def encoded(self, encoder: Encoder, items: Items) -> Shares:
        """All ``items`` by that encoder, and a line about those that couldn't be read."""
        found = encoded(encoder, items, self.processes, self.section.batch)
        self.said(items)
        return found


class TextReader(Reader):
    """Texts of items as tokens, and as vectors."""

    reads = "text"

    def __init__(self, section: TextSection, processes: Processes) -> None:
        super().__init__(section, processes)
        self.section: TextSection = section
        self.tokenizer: Any = None if on_paper_now() else load_tokenizer(section.encoder)
        self._tokens: str | None = None
        """The digest of the catalogue's, when they have been read."""

    def encoder(self, dropout: float = 0.0) -> TextEncoder:
        device, section = self.processes.device, self.section
        plain = device.type == "cpu" and section.max_tokens <= PLAIN
        return TextEncoder(section.encoder, section.pooling, dropout, plain=plain).to(device)

    def tokens_of(self, column: Any, names: Iterable[str], rows: int) -> Tokens:
        """The tokens of items' texts."""
        texts, empty = self.section.texts(column, names, rows)
        if self.processes.is_main:
            say_empty(empty, rows, self.section.parsed().names)
        return tokenised(texts, self.tokenizer, self._most)

    def items_in(self, items: pa.Table) -> Tokens:
        self._check_some(items.column, items.column_names, len(items))
        return self.tokens_of(items.column, items.column_names, len(items))

    def items(self, catalogue: Described) -> Tokens:
        """Of the whole catalogue, kept beside the dataset."""
        self.check(catalogue)
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # as a call leaves it behind, which is no part of what it is
        backend.no_padding()
        about = {
            "template": self.section.parsed().pattern,
            "tokenizer": digest(backend.to_str()),
            "most": self._most,
        }
        if (table := catalogue.kept("tokens", about)) is not None:
            tokens = Tokens.of_table(table, self.tokenizer.pad_token_id or 0)
        else:
            tokens = self.tokens_of(catalogue.column, catalogue.column_names, catalogue.rows)
            if self.processes.is_main:
                catalogue.keep("tokens", about, tokens.to_table())
        self._tokens = self.about(tokens)["tokens"]
        return tokens

    def check(self, catalogue: Described) -> None:
        self._check_some(catalogue.column, catalogue.column_names, catalogue.rows)
        assert self._most

    def _check_some(self, column: Any, names: Iterable[str], rows: int) -> None:
        """Refuse items of which none has a text: all would be one.  Reads no more of them than it takes to find one."""
        for start in range(0, rows, AT_ONCE):
            some = min(AT_ONCE, rows - start)
            _, empty = self.section.texts(lambda name: column(name).slice(start, some), names, some)  # noqa: B023
            if empty < some:
                return
        raise UserError(
            f"none of the {rows:,} items has a text ({', '.join(self.section.parsed().names)}): set fields or template "
            "to columns that have one",
            everywhere=True,
        )

    def read_of(self, catalogue: Described) -> dict[str, str]:
        if self._tokens is None:
            self.items(catalogue)
        assert self._tokens is not None
        return {"tokenizer": tokenizer_digest(self.tokenizer), "tokens": self._tokens}

    def foreseen(self, catalogue: Described) -> Tokens | Unread:
        """Of texts that aren't there, or that no tokenizer is there for, the longest that there can be."""
        if list(catalogue.column_names):
            with suppress(UserError):
                self.tokenizer = load_tokenizer(self.section.encoder)
        if self.tokenizer is not None:
            return self.items(catalogue)
        places = getattr(self.config, "max_position_embeddings", None)
        return Unread(catalogue.rows, min(self.section.max_tokens, places or self.section.max_tokens))

    def about(self, items: Any) -> dict[str, Any]:
        return {"tokens": digest(items.ids_V.numpy().tobytes() + items.offsets_n1.numpy().tobytes())}

    @property
    def _most(self) -> int:
        return most_tokens(self.tokenizer, self.config, self.section.max_tokens)
