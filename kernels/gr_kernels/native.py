"""The compiled operators (gr_kernels._C): loaded on first use, absent where they weren't built."""

from __future__ import annotations

import functools
import importlib
import importlib.util

from gr_kernels.tracing import constant_when_traced


@constant_when_traced
def why_unavailable() -> str:
    """Loads the compiled operators into torch.ops.gr_kernels; "" if that worked, else the reason in a few words."""
    return _why_not_loaded()


@functools.cache
def _why_not_loaded() -> str:
    if importlib.util.find_spec("gr_kernels._C") is None:
        return (
            "gr_kernels was installed without its C++ operators (no C++ compiler was found when it was built)"
        )
    import torch  # noqa: F401  (its libraries must be loaded before the extension's)

    try:
        importlib.import_module("gr_kernels._C")
    except ImportError as error:
        first_line = str(error).splitlines()[0]
        return f"the C++ operators were built for another torch: {first_line} (reinstall gr_kernels)"
    return ""


def available() -> bool:
    """Whether torch.ops.gr_kernels holds the compiled operators; loads them on the first call."""
    return not why_unavailable()


@constant_when_traced
def why_no_cuda() -> str:
    """Like ``why_unavailable``, for the CUDA implementations of the compiled operators."""
    reason = why_unavailable()
    if reason:
        return reason
    if not getattr(importlib.import_module("gr_kernels._C"), "cuda", 0):
        return "gr_kernels was installed without its CUDA operators (no CUDA toolkit like torch's when it was built)"
    return ""
