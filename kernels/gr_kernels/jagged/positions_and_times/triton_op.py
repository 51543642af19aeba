"""add_positions_and_times in Triton, as a differentiable torch operator.

B sequences, T rows, D width, P entries of the position table.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from gr_kernels.hstu_attention.buckets import TimeBuckets, device_thresholds
from gr_kernels.jagged.positions_and_times import bucket_op
from gr_kernels.jagged.positions_and_times.call import Call, CountFrom
from gr_kernels.jagged.positions_and_times.reference import position_entries
from gr_kernels.jagged.tiles import WARPS, Tile, search_steps, tile
from gr_kernels.triton_common.available import on, registering
from gr_kernels.triton_common.sums_by_entry import sum_rows_by_entry

Kind = Literal["log", "sqrt"]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ARGUMENTS = (
    "Tensor offsets, Tensor? targets, Tensor? position, Tensor? time, Tensor? differences, str bucket_kind, "
    "int bucket_count, float bucket_width, float scale, bool from_back"
)


def obstacle(x_TD: Tensor, call: Call) -> str:
    """Why this call can't be Triton's, "" when it can."""
    for name, tensor in (("x", x_TD), ("position", call.position), ("time", call.time)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            return f"it computes in float32, float16 or bfloat16, and {name} is {tensor.dtype}"
    return _why_not(x_TD.device)


def add_positions_and_times(x_TD: Tensor, call: Call) -> Tensor:
    """reference.add_positions_and_times() for a call without obstacle."""
    buckets = call.buckets
    return torch.ops.gr_kernels.add_positions_and_times_triton(  # type: ignore[no-any-return]
        x_TD, call.offsets, call.targets, call.position, call.time, call.time_differences,
        buckets.kind, buckets.count, buckets.width, call.scale, call.count_from == "back",
    )  # fmt: skip


def add_tile(width: int, item_bytes: int) -> Tile:
    """For rows of ``item_bytes`` numbers: the choices that compile without spills for sm_80 and sm_90.

    16-bit numbers take half of what a copy takes, since three tensors' numbers meet as float32.
    """
    return tile(width, max(4, 16 // item_bytes))


def _add(
    x_TD: Tensor, offsets: Tensor, targets: Tensor | None, position: Tensor | None, time: Tensor | None,
    differences: Tensor | None, kind: Kind, count: int, bucket_width: float, scale: float, from_back: bool,
) -> Tensor:  # fmt: skip
    from gr_kernels.jagged.positions_and_times import triton_kernel

    out = _add_fake(x_TD)
    rows, width = x_TD.shape
    if out.numel() == 0:
        return out
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    sequences = offsets.shape[0] - 1
    t = add_tile(width, x_TD.itemsize)
    with_time = time is not None
    buckets = TimeBuckets(kind, count, bucket_width)
    thresholds = device_thresholds(buckets, x_TD.device) if with_time else offsets
    with on(x_TD):
        triton_kernel.add_rows[(-(-rows // t.rows),)](
            x_TD, out, *(_plain(tensor, offsets) for tensor in (offsets, targets, position, time, differences)),
            thresholds, scale, rows, sequences, thresholds.shape[0], width, x_TD.stride(0),
            HAS_TARGETS=targets is not None, HAS_POSITION=position is not None, HAS_TIME=with_time, FROM_BACK=from_back,
            STEPS=search_steps(sequences + 1), BUCKET_STEPS=search_steps(thresholds.shape[0]) if with_time else 0,
            BLOCK_R=t.rows, BLOCK_C=t.columns, num_warps=WARPS,
        )  # fmt: skip
    return out


def _plain(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Contiguous; for an absent tensor some pointer, which the kernel doesn't follow."""
    return unused if tensor is None else tensor.contiguous()


def _add_fake(x_TD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


def _backward_op(
    d_out_TD: Tensor, offsets: Tensor, targets: Tensor | None, position: Tensor | None, time: Tensor | None,
    differences: Tensor | None, kind: Kind, count: int, bucket_width: float, scale: float, from_back: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of the tables that are given (empty for those that aren't)."""
    d_out_TD = d_out_TD.contiguous()
    d_x_TD = _add(d_out_TD, offsets, None, None, None, None, kind, count, bucket_width, scale, from_back)
    none = d_out_TD.new_empty(0)
    if position is None and time is None:
        return d_x_TD, none, none.clone()
    count_from: CountFrom = "back" if from_back else "front"
    entry_T, inside_T = position_entries(offsets, targets, d_out_TD.shape[0], count_from)
    d_position, d_time = none, none.clone()
    if position is not None:
        d_position = sum_rows_by_entry(d_out_TD, entry_T, inside_T, position.shape[0]).to(position.dtype)
    if time is not None:
        assert differences is not None
        bucket_T = bucket_op.bucket(differences, TimeBuckets(kind, count, bucket_width))
        d_time = sum_rows_by_entry(d_out_TD, bucket_T, inside_T, count).to(time.dtype)
    return d_x_TD, d_position, d_time


def _backward_fake(
    d_out_TD: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
    position: Tensor | None,
    time: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    none = d_out_TD.new_empty(0)
    tables = (none.clone() if table is None else table.new_empty(table.shape) for table in (position, time))
    return d_out_TD.new_empty(d_out_TD.shape), *tables  # type: ignore[return-value]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.settings = inputs[6:]


def _backward(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
    offsets, targets, position, time, differences = ctx.saved_tensors
    want_position, want_time = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    d_x_TD, d_position, d_time = torch.ops.gr_kernels.add_positions_and_times_triton_backward(
        d_out_TD, offsets, targets, position if want_position else None, time if want_time else None, differences,
        *ctx.settings,
    )  # fmt: skip
    return (
        d_x_TD,
        None,
        None,
        d_position if want_position else None,
        d_time if want_time else None,
        *(None for _ in range(1 + len(ctx.settings))),
    )


@functools.cache
def _register() -> None:
    """Defines the operators, and that of the buckets, once, on first use."""
    bucket_op.register()
    forward = torch.library.custom_op(
        "gr_kernels::add_positions_and_times_triton",
        _add,
        mutates_args=(),
        schema=f"(Tensor x, {_ARGUMENTS}) -> Tensor",
    )
    backward = torch.library.custom_op(
        "gr_kernels::add_positions_and_times_triton_backward",
        _backward_op,
        mutates_args=(),
        schema=f"(Tensor d_out, {_ARGUMENTS}) -> (Tensor d_x, Tensor d_position, Tensor d_time)",
    )
    forward.register_fake(_add_fake)
    backward.register_fake(_backward_fake)
    forward.register_autograd(_backward, setup_context=_keep_for_backward)


_why_not = registering(_register)
