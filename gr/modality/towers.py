"""Item towers by name: what a config asks for as ``model.item_tower``, and the table that stands for it.

    id      a table of the run's ``model.table``: a row an item; it may start from content
    text    a row is formed from the item's text
    image   from its picture
    fused   from one of these and from a row of its id

A tower's ``mode`` says what of the encoder trains: ``frozen`` and ``cached`` nothing (its vectors are computed once, or
read from a file), ``tuned`` all of it, ``adapters`` small modules inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, NoReturn

import pyarrow as pa
import torch
from pydantic import Field, model_validator
from torch import Tensor

from gr.adapters.insert import freeze_layers, insert
from gr.adapters.section import ADAPTERS, AdapterSection
from gr.config import COUNT, FRACTION, POSITIVE, ComponentConfig, Section
from gr.embeddings.shares import Shares
from gr.embeddings.table import Table, TableSpec, filled_now
from gr.errors import UserError
from gr.modality import vectors
from gr.modality.content import Content, Encoded, Fixed, FixedShares
from gr.modality.encoder import Encoder
from gr.modality.head import Fusion, Head, HeadSection
from gr.modality.image_reader import ImageReader, ImageSection
from gr.modality.reader import Reader, TextReader, TextSection
from gr.modality.refreshed import Refreshed
from gr.modality.surroundings import Surroundings
from gr.modality.texts import places_of
from gr.modality.tower import DealtTower, Tower
from gr.processes import Processes
from gr_kernels.tracing import on_paper_now, with_numbers


class StartSection(Section):
    """What a table's first rows are made of: the vectors in a file (``vectors``), or of an encoder (``text``,
    ``image``), on their principal axes, with the spread of ``model.table_std``."""

    vectors: str | None = None
    text: TextSection | None = None
    image: ImageSection | None = None

    @model_validator(mode="after")
    def _one(self) -> StartSection:
        if [self.vectors, self.text, self.image].count(None) != 2:
            raise ValueError("give it one of vectors (a file), text and image (encoders)")
        return self


class Id:
    """A table with a row an item.  start: its first rows are a projection of content; else they are random."""

    class Config(ComponentConfig):
        name: Literal["id"] = "id"
        start: StartSection | None = None

        def build(self, around: Surroundings) -> Table:  # type: ignore[override]
            table: Table = around.table.build(around.spec, around.processes)
            if self.start is not None and filled_now() and not on_paper_now():
                start_from(table, around.spec, _content_of(self.start, around))
            return table


def _content_of(start: StartSection, around: Surroundings) -> Tensor:
    if start.vectors is not None:
        return vectors.read_file(start.vectors, around.catalogue.column("item_id").combine_chunks())
    return _reader(start.text, start.image, around.processes).vectors(around.catalogue)


def _reader(text: TextSection | None, image: ImageSection | None, processes: Processes) -> Reader:
    """Of the one that there is."""
    if image is not None:
        return ImageReader(image, processes)
    assert text is not None
    return TextReader(text, processes)


@torch.no_grad()
def start_from(table: Table, spec: TableSpec, content_IE: Tensor) -> None:
    """Give this process's rows of a table their part of a projection of content."""
    first_ID = vectors.projected(content_IE.cpu(), spec.dim, spec.std)
    for piece in table.pieces():
        if piece.column == "weight":
            rows, columns = piece.values_RC.shape
            piece.values_RC.copy_(first_ID[piece.row0 : piece.row0 + rows, piece.col0 : piece.col0 + columns])
    table.refilled()


class ContentConfig(ComponentConfig):
    """mode: what of the encoder trains.  text, image: the encoder and what it reads (not of ``cached``).  vectors: a
    Parquet file of item_id and vector (of ``cached``).  head: from content to an item's vector.  adapters: what is put
    into the encoder (of ``adapters``).  freeze: so many of a tuned encoder's first layers, and its embeddings, stay as
    they are.  dropout: inside an encoder that trains.  recompute: of what such a one forms keep nothing for the
    backward pass, and form it again there: less memory, a third more time.  refresh: of items that stand in no sequence
    and are no target of the global batch an encoder that trains forms vectors every so many steps alone, for all of the
    catalogue, and gets no gradient through them; in every step and with gradients where nothing is said."""

    mode: Literal["frozen", "cached", "tuned", "adapters"] = "frozen"
    text: TextSection | None = None
    image: ImageSection | None = None
    vectors: str | None = None
    head: HeadSection = HeadSection()
    adapters: ADAPTERS = AdapterSection()
    freeze: COUNT = 0
    dropout: FRACTION = 0.0
    recompute: bool = False
    refresh: POSITIVE | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> ContentConfig:
        if self.mode == "cached" and self.vectors is None:
            raise ValueError("mode cached reads vectors from a file: set vectors, or choose mode frozen")
        sections = {"text": self.text, "image": self.image}
        own = (
            {self.name: sections[self.name]} if self.name in sections else sections
        )  # a fused tower has either
        for name in sections.keys() - own.keys():
            if sections[name] is not None:
                raise ValueError(f"a tower of name {self.name} reads no {name}")
        if self.mode != "cached" and sum(section is not None for section in own.values()) != 1:
            wanted = " or ".join(f"{name}.encoder" for name in own)
            raise ValueError(f"mode {self.mode} needs an encoder, and one only: set {wanted}")
        return self

    def idle(self) -> dict[str, str]:
        training = ("dropout", "recompute", "refresh")
        used = {
            "frozen": (),
            "cached": ("vectors",),
            "tuned": ("freeze", *training),
            "adapters": ("adapters.name", "adapters.size", "adapters.norms", *training),
        }
        keys = dict.fromkeys(key for keys in used.values() for key in keys)
        idle = {key: f"mode is {self.mode}" for key in keys if key not in used[self.mode]}
        encoders = dict.fromkeys(("text", "image"), "mode is cached, and vectors come from a file")
        return idle | encoders if self.mode == "cached" else idle


class Text:
    """Rows formed from text."""

    class Config(ContentConfig):
        name: Literal["text"] = "text"

        def build(self, around: Surroundings) -> Tower:  # type: ignore[override]
            return _tower(self, around)


class Image:
    """Rows formed from pictures."""

    class Config(ContentConfig):
        name: Literal["image"] = "image"

        def build(self, around: Surroundings) -> Tower:  # type: ignore[override]
            return _tower(self, around)


class Fused:
    """Rows formed from text or pictures and from a table of ids."""

    class Config(ContentConfig):
        """fusion: see :class:`gr.modality.head.Fusion`.  id_std: the spread of the ids' first rows, ``model.table_std``
        where nothing is said; with 0 an item is at first what its content alone makes of it, as a new item is."""

        name: Literal["fused"] = "fused"
        fusion: Literal["add", "concat", "gated"] = "add"
        id_std: Annotated[float, Field(ge=0)] | None = None

        def build(self, around: Surroundings) -> Tower:  # type: ignore[override]
            if around.by_rows and not around.spec.apart:
                raise UserError(
                    "the optimizer moves the rows of a table that a step has seen, and objective full_softmax sees "
                    "all: use optimizer=adamw, or another objective",
                    everywhere=True,
                )
            std = around.spec.std if self.id_std is None else self.id_std
            ids = around.table.build(replace(around.spec, name=IDS, std=std), around.processes)
            return _tower(self, around, Fusion(self.fusion, around.spec.dim), ids)


IDS = "item_ids"
"""The table of ids beneath a fused tower."""


def _tower(
    config: ContentConfig, around: Surroundings, fusion: Fusion | None = None, ids: Table | None = None
) -> Tower:
    """One whose rows are dealt out wherever ``model.table`` deals out its own."""
    dealt = around.table.name != "local" and getattr(around.table, "sharding", None) != "data_parallel"
    content = content_of(config, around, dealt)
    head = Head(config.head, content.width, around.spec.dim)
    kind = DealtTower if dealt else Tower
    return kind(around.spec, content, head, around.processes, fusion, ids)


def _given(width: int, items: pa.Table) -> Tensor:
    """The vectors that come with items, of a tower that has no encoder."""
    if "vector" not in items.column_names:
        raise UserError(
            "model.item_tower has mode cached and no encoder: give new items a column vector, written by the program "
            "encode"
        )
    found = vectors.of_table(items, "the new items")
    if found.shape[1] != width:
        raise UserError(
            f"the vectors of the new items have {found.shape[1]} numbers, and the tower's {width}: encode them with "
            "the same encoder"
        )
    return found


def content_of(config: ContentConfig, around: Surroundings, dealt: bool = False) -> Content:
    """dealt: whether of vectors that nothing moves each process holds a stretch."""
    catalogue, processes = around.catalogue, around.processes
    if config.mode == "cached" and on_paper_now():
        assert config.vectors is not None
        return _foreseen(vectors.width_of(config.vectors), around, dealt)
    if config.mode == "cached":
        assert config.vectors is not None
        ids = catalogue.column("item_id").combine_chunks()
        own = processes.world.own(len(ids)) if dealt else range(len(ids))
        # each looks for items of its own in the file, and one may find that some are missing
        read = partial(vectors.read_file, config.vectors, ids[own.start : own.stop])
        own_RE = processes.together(read)
        width = own_RE.shape[1]
        given = partial(_given, width)
        if dealt:
            shares = Shares(len(ids), own_RE, processes.world)
            return FixedShares(width, lambda: shares, given, processes, file=config.vectors)
        return Fixed(width, lambda: own_RE, given, processes.device, file=config.vectors)
    reader = _reader(config.text, config.image, processes)
    content = _by_encoder(config, around, reader, dealt)
    content.came = lambda: reader.weights_digest
    content.read = lambda: reader.made_of(catalogue)
    return content


def _by_encoder(config: ContentConfig, around: Surroundings, reader: Reader, dealt: bool) -> Content:
    catalogue, processes = around.catalogue, around.processes
    if config.mode == "frozen":
        if not on_paper_now():  # its vectors are made when a step asks for some
            reader.check(catalogue)
        make, digest = partial(reader.shares, catalogue), lambda: reader.weights_digest
        return _still(reader.width, make, reader.vectors_of, processes, dealt, digest=digest)
    encoder = reader.encoder(config.dropout)
    with with_numbers():
        items = reader.foreseen(catalogue) if on_paper_now() else reader.items(catalogue)
        longest = int(items.lengths_n.max())
    if config.mode == "adapters":
        _check_places(config, reader, longest)
        insert(encoder.model, config.adapters, around.spec.seed)
        encoder.to(processes.device)
        if config.adapters.name == "frozen":  # as another run has tuned it: its vectors are formed once

            def of_others(others: pa.Table) -> Tensor:
                return processes.world.gather(reader.encoded(encoder, reader.items_in(others)).own_RE)

            make = partial(reader.encoded, encoder, items)
            return _still(encoder.width, make, of_others, processes, dealt, encoder=encoder)
    elif config.freeze:
        freeze_layers(encoder.model, config.freeze)
    of_step = Encoded(
        encoder,
        items,
        processes,
        reader.items_in,
        reader.said,
        most=reader.section.batch,
        recompute=config.recompute,
        bf16=around.bf16,
    )
    return of_step if config.refresh is None else Refreshed(of_step, config.refresh)


def _still(
    width: int,
    make: Callable[[], Shares],
    other: Callable[[pa.Table], Tensor],
    processes: Processes,
    dealt: bool,
    *,
    encoder: Encoder | None = None,
    digest: Callable[[], str] | None = None,
) -> Content:
    """Vectors that nothing moves, of which all processes ``make`` a stretch each: as they are dealt, or all of them on
    every one."""
    if dealt:
        return FixedShares(width, make, other, processes, encoder, digest)
    world = processes.world
    return Fixed(
        width,
        lambda: world.gather(make().own_RE),
        other,
        processes.device,
        collective=world.size > 1,
        encoder=encoder,
        digest=digest,
    )


def _foreseen(width: int, around: Surroundings, dealt: bool) -> Content:
    """Vectors that nothing moves as a plan has them, which looks at none."""

    def made(*anything: object) -> NoReturn:
        raise TypeError("a plan looks at no vectors")

    if dealt:
        return FixedShares(width, made, made, around.processes)
    return Fixed(width, made, made, around.processes.device)


def _check_places(config: ContentConfig, reader: Reader, longest: int) -> None:
    """Refuse a prompt that an encoder has no places for."""
    if config.adapters.name != "prompt" or config.text is None:
        return
    places = places_of(reader.config)
    if places is not None and config.adapters.size + longest > places:
        raise UserError(
            f"adapters.size is {config.adapters.size} tokens before texts of up to {longest}, and the encoder has "
            f"places for {places}: lower it, or text.max_tokens"
        )
