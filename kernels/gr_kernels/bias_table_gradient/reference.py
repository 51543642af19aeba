"""The table gradient in plain PyTorch: any device and precision."""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.tracing import values_are_at_hand


def table_gradient(values: Tensor, buckets: Tensor, entries: int, deterministic: bool) -> Tensor:
    """(entries,) in float32, or float64 for that."""
    wide = values.flatten() if values.dtype == torch.float64 else values.flatten().float()
    bucket = buckets.flatten().to(torch.int64)
    if values_are_at_hand(bucket) and bool((bucket >= entries).any()):
        first = int((bucket >= entries).to(torch.int8).argmax())
        raise IndexError(
            f"bias_table_gradient: bucket {int(bucket[first])} of value {first} is outside the table of {entries} "
            "entries"
        )
    # what counts nowhere goes to an entry of its own: no shape depends on how many there are
    slot = torch.where((bucket < 0) | (bucket >= entries), entries, bucket)
    sums = wide.new_zeros(entries + 1)
    if deterministic and wide.device.type != "cpu":
        sums = sums.index_put((slot,), wide, accumulate=True)  # sorts, then adds in order
    else:
        sums = sums.index_add(0, slot, wide)  # on CPU one after another, elsewhere atomically
    return sums[:entries]
