"""The attention as operators of torch.library. A problem is flattened at this border and put together again behind it.

B sequences, T query and S key rows, H heads, Q query/key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from gr_kernels.hstu_attention.problem import AttentionMask, Gradients, Problem, RelativeBias, TimeBuckets
from gr_kernels.operators import Arguments, define, field, refuse_twice
from gr_kernels.tracing import once

PROBLEM = Arguments(
    [
        field("Tensor offsets"),
        field("Tensor? query_offsets"),
        field("Tensor? targets", "mask.targets"),
        field("Tensor? position", "bias.position"),
        field("Tensor? time", "bias.time"),
        field("Tensor? query_times", "bias.query_times"),
        field("Tensor? key_times", "bias.key_times"),
        field("Tensor? order"),
        field("str bucket_kind", "bias.buckets.kind"),
        field("int bucket_count", "bias.buckets.count"),
        field("float bucket_width", "bias.buckets.width"),
        field("SymInt max_length"),  # changes from batch to batch
        field("float scale"),
        field("float divisor"),
        field("str activation"),
        field("bool causal", "mask.causal"),
        field("int window", "mask.window"),
        field("int full_rows", "mask.full_rows"),
        field("int contexts", "mask.contexts"),
        field("float dropout"),
        field("key dropout_key"),
        field("bool deterministic"),
    ]
)
INPUTS = Arguments([*(field(f"Tensor {name}") for name in "qkv"), *PROBLEM.fields])
_CLASSES: dict[str, Callable[..., Any]] = {
    "": Problem,
    "mask": AttentionMask,
    "bias": RelativeBias,
    "bias.buckets": TimeBuckets,
}
_FORWARD = f"({INPUTS.schema}) -> (Tensor out, Tensor lse)"
_BACKWARD = (
    f"(Tensor d_out, Tensor? out, Tensor? lse, {INPUTS.schema}) "
    "-> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_position, Tensor d_time)"
)
_DIFFERENTIABLE = ("q", "k", "v", "position", "time")  # in the order of the gradients

# (q, k, v, problem) -> (out, lse): (T, H, V), and (H, T) float32, the log of each row's sum of exponentials, where
# softmax's backward wants it; else None
Forward = Callable[[Tensor, Tensor, Tensor, Problem], tuple[Tensor, Tensor | None]]
# (d_out, out, lse, q, k, v, problem) -> gradients; out and lse are None where the forward gave no lse
Backward = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Problem], Gradients]


def flatten(problem: Problem) -> tuple[Any, ...]:
    """The operators' arguments after q, k and v."""
    return PROBLEM.flatten(problem)


def unflatten(*flat: Any) -> Problem:
    """The problem that `flatten` took apart."""
    problem: Problem = PROBLEM.unflatten(flat, _CLASSES)
    return problem


@dataclass(frozen=True)
class Operators:
    """gr_kernels::<name> and gr_kernels::<name>_backward, from two functions of a problem.

    They trace (shapes without computing) and differentiate once. softmax_gives_lse: whether `forward` returns lse for
    softmax; autograd then keeps out and lse.
    """

    name: str
    forward: Forward
    backward: Backward
    softmax_gives_lse: bool = False

    register: Callable[[], None] = dataclass_field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "register", once(self._define))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        """hstu_attention() for a validated call without obstacle, after `register`."""
        out: Tensor = getattr(torch.ops.gr_kernels, self.name)(q, k, v, *flatten(problem))[0]
        return out

    def _define(self) -> None:
        define(self.name, _FORWARD, self._run, self._fake, self._differentiate, self._keep)
        define(f"{self.name}_backward", _BACKWARD, self._run_backward, _fake_backward)
        refuse_twice(f"{self.name}_backward")

    def _gives_lse(self, inputs: tuple[Any, ...]) -> bool:
        return self.softmax_gives_lse and inputs[INPUTS.index["activation"]] == "softmax"

    def _run(self, q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        out, lse = self.forward(q, k, v, unflatten(*flat))
        return out, q.new_empty((0,), dtype=torch.float32) if lse is None else lse

    def _fake(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        q, _, v = inputs[:3]
        shape = (q.shape[1], q.shape[0]) if self._gives_lse(inputs) else (0,)
        return v.new_empty((q.shape[0], *v.shape[1:])), q.new_empty(shape, dtype=torch.float32)

    def _run_backward(self, d_out: Tensor, out: Any, lse: Any, *inputs: Any) -> tuple[Tensor, ...]:
        q, k, v, *flat = inputs
        gradients = self.backward(d_out, out, lse, q, k, v, unflatten(*flat))
        return tuple(q.new_empty((0,)) if x is None else x for x in gradients)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        kept = output if self._gives_lse(inputs) else (None, None)
        ctx.save_for_backward(*(inputs[place] for place in INPUTS.tensors), *kept)
        ctx.settings = inputs[len(INPUTS.tensors) :]

    def _differentiate(self, ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        operator = getattr(torch.ops.gr_kernels, f"{self.name}_backward")
        found = operator(d_out.contiguous(), out, lse, *tensors, *ctx.settings)
        present = {
            name: gradient
            for name, gradient in zip(_DIFFERENTIABLE, found)
            if tensors[INPUTS.index[name]] is not None
        }
        return INPUTS.named(present)


def _fake_backward(d_out: Tensor, out: Any, lse: Any, *inputs: Any) -> tuple[Tensor, ...]:
    given = (inputs[INPUTS.index[name]] for name in _DIFFERENTIABLE)
    return tuple(inputs[0].new_empty((0,)) if x is None else x.new_empty(x.shape) for x in given)
