"""Slices: parts of a large tensor as one named tensor of a checkpoint, whoever holds which part.

torch.distributed.checkpoint asks a tensor for its chunks by three methods and finds overlaps by itself, so that a
tensor saved in any parts is loaded into any others, in place, without a collective and without the whole anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from gr.processes import Axis

PART_NUMBERS = 1 << 24
"""A part saved whole is read whole, to take a slice of it: 64 MiB at most."""


class Slices(Tensor):
    """A tensor of ``size`` of which this process holds ``parts``: offsets -> values, their memory.

    Filled as they are, so that each part of a file is read once; saved when they are :meth:`cut`.
    """

    parts: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, size: Sequence[int], parts: Sequence[tuple[Sequence[int], Tensor]]) -> Slices:
        dtype = parts[0][1].dtype if parts else torch.float32
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(size), dtype=dtype)
        made.parts = {torch.Size(offsets): values for offsets, values in parts if len(values)}
        return made

    @staticmethod
    def of_rows(size: Sequence[int], rows: range, values: Tensor) -> Slices:
        """This process holds some rows, all of their numbers; perhaps none."""
        return Slices(size, [([rows.start] + [0] * (len(size) - 1), values)])

    def cut(self) -> Slices:
        """The same memory in parts of ``PART_NUMBERS`` at most, to be saved."""
        return Slices(self.shape, [cut for part in self.parts.items() for cut in _cuts(*part)])

    def rows(self) -> Tensor:
        """The rows that :meth:`of_rows` was given."""
        empty = torch.empty(0, *self.shape[1:])
        return torch.cat([empty, *self.parts.values()])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, values.size()) for offsets, values in self.parts.items()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.parts[torch.Size(index.offset)]

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), settings=None):  # type: ignore[override]
        if operator is torch.ops.aten.detach.default:
            return arguments[0]
        raise TypeError(f"{operator} isn't to be had of slices: they are for checkpoints")


def held_parts(tensor: Tensor) -> dict[torch.Size, Tensor]:
    """What this process holds of a tensor: offsets -> values, their memory."""
    return tensor.parts if isinstance(tensor, Slices) else {torch.Size([0] * tensor.dim()): tensor}


def shared_out(tensors: Mapping[str, Tensor], axis: Axis) -> dict[str, Tensor]:
    """``tensors`` as they are saved: of a large one that every process has whole each saves its share."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Slices | DTensor) and tensor.numel() > PART_NUMBERS:
            rows = axis.own(len(tensor))
            tensor = Slices.of_rows(tensor.shape, rows, tensor[rows.start : rows.stop])
        parts[name] = tensor
    return parts


def part_rows(values: Tensor) -> int:
    """Rows of a part."""
    return max(PART_NUMBERS // max(values[:1].numel(), 1), 1)


def _cuts(offsets: Sequence[int], values: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """``values`` in parts along the rows, each with its offsets."""
    rows = part_rows(values)
    for start in range(0, len(values), rows):
        yield [offsets[0] + start, *offsets[1:]], values[start : start + rows]
