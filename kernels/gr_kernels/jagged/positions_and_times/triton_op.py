"""add_positions_and_times in Triton, as a differentiable torch operator.

B sequences, T rows, D width, P entries of the position table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gr_kernels.hstu_attention.buckets import TimeBuckets, device_thresholds
from gr_kernels.jagged.positions_and_times import bucket_op
from gr_kernels.jagged.positions_and_times.problem import Problem
from gr_kernels.jagged.positions_and_times.reference import position_entries
from gr_kernels.jagged.tiles import WARPS, add_tile, search_steps
from gr_kernels.operators import Arguments, define, field
from gr_kernels.tracing import once
from gr_kernels.triton_common.available import on, why_unavailable, wrong_dtype
from gr_kernels.triton_common.sums_by_entry import sum_rows_by_entry

PROBLEM = Arguments(
    [
        field("Tensor offsets"),
        field("Tensor? targets"),
        field("Tensor? position"),
        field("Tensor? time"),
        field("Tensor? time_differences"),
        field("str bucket_kind", "buckets.kind"),
        field("int bucket_count", "buckets.count"),
        field("float bucket_width", "buckets.width"),
        field("SymInt max_length"),
        field("float scale"),
        field("str count_from"),
    ]
)
INPUTS = Arguments([field("Tensor x"), *PROBLEM.fields])
_CLASSES: dict[str, Callable[..., Any]] = {"": Problem, "buckets": TimeBuckets}
_TABLES = ("position", "time")


def obstacle(x_TD: Tensor, problem: Problem) -> str:
    """Why this call can't be Triton's, "" when it can."""
    for name, tensor in (("x", x_TD), ("position", problem.position), ("time", problem.time)):
        if tensor is not None and (reason := wrong_dtype(tensor.dtype, name)):
            return reason
    return why_unavailable(x_TD.device)


def add_positions_and_times(x_TD: Tensor, problem: Problem) -> Tensor:
    """reference.add_positions_and_times() for a call without obstacle, after `register`."""
    operator = torch.ops.gr_kernels.add_positions_and_times_triton
    return operator(x_TD, *PROBLEM.flatten(problem))  # type: ignore[no-any-return]


def _forward(x_TD: Tensor, *flat: Any) -> Tensor:
    return _add(x_TD, PROBLEM.unflatten(flat, _CLASSES))


def _forward_fake(x_TD: Tensor, *flat: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


def _add(x_TD: Tensor, problem: Problem) -> Tensor:
    from gr_kernels.jagged.positions_and_times import triton_kernel

    out = x_TD.new_empty(x_TD.shape)
    rows, width = x_TD.shape
    if out.numel() == 0:
        return out
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    offsets, with_time = problem.offsets, problem.time is not None
    sequences = offsets.shape[0] - 1
    t = add_tile(width, x_TD.itemsize)
    thresholds = device_thresholds(problem.buckets, x_TD.device) if with_time else offsets
    tensors = (offsets, problem.targets, problem.position, problem.time, problem.time_differences)
    with on(x_TD):
        triton_kernel.add_rows[(-(-rows // t.rows),)](
            x_TD, out, *(_plain(tensor, offsets) for tensor in tensors),
            thresholds, problem.scale, rows, sequences, thresholds.shape[0], width, x_TD.stride(0),
            HAS_TARGETS=problem.targets is not None, HAS_POSITION=problem.position is not None, HAS_TIME=with_time,
            FROM_BACK=problem.count_from == "back",
            STEPS=search_steps(sequences + 1), BUCKET_STEPS=search_steps(thresholds.shape[0]) if with_time else 0,
            BLOCK_R=t.rows, BLOCK_C=t.columns, num_warps=WARPS,
        )  # fmt: skip
    return out


def _plain(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Contiguous; for an absent tensor some pointer, which the kernel doesn't follow."""
    return unused if tensor is None else tensor.contiguous()


def _backward(d_out_TD: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of the tables that are given (empty for those that aren't)."""
    problem: Problem = PROBLEM.unflatten(flat, _CLASSES)
    d_out_TD = d_out_TD.contiguous()
    only_x = replace(problem, targets=None, position=None, time=None, time_differences=None)
    d_x_TD = _add(d_out_TD, only_x)
    d_position, d_time = d_out_TD.new_empty(0), d_out_TD.new_empty(0)
    if problem.position is None and problem.time is None:
        return d_x_TD, d_position, d_time
    entry_T, inside_T = position_entries(
        problem.offsets, problem.targets, d_out_TD.shape[0], problem.count_from
    )
    if (position := problem.position) is not None:
        d_position = sum_rows_by_entry(d_out_TD, entry_T, inside_T, position.shape[0]).to(position.dtype)
    if (time := problem.time) is not None:
        assert problem.time_differences is not None
        bucket_T = bucket_op.bucket(problem.time_differences, problem.buckets)
        d_time = sum_rows_by_entry(d_out_TD, bucket_T, inside_T, time.shape[0]).to(time.dtype)
    return d_x_TD, d_position, d_time


def _backward_fake(d_out_TD: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    tables = (flat[PROBLEM.index[name]] for name in _TABLES)
    empty_or_like = (
        d_out_TD.new_empty(0) if table is None else table.new_empty(table.shape) for table in tables
    )
    return d_out_TD.new_empty(d_out_TD.shape), *empty_or_like


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(inputs[place] for place in INPUTS.tensors[1:]))  # (not x)
    ctx.settings = inputs[len(INPUTS.tensors) :]


def _differentiate(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
    flat = [*ctx.saved_tensors, *ctx.settings]
    wanted = [name for name in _TABLES if ctx.needs_input_grad[INPUTS.index[name]]]
    for name in _TABLES:
        if name not in wanted:
            flat[PROBLEM.index[name]] = None
    operator = torch.ops.gr_kernels.add_positions_and_times_triton_backward
    found = dict(zip(("x", *_TABLES), operator(d_out_TD, *flat)))
    return INPUTS.named({name: found[name] for name in ("x", *wanted)})


@once
def register() -> None:
    """Defines the operators, and that of the buckets."""
    bucket_op.register()
    name = "add_positions_and_times_triton"
    define(name, f"({INPUTS.schema}) -> Tensor", _forward, _forward_fake, _differentiate, _keep)
    backward = f"(Tensor d_out, {PROBLEM.schema}) -> (Tensor d_x, Tensor d_position, Tensor d_time)"
    define(f"{name}_backward", backward, _backward, _backward_fake)
