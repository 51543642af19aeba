"""What is measured: a case (inputs of one shape) and the ways of computing it.

B sequences, T rows in the batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")
Output = Tensor | tuple[Tensor, ...]


class Spec(Protocol):
    """The shape of a case: a frozen dataclass that another process can unpickle."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    def small(self) -> Spec:
        """The same kind of case, small enough to compute plainly on CPU in a moment."""
        ...


@dataclass(frozen=True)
class Work:
    """What a case has to do at the least: floating-point operations, and bytes moved if each input is read and each
    result written once."""

    flops_forward: float
    flops_backward: float
    bytes_forward: float
    bytes_backward: float

    def flops(self, which: str) -> float:
        return {"forward": self.flops_forward, "backward": self.flops_backward}.get(
            which, self.flops_forward + self.flops_backward
        )

    def bytes(self, which: str) -> float:
        return {"forward": self.bytes_forward, "backward": self.bytes_backward}.get(
            which, self.bytes_forward + self.bytes_backward
        )


@dataclass(frozen=True)
class Case:
    """leaves: what gets gradients, by name; none: there is no backward pass.  upstream: the gradient of the result (of
    several results: their rows one after the other).  fixed: the rest of the inputs.  tokens: rows that are real, for
    memory a token.  for_gate: the case that correctness is judged on, where it is another (the same without dropout).
    """

    spec: Spec
    leaves: dict[str, Tensor]
    upstream: Tensor
    fixed: dict[str, Any]
    work: Work
    tokens: int
    for_gate: Case | None = None

    @property
    def device(self) -> torch.device:
        return self.upstream.device

    @property
    def passes(self) -> tuple[str, ...]:
        """Of PASSES those that are timed."""
        return PASSES if self.leaves else ("forward", "both")

    def inputs(self) -> list[Tensor]:
        """Every tensor of the case."""
        tensors = [self.upstream, *self.leaves.values(), *self.fixed.values()]
        return [x for x in tensors if isinstance(x, Tensor)]

    def describe(self) -> dict[str, Any]:
        shape: dict[str, Any] = {}
        for name, value in asdict(self.spec).items():  # type: ignore[call-overload]
            shape |= value if isinstance(value, dict) else {name: value}
        return {"name": self.spec.name, **shape, "tokens": self.tokens}


@dataclass(frozen=True)
class Step:
    """A way bound to a case: ``forward()`` gives the result, or several that are rows of one; ``leaves``: what the
    backward pass differentiates."""

    forward: Callable[[], Output]
    leaves: dict[str, Tensor]


def always(case: Case) -> str:
    """No obstacle."""
    return ""


@dataclass(frozen=True)
class Way:
    """One way of computing a case.

    bind: prepares whatever isn't timed (an index, a mask) and returns the step.
    obstacle: says in a few words why this way can't take the case, "" when it can.
    ours: gr's own; its figures are compared with those of all others.
    A call that gr_kernels refuses ("... can't run here: reason") is an obstacle as well.
    answer: which function of the case it computes (an attention with softmax isn't HSTU's); "": it has none, and
        no correctness gate (the bare matrix products of a loss).
    slack: relative error allowed beyond the gate's, with the reason in ``note``.
    """

    name: str
    bind: Callable[[Case], Step]
    obstacle: Callable[[Case], str] = always
    ours: bool = False
    answer: str = "silu"
    slack: float = 0.0
    note: str = ""


class Operator(Protocol):
    """A module of this folder that knows how to measure one operator."""

    NAME: str
    FORMULA: str  # of the floating-point operations, for a person

    def specs(self, device: str, grid: str) -> list[Any]: ...
    def build(self, spec: Any, device: torch.device) -> Case: ...
    def ways(self, case: Case) -> list[Way]: ...
    def exact(self, case: Case, answer: str) -> dict[str, Tensor]:
        """Results in float64."""
        ...

    def plain(self, case: Case, answer: str) -> dict[str, Tensor]:
        """Results of plain PyTorch in the case's dtype."""
        ...


@runtime_checkable
class WithExtra(Operator, Protocol):
    """An operator with figures of its own."""

    def extra(self, step: Step, case: Case) -> dict[str, Any]:
        """More figures of a way that passed its gate."""
        ...


@dataclass
class Result:
    """What was found of one way on one case; ``why`` says why there is no time."""

    way: str
    ours: bool
    why: str = ""
    red: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: float | None = None
    kept_bytes: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def gradients(step: Step, upstream: Tensor) -> dict[str, Tensor]:
    """The result ("out") and the gradient of every leaf, by name."""
    out = step.forward()
    found = backward(step, out, upstream)
    whole = torch.cat(out) if isinstance(out, tuple) else out
    return {"out": whole.detach(), **dict(zip(step.leaves, found, strict=True))}


def backward(step: Step, out: Output, upstream: Tensor) -> tuple[Tensor, ...]:
    """The gradient of every leaf, in order; nothing to do without leaves."""
    if not step.leaves:
        return ()
    outs = out if isinstance(out, tuple) else (out,)
    parts = upstream.split([len(each) for each in outs]) if isinstance(out, tuple) else (upstream,)
    gradients_of_outs = [part.to(each.dtype) for part, each in zip(parts, outs, strict=True)]
    return torch.autograd.grad(outs, list(step.leaves.values()), gradients_of_outs)


def as_it_is(bind: Callable[[Case], Step]) -> Callable[[Case, str], dict[str, Tensor]]:
    """An operator's ``plain`` from a way of computing it."""
    return lambda case, answer: gradients(bind(case), case.upstream)


def in_float64(bind: Callable[[Case], Step]) -> Callable[[Case, str], dict[str, Tensor]]:
    """An operator's ``exact`` from a way of computing it."""

    def exact(case: Case, answer: str) -> dict[str, Tensor]:
        double = in_double(case)
        return gradients(bind(double), double.upstream)

    return exact


def in_double(case: Case) -> Case:
    """The same case with leaves and upstream gradient in float64."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in case.leaves.items()}
    return replace(case, leaves=leaves, upstream=case.upstream.double())
