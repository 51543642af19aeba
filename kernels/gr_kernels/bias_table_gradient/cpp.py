"""The compiled operator of kernels/csrc: bias_table_gradient.cpp on CPU, cuda/bias_table_gradient.cu on NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels import native


def table_gradient(values: Tensor, buckets: Tensor, entries: int, deterministic: bool) -> Tensor:
    """(entries,) float32 from values of any floating type but float64."""
    values, buckets = values.float().contiguous(), buckets.contiguous()
    return torch.ops.gr_kernels.bias_table_gradient(  # type: ignore[no-any-return]
        values, buckets, entries, deterministic
    )


def cpp_obstacle(values: Tensor, entries: int) -> str:
    """Why a call can't be the C++ operator's, "" when it can."""
    if values.device.type != "cpu":
        return f"the tensors are on {values.device}, not on CPU"
    return _precision(values) or native.why_unavailable()


def cuda_obstacle(values: Tensor, entries: int) -> str:
    """Why a call can't be the CUDA operator's, "" when it can."""
    if values.device.type != "cuda":
        return f"the tensors are on {values.device}, not on an NVIDIA GPU"
    return _precision(values) or native.why_no_cuda()


def _precision(values: Tensor) -> str:
    return "it takes values of at most float32" if values.dtype == torch.float64 else ""
