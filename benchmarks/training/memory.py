"""Memory of this process and its GPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_mib(device: torch.device | None = None) -> float:
    """Peak memory: of the GPU's allocator, else the resident memory of this process's own image.

    Linux's ru_maxrss starts from the parent's peak, so /proc is asked first.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if (found := _of_status("VmHWM:")) is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def reset_peak(device: torch.device) -> float:
    """Let the peak start anew where the system can do that; MiB in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory (proc(5))
    except OSError:
        return peak_mib()
    now = _of_status("VmRSS:")
    return peak_mib() if now is None else now


def _of_status(key: str) -> float | None:
    """MiB of a line of /proc/self/status."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None
