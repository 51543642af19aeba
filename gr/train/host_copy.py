"""Numbers that the host reads later."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A number on its way from the device to the host, as it was when this was made.

    ``item()`` waits for what the device had been given until then, not for what came after: a loss that is copied
    before its backward pass is read while the backward pass still runs.
    """

    def __init__(self, number: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if number.device.type == "cuda":
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number.detach(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(number.device))
        else:
            self._number = number.detach().clone()

    def item(self) -> float:
        if self._ready is not None:
            self._ready.synchronize()
        return float(self._number)
