"""Pictures of items, decoded when they are asked for, a few at a time.

An item without a picture, or with one that can't be read, has an empty one (grey), and is counted.

Shapes: n items, S pixels along a side.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr.errors import UserError, first_line
from gr.modality.digest import digest
from gr.modality.picture_files import Content, PictureFiles

log = logging.getLogger(__name__)

MOST_PIXELS = 50_000_000
"""A picture that says it has more is not decoded: a small file can hold one that fills the memory."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""No others: of what is no picture of pixels (EPS) Pillow would start a program on it."""
DECODERS = 4
FIRST = 8
"""Pictures that are looked at together to find one that can be read."""
SAMPLE = 64
"""Items whose pictures are looked at to tell whether all are others."""
DIGITS = 8
AT_ONCE = 64
"""Encoded pictures that are held at once where all are gone through."""


def decoded(content: bytes, side: int) -> np.ndarray:
    """(3, S, S) float32 in -1 .. 1 (mean and deviation 0.5, as IDvs.MoRec has it).  Raises OSError or ValueError for
    what is no picture, isn't whole, or is larger than ``MOST_PIXELS``."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is no picture in {', '.join(FORMATS)}") from None
    with opened as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"it has {picture.width} x {picture.height} pixels")
        picture.draft("RGB", (side, side))  # a JPEG is decoded no larger than needed
        small = _eight_bits(picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels_SS3 = np.asarray(small, np.float32)
    return np.ascontiguousarray(pixels_SS3.transpose(2, 0, 1)) / 127.5 - 1


def _eight_bits(picture: Any) -> Any:
    """A picture as it is, or of 16 bits a pixel brought to 8: Pillow cuts them off at 255, and nearly all is white."""
    from PIL import Image

    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, of which nobody knows which is white")
    return picture


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow warns of large pictures, which are refused anyway, and of transparency, which counts for nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


@dataclass(frozen=True)
class Unseen:
    """Pictures of ``rows`` items that a plan needn't look at."""

    rows: int
    side: int

    @property
    def held(self) -> int:
        """Nothing: they are read when they are asked for."""
        return 0

    @property
    def lengths_n(self) -> Tensor:
        return torch.ones(1, dtype=torch.int64).expand(self.rows)  # a number in memory

    def inputs(self, rows_m: Tensor) -> tuple[Tensor, ...]:
        raise TypeError("pictures that nobody has seen are for plans")

    def shaped(self, count: int, length: int) -> tuple[Tensor, ...]:
        """(m, 3, S, S)."""
        return (torch.zeros(count, 3, self.side, self.side),)


class Pictures:
    """Of n items, by their names; what an encoder takes of some of them."""

    def __init__(self, files: PictureFiles, names: Sequence[str], side: int) -> None:
        self.files, self.names, self.side = files, list(names), side
        self.bad: dict[str, str] = {}
        """Names of those that couldn't be decoded so far, and why not."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths_n(self) -> Tensor:
        """All alike."""
        return torch.ones(len(self.names), dtype=torch.int64)

    @property
    def held(self) -> int:
        """Nothing: they are read when they are asked for."""
        return 0

    def shaped(self, count: int, length: int) -> tuple[Tensor, ...]:
        """(m, 3, S, S)."""
        return Unseen(len(self), self.side).shaped(count, length)

    @property
    def missing(self) -> int:
        return sum(name not in self.files.names for name in self.names)

    def inputs(self, rows_m: Tensor) -> tuple[Tensor, ...]:
        """(m, 3, S, S) float32 of items ``rows_m``."""
        names = [self.names[row] for row in rows_m.tolist()]
        contents = self._contents(names)
        with _without_warnings(), ThreadPoolExecutor(DECODERS) as decoders:  # PIL lets go of the interpreter
            found = list(decoders.map(self._pixels, names, contents))
        return (torch.from_numpy(np.stack(found)) if found else torch.zeros(0, 3, self.side, self.side),)

    def digests(self) -> Iterator[str]:
        """What tells each item's picture from others, as it is encoded."""
        for start in range(0, len(self), AT_ONCE):
            for content in self._contents(self.names[start : start + AT_ONCE]):
                yield digest(content if isinstance(content, bytes) else b"")

    def sampled(self) -> str:
        """Digests of up to ``SAMPLE`` items' pictures as they are encoded, evenly over all: ``DIGITS`` hexadecimal
        digits each, one after another."""
        rows = np.linspace(0, len(self) - 1, min(len(self), SAMPLE)).round().astype(int)
        some = Pictures(self.files, [self.names[row] for row in rows], self.side)
        return "".join(found[:DIGITS] for found in some.digests())

    def _contents(self, names: Sequence[str]) -> list[Content | None]:
        """Of each name the encoded picture; None where there is none."""
        there = [name for name in dict.fromkeys(names) if name in self.files.names]
        try:
            found = dict(zip(there, self.files.read(there), strict=True))
        except Exception as error:  # of a store, which may raise anything
            raise UserError(
                f"pictures can't be read any more ({first_line(error)}): see that they are where they were, and go on"
            ) from None
        return [found.get(name) for name in names]

    def _pixels(self, name: str, content: Content | None) -> Any:
        if content is not None:
            try:
                if isinstance(content, Exception):
                    raise content
                return decoded(content, self.side)
            except Exception as error:  # a decoder of damaged data may raise anything
                self.bad[name] = first_line(error)
        return np.zeros((3, self.side, self.side), np.float32)

    def check(self, where: str, column: str) -> None:
        """Refuse pictures, which are at ``where`` by what ``column`` says, where no item has one, or none that can be
        read: all items would be one."""
        there = [row for row, name in enumerate(self.names) if name in self.files.names]
        if not there:
            raise UserError(
                f"none of the {len(self):,} items has a picture in '{where}', by {column} ('{self.names[0]}' is one): "
                "name the files by it, or set column"
            )
        for start in range(0, len(there), FIRST):
            self.inputs(torch.tensor(some := there[start : start + FIRST]))
            if any(self.names[row] not in self.bad for row in some):
                return
        name, why = next(iter(self.bad.items()))
        raise UserError(
            f"none of the {len(there):,} pictures of items in '{where}' can be read ('{name}' is one: {why}): see what "
            "they are"
        )


def say_missing(missing: int, items: int) -> None:
    """A line where items have no picture."""
    if missing:
        log.warning("%s of %s items have no picture: they share an empty one", f"{missing:,}", f"{items:,}")


def say_bad(bad: Mapping[str, str]) -> None:
    """A line where pictures, by name, can't be read."""
    if bad:
        name, why = next(iter(bad.items()))
        said = "%s pictures can't be read, their items have an empty one ('%s' is one: %s)"
        log.warning(said, f"{len(bad):,}", name, why)
