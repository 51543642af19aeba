"""What torch.compile calls instead of tracing into it, and what it leaves out."""

from __future__ import annotations

import threading
from collections.abc import Callable
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


def values_are_at_hand(x: Tensor) -> bool:
    """Whether values can be checked: on an accelerator a look would wait for it, a traced graph has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


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
