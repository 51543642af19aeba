"""What tells tensors from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_of(tensors: Mapping[str, Tensor], said: str = "") -> str:
    """32 hexadecimal digits of ``said`` and of tensors: their names, sizes, dtypes and bytes, in the order of names."""
    digest = hashlib.blake2b(said.encode(), digest_size=16)
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {list(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
