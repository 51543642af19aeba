"""Times forward and backward passes of several ways that take turns, so that a busy machine disturbs all alike.

On a GPU: CUDA events, one synchronisation a round; before each timed stretch the L2 cache is overwritten and the
stream sleeps while the host enqueues, so that times are the device's and not those of Python launching kernels.
On a CPU: the wall clock, and the CPU time of all threads of the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.problem import Step, backward

LEAST_ROUNDS = 5
MOST_ROUNDS = 100
WARM_UP = 2
FLUSHED_BYTES = 256 * 2**20  # several times any GPU's L2
HOST_LEAD_CYCLES = 20_000_000  # about ten milliseconds: a block's step is dozens of launches


@dataclass
class Times:
    """Milliseconds, one value a round; ``both`` is the sum of the two passes of a round. cpu: of all threads."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, which: str) -> np.ndarray:
        parts = {"forward": (self.forward,), "backward": (self.backward,)}.get(
            which, (self.forward, self.backward)
        )
        return np.sum([np.asarray(part) for part in parts], axis=0)


def take_turns(
    steps: dict[str, Step], upstream: Tensor, seconds: float, rounds: int | None = None
) -> dict[str, Times]:
    """Times every step after warm-up, once a round, until ``seconds`` are spent or MOST_ROUNDS rounds are done.

    A way that has used up its share of the time sits out later rounds, once it has LEAST_ROUNDS of its own; ``rounds``
    asks for that many of each instead.
    """
    measure = _on_gpu if upstream.is_cuda else _on_cpu
    for step in steps.values():
        for _ in range(WARM_UP):
            measure(step, upstream, Times())
    taken = {name: Times() for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    share = seconds / max(len(steps), 1)
    for round_ in range(rounds or MOST_ROUNDS):
        names = [n for n in steps if rounds or round_ < LEAST_ROUNDS or spent[n] < share]
        if not names:
            break
        for name in names if round_ % 2 == 0 else reversed(names):
            start = time.perf_counter()
            measure(steps[name], upstream, taken[name])
            spent[name] += time.perf_counter() - start
    return taken


def ratio(slower: Times, faster: Times, which: str) -> float:
    """Median over the rounds both took part in of time(slower) / time(faster)."""
    a, b = slower.of(which), faster.of(which)
    rounds = min(len(a), len(b))
    return float(np.median(a[:rounds] / b[:rounds]))


def p10_p50_p90(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.1, 0.5, 0.9])]


def _on_cpu(step: Step, upstream: Tensor, into: Times) -> None:
    cpu = time.process_time()
    start = time.perf_counter()
    out = step.forward()
    end = middle = time.perf_counter()
    if step.leaves:
        backward(step, out, upstream)
        end = time.perf_counter()
    into.forward.append(1e3 * (middle - start))
    into.backward.append(1e3 * (end - middle))
    into.cpu.append(1e3 * (time.process_time() - cpu))


def _on_gpu(step: Step, upstream: Tensor, into: Times) -> None:
    with _device_ms(into.forward):
        out = step.forward()
    if step.leaves:
        with _device_ms(into.backward):
            backward(step, out, upstream)
    else:
        into.backward.append(0.0)
    into.cpu.append(0.0)


_buffers: dict[int, Tensor] = {}


@contextmanager
def _device_ms(into: list[float]) -> Iterator[None]:
    """Appends the device's milliseconds for what the block enqueues, L2 cold."""
    device = torch.cuda.current_device()
    if device not in _buffers:
        _buffers[device] = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _buffers[device].zero_()
    torch.cuda._sleep(HOST_LEAD_CYCLES)
    begin.record()
    yield
    end.record()
    torch.cuda.synchronize()
    into.append(begin.elapsed_time(end))
