"""Tensors in safetensors files of a bounded size, written and read a few rows at a time.

A tensor larger than a file is cut along its rows: rows 0 to 999 of ``tables.items.weight`` are an entry
``tables.items.weight[0:1000]`` of one file.  Others are entries of their own names.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr.train.place import AnyPath

LARGEST = 1 << 30
"""Bytes of tensors in a file, at most."""

BLOCK_NUMBERS = 1 << 22  # read at once: 16 MiB

DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
"""By the format's names."""


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` (exclusive) of the tensor ``name``, as the entry ``key``; ``size`` is the part's.  A
    number without rows is one row.  ``dtype``: one of DTYPES."""

    name: str
    key: str
    start: int
    stop: int
    size: tuple[int, ...]
    dtype: str = "F32"

    @property
    def bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.size)


def layout(
    sizes: Mapping[str, Sequence[int]], largest: int = LARGEST, integers: Mapping[str, Sequence[int]] = {}
) -> dict[str, list[Part]]:
    """File -> its parts, for tensors of ``integers`` (int64) and of ``sizes`` (float32) in their order:
    ``model.safetensors``, or as many of ``model-00001-of-00003.safetensors`` as it takes."""
    named = [
        ("I64", name, size) for name, size in integers.items()
    ]  # first: numbers of 8 bytes at multiples of 8
    named += [("F32", name, size) for name, size in sizes.items()]
    files: list[list[Part]] = [[]]
    for part in (part for dtype, name, size in named for part in _cut(name, tuple(size), largest, dtype)):
        if files[-1] and sum(other.bytes for other in files[-1]) + part.bytes > largest:
            files.append([])
        files[-1].append(part)
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{n:05}-of-{len(files):05}.safetensors": parts for n, parts in enumerate(files, 1)}


def _cut(name: str, size: tuple[int, ...], largest: int, dtype: str) -> Iterator[Part]:
    rows, row = (size[0] if size else 1), DTYPES[dtype].itemsize * math.prod(size[1:])
    if rows * row <= largest:
        yield Part(name, name, 0, rows, size, dtype)
        return
    step = max(largest // row, 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield Part(name, f"{name}[{start}:{stop}]", start, stop, (stop - start, *size[1:]), dtype)


def write(file: Path, parts: Sequence[Part], values: Callable[[Part], Iterator[Tensor]]) -> None:
    """Write a file of ``parts``; ``values`` gives the rows of each, stretch after stretch."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        header[part.key] = {"dtype": part.dtype, "shape": part.size, "data_offsets": [end, end + part.bytes]}
        end += part.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's: numbers begin at a multiple of 8
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for rows in values(part):
                out.write(rows.reshape(-1).numpy().astype(DTYPES[part.dtype], copy=False).view(np.uint8).data)
        if out.tell() != 8 + len(text) + end:
            raise ValueError(f"the values for '{file}' are {out.tell() - 8 - len(text)} bytes, not {end}")


class TensorReader:
    """Reads the files in ``folder`` whose ``parts`` :func:`layout` gave, of this machine or of a store.  A context
    manager: a file is opened once, and closed at the end.

    The files are taken to be what was written; whoever isn't sure compares their digests first.
    """

    def __init__(self, folder: AnyPath, parts: Mapping[str, Sequence[Part]]) -> None:
        self.folder = folder
        self._places: dict[str, list[tuple[str, Part]]] = {}
        for file, entries in parts.items():
            for part in entries:
                self._places.setdefault(part.name, []).append((file, part))
        self._opened: dict[str, tuple[io.BufferedIOBase, dict[str, int]]] = {}
        self._closing = ExitStack()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def read_into(self, name: str, offsets: Sequence[int], values: Tensor) -> None:
        """Fill ``values``, which stand at ``offsets`` in the tensor ``name``, a block of rows at a time."""
        for file, part in self._places[name]:
            if not values.dim():
                with torch.no_grad():
                    values.copy_(self._rows(file, part, 0, 1).reshape(()))
                continue
            first, last = max(part.start, offsets[0]), min(part.stop, offsets[0] + len(values))
            columns = tuple(slice(o, o + n) for o, n in zip(offsets[1:], values.shape[1:], strict=True))
            step = max(BLOCK_NUMBERS // max(math.prod(part.size[1:]), 1), 1)
            for start in range(first, last, step):
                stop = min(start + step, last)
                block = self._rows(file, part, start - part.start, stop - part.start)
                with torch.no_grad():
                    values[start - offsets[0] : stop - offsets[0]].copy_(block[(slice(None), *columns)])

    def _rows(self, file: str, part: Part, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of an entry."""
        source, begins = self._file(file)
        row = DTYPES[part.dtype].itemsize * math.prod(part.size[1:])
        values = np.empty((stop - start, *part.size[1:]), DTYPES[part.dtype])
        source.seek(begins[part.key] + start * row)
        if source.readinto(values.reshape(-1).view(np.uint8).data) != values.nbytes:
            raise ValueError(f"'{self.folder / file}' ends within '{part.key}'")
        return torch.from_numpy(values)

    def _file(self, name: str) -> tuple[io.BufferedIOBase, dict[str, int]]:
        """An opened file, and where the numbers of each of its entries begin."""
        if name not in self._opened:
            source = self._closing.enter_context((self.folder / name).open("rb"))
            length = int.from_bytes(source.read(8), "little")
            header = json.loads(source.read(length))
            header.pop("__metadata__", None)
            begins = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}
            self._opened[name] = source, begins
        return self._opened[name]
