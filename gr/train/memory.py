"""Memory: what a step took, and advice when there was not enough."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gr.config import RunConfig
from gr.errors import UserError


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, where the C library is glibc.

    Steps of ever other sizes leave holes in its heap that it keeps: without this a run on the CPU grows by about a
    megabyte a step.  A call takes tenths of a second.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):
        return None


@contextmanager
def advice_when_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Turn an allocation failure into advice; the original error stays its cause."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        train, evaluation = config.train, config.eval
        again = "" if train.activation_checkpointing else "set train.activation_checkpointing=true, lower "
        raise UserError(
            f"out of memory ({str(error).splitlines()[0]}): lower train.micro_batch_actions (now "
            f"{train.micro_batch_actions}; the loss does not change), then {again}eval.max_scores (now "
            f"{evaluation.max_scores}), data.max_length (now {config.data.max_length}) or model.dim, "
            "or train on more processes (train.context: that share each sequence)"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        or "can't allocate memory" in text
        or "not enough memory" in text
    )
