"""What torch.compile calls instead of tracing into it, and what it leaves out; and calls on paper, of tensors without
numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """``function`` is called while torch.compile traces, and what it returns is a constant of the compiled code.

    For what asks about the machine or registers operators. As torch.compiler.assume_constant_result, which would
    import the compiler, and with it seconds, with every module that says so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Paper(threading.local):
    """The type of the device that calls are imagined on, "" where they are real; a thread starts with real ones."""

    def __init__(self) -> None:
        self.device = ""


_PAPER = _Paper()


@contextmanager
def on_paper(device: str) -> Iterator[None]:
    """Inside, this thread's tensors have shapes and no numbers (torch's FakeTensorMode on CPU): no value is looked at,
    and operators choose the implementation that they would take on a ``device`` ("cpu", "cuda") of a machine that has
    one, so that what a step keeps can be counted where there is none."""
    before, _PAPER.device = _PAPER.device, device
    try:
        yield
    finally:
        _PAPER.device = before


def device_type(device: torch.device) -> str:
    """Of tensors on ``device``: the type of device that computes with them, an imagined one on paper."""
    return _PAPER.device or device.type


def on_paper_now() -> bool:
    """Whether this thread is inside :func:`on_paper`."""
    return bool(_PAPER.device)


def with_numbers() -> AbstractContextManager[object]:
    """On paper, around what needs its tensors' numbers all the same and makes small ones; elsewhere nothing."""
    if not on_paper_now():
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()  # type: ignore[no-any-return]


def values_are_at_hand(x: Tensor) -> bool:
    """Whether values can be checked: on an accelerator a look would wait for it, a traced graph has none, and neither
    has a tensor on paper."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not on_paper_now()


def once(register: Callable[[], object]) -> Callable[[], None]:
    """``register``, which defines operators, called when they are first needed: once, whoever asks, traced or not."""
    lock = threading.Lock()
    done: list[bool] = []

    @constant_when_traced
    def registered() -> None:
        with lock:
            if not done:
                register()
                done.append(True)

    return registered
