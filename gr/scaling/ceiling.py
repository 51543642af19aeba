"""How fast this process multiplies matrices: the ceiling that a training's operations are held against."""

from __future__ import annotations

import functools
import time

import torch

from gr.embeddings.topology import GPUS
from gr.scaling.machine import PEAKS

WIDTHS = {"cpu": 384, "cuda": 4096}
ROUNDS = {"cpu": 4, "cuda": 12}


@functools.cache
def measured(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few products of square matrices, found once a process in a few
    milliseconds; nothing is drawn, so that no other number changes."""
    width = WIDTHS.get(device.type, WIDTHS["cpu"])
    one = torch.ones(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(ROUNDS.get(device.type, ROUNDS["cpu"])):
        started = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * width**3 / max(best, 1e-9)


@functools.cache
def data_sheet(device: torch.device, dtype: torch.dtype) -> float | None:
    """What its data sheet says of a GPU that is known by name; None of others, and of CPUs."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    name = next((name for name in GPUS if name in words), None)
    return None if name is None else PEAKS[name][0 if dtype == torch.bfloat16 else 1]
