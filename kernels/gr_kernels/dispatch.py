"""Which implementation of an operator takes a call, and why not the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gr_kernels.tracing import device_type

# What preferring() takes: names that several operators use for the same kind of implementation.
PREFERENCES = ("auto", "cuda", "triton", "cpp", "reference")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    obstacle: says in a few words why it can't take a call (the arguments are choose()'s), "" when it can.
    run: what the operator calls: a function, or an object that has several.
    merit: what speaks for it, in a few words.
    device: "auto" takes it for tensors on this type of device alone ("": on any); by name it runs wherever it can,
        as Triton's interpreter does on CPU.
    register: called before `run`, to define what it calls in torch.ops (tracing.once of a function); None: nothing.
    """

    name: str
    obstacle: Callable[..., str]
    run: Any
    merit: str
    device: str = ""
    register: Callable[[], None] | None = None


def takes_all(*arguments: Any) -> str:
    """The obstacle of an implementation that has none."""
    return ""


class CannotRun(ValueError):
    """The implementation that was asked for can't take the call; the message says why."""


@dataclass(frozen=True)
class Choice:
    """The implementation of a call, and those preferred to it with what was in their way."""

    implementation: Implementation
    passed_over: tuple[tuple[str, str], ...]

    def explain(self) -> str:
        """One line: what runs and why."""
        reasons = [f"{name} can't: {obstacle}" for name, obstacle in self.passed_over]
        return "; ".join([f"{self.implementation.name} ({self.implementation.merit})", *reasons])


class _Preference(threading.local):
    """The preferred name, "auto" where a thread starts. A context variable would do, but torch.compile can't read one;
    this it reads and guards: code compiled under another preference is traced anew."""

    def __init__(self) -> None:
        self.name = "auto"


_PREFERENCE = _Preference()


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """Inside, operators whose call says "auto" take the implementation of this name, as if the call named it.

        with preferring("reference"):
            out = hstu_attention(q, k, v, offsets, max_length=100, divisor=100.0)

    An operator that has no implementation of that name chooses by itself; one that has it, but can't run it for a
    call, raises CannotRun. A call that names an implementation gets that. The innermost preference counts; "auto" is
    none.

    name: one of PREFERENCES, else ValueError. It holds for this thread (a new thread starts without) and for operators
    that run inside others. The choice is made when an operator is called: the backward pass of the call belongs to it,
    wherever it runs. (torch.utils.checkpoint calls again in the backward pass: put the preference inside what it runs.)
    """
    if name not in PREFERENCES:
        names = ", ".join(repr(known) for known in PREFERENCES)
        raise ValueError(f"preferring: the implementation must be one of {names}, not {name!r}.")
    before = _PREFERENCE.name
    _PREFERENCE.name = name
    try:
        yield
    finally:
        _PREFERENCE.name = before


def preferred() -> str:
    """The name given to preferring(), "auto" outside of it."""
    return _PREFERENCE.name


def explain(
    operator: Callable[..., Any], *arguments: Any, implementation: str = "auto", **settings: Any
) -> str:
    """Which implementation ``operator(*arguments, **settings)`` would run, and why: one line.  Nothing is computed.

    operator: any function of this package that takes ``implementation=``.  Raises what the call would raise.
    """
    try:
        operator(*arguments, implementation=_Question(implementation), **settings)
    except _Answer as answer:
        return answer.choice.explain()
    raise TypeError(f"{operator.__name__} has one implementation only: there is nothing to explain")


class _Question(str):
    """An implementation's name that asks for the choice instead of the result."""


class _Answer(Exception):
    def __init__(self, choice: Choice):
        super().__init__("the choice was only asked for")
        self.choice = choice


def choose(
    operator: str,
    implementations: Sequence[Implementation],
    device: torch.device,
    arguments: tuple[Any, ...],
    name: str = "auto",
) -> Choice:
    """The first of ``implementations`` (in order of preference) that takes the call, or the one of that name.

    "auto" is the name given to preferring(), where there is an implementation of that name.
    Raises ValueError for an unknown name, CannotRun (a ValueError) for a named implementation that can't take the call.
    """
    known = [candidate.name for candidate in implementations]
    if name not in ("auto", *known):
        names = ", ".join(repr(n) for n in known)
        raise ValueError(f"{operator}: implementation must be 'auto' or one of {names}, not {name!r}.")
    only_asked = isinstance(name, _Question)
    if name == "auto" and _PREFERENCE.name in known:
        name = _PREFERENCE.name
    passed_over: list[tuple[str, str]] = []
    for candidate in implementations:
        if name not in ("auto", candidate.name):
            continue
        if name == "auto" and candidate.device not in ("", device_type(device)):
            obstacle = f"it is for {candidate.device} and the tensors are on {device}"
        else:
            obstacle = candidate.obstacle(*arguments)
        if not obstacle:
            choice = Choice(candidate, tuple(passed_over))
            if only_asked:
                raise _Answer(choice)
            if candidate.register is not None:
                candidate.register()
            return choice
        if name == candidate.name:
            raise CannotRun(f"{operator}: implementation {name!r} can't run here: {obstacle}.")
        passed_over.append((candidate.name, obstacle))
    reasons = "; ".join(f"{n}: {why}" for n, why in passed_over)
    raise ValueError(f"{operator}: no implementation takes this call ({reasons}).")
