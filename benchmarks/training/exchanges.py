"""What processes exchange in a step, metered: how long compute waits for it, and how many bytes it is.

*Exposed communication* is the time in exchanges that compute doesn't hide. On CPUs it is the time that this
process's Python threads spend inside ``Work.wait`` of torch.distributed: every exchange of every engine and table ends
in one, and what gloo's own threads move meanwhile isn't in it. A wait for a process that still computes is: the least
over ranks has the least of that. On GPUs nothing waits on the host; there it is the time in which the device runs
kernels of NCCL and no other (:func:`exposed_seconds` of a profile).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gr.embeddings.table import Table

Interval = tuple[float, float]


class Meter:
    """seconds: inside of waits.  sent: bytes that all-to-all exchanges sent to other processes."""

    def __init__(self) -> None:
        self.seconds, self.sent = 0.0, 0
        self._waiting = False

    def read(self) -> tuple[float, int]:
        """(seconds, bytes) since the last time."""
        found = self.seconds, self.sent
        self.seconds, self.sent = 0.0, 0
        return found

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is exchanged meanwhile."""
        wait, all_to_all = dist.Work.wait, dist.all_to_all_single

        def metered_wait(work: Any, *arguments: Any, **settings: Any) -> Any:
            if self._waiting:  # one wait inside of another counts once
                return wait(work, *arguments, **settings)
            self._waiting, started = True, time.perf_counter()
            try:
                return wait(work, *arguments, **settings)
            finally:
                self.seconds += time.perf_counter() - started
                self._waiting = False

        def metered_all_to_all(
            output: Tensor,
            input: Tensor,
            output_split_sizes: Sequence[int] | None = None,
            input_split_sizes: Sequence[int] | None = None,
            **settings: Any,
        ) -> Any:
            self.sent += to_others(input, input_split_sizes, settings.get("group"))
            return all_to_all(output, input, output_split_sizes, input_split_sizes, **settings)

        dist.Work.wait = metered_wait  # type: ignore[method-assign]
        dist.all_to_all_single = metered_all_to_all
        try:
            yield
        finally:
            dist.Work.wait, dist.all_to_all_single = wait, all_to_all  # type: ignore[method-assign]


def to_others(input: Tensor, splits: Sequence[int] | None, group: Any) -> int:
    """Bytes of an all-to-all's input that leave this process: all rows but those that it sends to itself."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if not splits:
        return input.numel() * input.element_size() * (ranks - 1) // ranks
    row = input[:1].numel() * input.element_size()
    return row * (sum(splits) - splits[rank])


def must_cross(table: Table, rows_U: Tensor) -> int:
    """The least bytes that a step's view of distinct ``rows_U`` moves between processes: the float32 numbers of its
    rows that this process doesn't own come, and their gradients go."""
    own = sum(
        int(((rows_U >= piece.row0) & (rows_U < piece.row0 + len(piece.values_RC))).sum())
        * piece.values_RC.shape[1]
        for piece in table.pieces()
    )
    return 2 * 4 * (len(rows_U) * (table.dim + table.spec.bias) - own)


def exposed_seconds(profile: torch.profiler.profile) -> float:
    """Of a profile of a GPU: the time in which it runs kernels of NCCL and nothing else."""
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.name, (e.time_range.start, e.time_range.end)) for e in kernels]
    exchanging = [span for name, span in spans if "nccl" in name.lower()]
    computing = [span for name, span in spans if "nccl" not in name.lower()]
    return alone(exchanging, computing) / 1e6


def alone(spans: Sequence[Interval], others: Sequence[Interval]) -> float:
    """The length of the union of ``spans`` outside of the union of ``others``."""
    both = length(union([*spans, *others]))
    return both - length(union(others))


def union(spans: Sequence[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(spans: Sequence[Interval]) -> float:
    return sum(end - start for start, end in spans)
