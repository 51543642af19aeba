"""The state of one moment, for a thread that writes it while training goes on.

Rows of tables that keep them to themselves stay where they are, and are put aside before they move (gr.train.aside);
everything else is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gr.embeddings.row_updates import RowOptimizer
from gr.train.aside import Aside
from gr.train.slices import Slices, held_parts, part_rows


class Snapshot(Slices):
    """Slices that are read when their turn comes, each once."""

    reads: dict[torch.Size, Callable[[], Tensor]]

    @staticmethod
    def of(slices: Slices, owner_of: Callable[[Tensor], object], aside: Aside) -> Snapshot:
        made = Snapshot(slices.shape, list(slices.cut().parts.items()))
        made.reads = {}
        for offsets, values in slices.parts.items():
            rows = part_rows(values)
            watched = aside.watch(owner_of(values), values, rows)
            for number, start in enumerate(range(0, len(values), rows)):
                at = torch.Size([offsets[0] + start, *offsets[1:]])
                made.reads[at] = partial(watched.read, number)
        return made

    def cut(self) -> Slices:
        return self

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.reads[torch.Size(index.offset)]()


def snapshot(
    tensors: Mapping[str, Tensor], optimizers: Iterable[RowOptimizer], limit: int
) -> tuple[dict[str, Tensor], Aside] | None:
    """``tensors`` (an engine's, in parts) as they are now, and what has to be told of rows that move: optimisers tell
    it themselves.  None, and nothing done, where more than ``limit`` bytes would be copied."""
    owners = _owners(optimizers)
    moved = {name for name, t in tensors.items() if isinstance(t, Slices) and _all_owned(t, owners)}
    cost = held_bytes(tensor for name, tensor in tensors.items() if name not in moved)
    if cost > limit:
        return None
    aside = Aside(limit - cost)
    taken: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in moved:
            assert isinstance(tensor, Slices)
            taken[name] = Snapshot.of(tensor, lambda values: owners[_key(values)], aside)
        else:
            taken[name] = copied(tensor)
    for optimizer in optimizers:
        optimizer.moving = partial(_moving, aside, optimizer)
    return taken, aside


def release(optimizers: Iterable[RowOptimizer]) -> None:
    """What was taken has been written: rows may move as they like."""
    for optimizer in optimizers:
        optimizer.moving = None


def copied(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the host's memory."""
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        tensor = Slices(tensor.shape, [(offsets, tensor.to_local())])
    if not isinstance(tensor, Slices):
        return tensor.to("cpu", copy=True)
    parts = [(o, values.to("cpu", copy=True)) for o, values in tensor.cut().parts.items()]
    return Slices(tensor.shape, parts)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """How much of ``tensors`` this process holds."""
    total = 0
    for tensor in tensors:
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total += sum(part.numel() * part.element_size() for part in held_parts(held).values())
    return total


def _moving(aside: Aside, optimizer: RowOptimizer, number: int, rows: Tensor | slice) -> None:
    aside.before((id(optimizer), number), rows)


def _owners(optimizers: Iterable[RowOptimizer]) -> dict[tuple[int, int], object]:
    """Whose rows a tensor's are: by where it lies, for a checkpoint's slices are the same memory."""
    return {_key(values): (id(o), number) for o in optimizers for number, values in o.owned()}


def _key(values: Tensor) -> tuple[int, int]:
    return values.data_ptr(), len(values)


def _all_owned(slices: Slices, owners: Mapping[tuple[int, int], object]) -> bool:
    return all(_key(values) in owners for values in slices.parts.values())
