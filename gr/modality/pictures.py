"""Pictures of items: from a folder, a zip or a Parquet file, decoded when they are asked for, a few at a time.

An item without a picture, or with one that can't be read, has an empty one (grey), and is counted.

Shapes: n items, S pixels along a side.
"""

from __future__ import annotations

import io
import logging
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gr.errors import UserError

log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MOST_PIXELS = 50_000_000
"""A picture that says it has more is not decoded: a small file can hold one that fills the memory."""
DECODERS = 4


class PictureFiles(ABC):
    """Encoded pictures by name: an item's id, or what a column says."""

    names: frozenset[str]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Of a name that is there."""

    @staticmethod
    def at(path: str) -> PictureFiles:
        """A folder or a zip with NAME.jpg (or png, webp, bmp), or a Parquet file with item_id and image (bytes)."""
        where = Path(path)
        if where.is_dir():
            return _Folder(where)
        if not where.is_file():
            raise UserError(f"no pictures at '{path}': give a folder, a .zip or a .parquet file")
        try:
            return _Zip(where) if where.suffix == ".zip" else _Parquet(where)
        except (OSError, zipfile.BadZipFile, pa.ArrowException) as error:
            first = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"the pictures at '{path}' can't be read ({first}): give a folder, a zip or Parquet"
            ) from None


def _by_stem(files: Sequence[str]) -> dict[str, str]:
    return {Path(file).stem: file for file in sorted(files) if file.lower().endswith(ENDINGS)}


class _Folder(PictureFiles):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _by_stem([entry.name for entry in folder.iterdir()])
        self.names = frozenset(self.files)

    def read(self, name: str) -> bytes:
        return (self.folder / self.files[name]).read_bytes()


class _Zip(PictureFiles):
    def __init__(self, file: Path) -> None:
        self.zip = zipfile.ZipFile(file)
        self.files = _by_stem(self.zip.namelist())
        self.names = frozenset(self.files)

    def read(self, name: str) -> bytes:
        return self.zip.read(self.files[name])


class _Parquet(PictureFiles):
    """Row groups are read one at a time, the last one kept."""

    def __init__(self, file: Path) -> None:
        self.parquet = pq.ParquetFile(file)
        if missing := {"item_id", "image"} - set(self.parquet.schema_arrow.names):
            raise UserError(f"'{file}' has no column {min(missing)}: give item_id and image (bytes)")
        self.place: dict[str, tuple[int, int]] = {}
        for group in range(self.parquet.num_row_groups):
            ids = self.parquet.read_row_group(group, columns=["item_id"])["item_id"].to_pylist()
            self.place.update({str(item): (group, row) for row, item in enumerate(ids)})
        self.names = frozenset(self.place)
        self._kept: tuple[int, pa.ChunkedArray] | None = None

    def read(self, name: str) -> bytes:
        group, row = self.place[name]
        if self._kept is None or self._kept[0] != group:
            self._kept = group, self.parquet.read_row_group(group, columns=["image"])["image"]
        return self._kept[1][row].as_py() or b""


def decoded(content: bytes, side: int) -> np.ndarray:
    """(3, S, S) float32 in -1 .. 1 (mean and deviation 0.5, as IDvs.MoRec has it).  Raises OSError or ValueError for
    what is no picture, isn't whole, or is larger than ``MOST_PIXELS``."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"it has {picture.width} x {picture.height} pixels")
        picture.draft("RGB", (side, side))  # a JPEG is decoded no larger than needed
        small = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels_SS3 = np.asarray(small, np.float32)
    return np.ascontiguousarray(pixels_SS3.transpose(2, 0, 1)) / 127.5 - 1


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
    def missing(self) -> int:
        return sum(name not in self.files.names for name in self.names)

    def inputs(self, rows_m: Tensor) -> tuple[Tensor, ...]:
        """(m, 3, S, S) float32 of items ``rows_m``."""
        names = [self.names[row] for row in rows_m.tolist()]
        contents = [self.files.read(name) if name in self.files.names else None for name in names]
        with ThreadPoolExecutor(DECODERS) as decoders:  # PIL lets go of the interpreter
            found = list(decoders.map(self._pixels, names, contents))
        return (torch.from_numpy(np.stack(found)) if found else torch.zeros(0, 3, self.side, self.side),)

    def _pixels(self, name: str, content: bytes | None) -> Any:
        if content is not None:
            try:
                return decoded(content, self.side)
            except Exception as error:  # a decoder of damaged data may raise anything
                self.bad[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
        return np.zeros((3, self.side, self.side), np.float32)

    def say_bad(self) -> None:
        """A line where items have no picture, or none that can be read."""
        if self.missing:
            log.warning(
                "%s of %s items have no picture: they share an empty one",
                f"{self.missing:,}",
                f"{len(self):,}",
            )
        if self.bad:
            name, why = next(iter(self.bad.items()))
            said = "%s pictures can't be read, their items have an empty one ('%s' is one: %s)"
            log.warning(said, f"{len(self.bad):,}", name, why)
