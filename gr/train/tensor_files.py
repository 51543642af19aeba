"""Tensors in safetensors files of a bounded size, written and read a few rows at a time.

A tensor larger than a file is cut along its rows: rows 0 to 999 of ``tables.items.weight`` are an entry
``tables.items.weight[0:1000]`` of one file.  Others are entries of their own names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr.errors import UserError

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


def read_into(
    folder: Path, parts: Mapping[str, Sequence[Part]], name: str, offsets: Sequence[int], values: Tensor
) -> None:
    """Fill ``values``, which stand at ``offsets`` in the tensor ``name``, from the files (``parts``: as :func:`layout`
    gives them), a block of rows at a time."""
    safe_open = _safe_open()
    for file, entries in parts.items():
        for part in entries:
            if part.name != name:
                continue
            if not values.dim():
                with safe_open(folder / file, framework="pt") as opened:
                    values.copy_(opened.get_tensor(part.key))
                continue
            first, last = max(part.start, offsets[0]), min(part.stop, offsets[0] + len(values))
            if first >= last:
                continue
            columns = [slice(o, o + n) for o, n in zip(offsets[1:], values.shape[1:], strict=True)]
            step = max(BLOCK_NUMBERS // max(values[:1].numel(), 1), 1)
            with safe_open(folder / file, framework="pt") as opened:
                entry = opened.get_slice(part.key)
                for start in range(first, last, step):
                    stop = min(start + step, last)
                    block = entry[(slice(start - part.start, stop - part.start), *columns)]
                    with torch.no_grad():
                        values[start - offsets[0] : stop - offsets[0]].copy_(block)


def _safe_open() -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(
            f"an export is read with the package safetensors, and it can't be imported ({error}): "
            "pip install safetensors",
            everywhere=True,
        ) from None
    return safe_open
