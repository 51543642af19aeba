"""What this machine can do at best, measured in the process whose figures are held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """flops: operations a second of a large matrix product, by dtype; bytes: a second of a large copy, counting those
    read and those written."""

    flops: dict[str, float]
    bytes: float

    def describe(self) -> dict[str, object]:
        return {
            "matmul_tflops": {dtype: flops / 1e12 for dtype, flops in self.flops.items()},
            "copy_gb_per_s": self.bytes / 1e9,
        }


def measure(device: torch.device, dtypes: list[str], scale: float = 1.0) -> Ceilings:
    """Medians of REPEATS on random data.  scale: of the sizes, for tests."""
    side = int((8192 if device.type == "cuda" else 2048) * scale)
    size = int((2**31 if device.type == "cuda" else 2**27) * scale)
    flops = {}
    for dtype in sorted(set(dtypes)):
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        flops[dtype] = 2 * side**3 / _seconds(lambda a=a, b=b: a @ b, device)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * size / _seconds(lambda: target.copy_(source), device))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))
