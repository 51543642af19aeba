"""What a call must satisfy before an implementation sees it: one sentence says what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.hstu_attention.problem import AttentionMask, AttentionProblem, RelativeBias


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(f"hstu_attention: {sentence}.")


def check(q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, problem: AttentionProblem) -> None:
    """Raises ValueError with one sentence if the call makes no sense."""
    _check_tensors(q_THQ, k_THQ, v_THV)
    _check_settings(problem)
    _check_offsets(problem.offsets, q_THQ.shape[0], problem.max_length)
    _check_bias(problem.bias, q_THQ.shape[0], problem.max_length, problem.mask)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _require(tensor.dim() == 3, f"{name} must have 3 dimensions (rows, heads, width), not {tensor.dim()}")
        _require(tensor.is_floating_point(), f"{name} must be floating point, not {tensor.dtype}")
        _require(
            tensor.dtype == q.dtype and tensor.device == q.device,
            f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}",
        )
    shape = tuple(q.shape)
    _require(k.shape == q.shape, f"k must have q's shape {shape}, not {tuple(k.shape)}")
    _require(v.shape[:2] == q.shape[:2], f"v must have q's rows and heads {shape[:2]}, not {tuple(v.shape)}")


def _check_settings(problem: AttentionProblem) -> None:
    activation, divisor, dropout = problem.activation, problem.divisor, problem.dropout
    key = problem.dropout_key
    _require(activation in ("silu", "softmax"), f"activation is 'silu' or 'softmax', not {activation!r}")
    _require(activation == "softmax" or divisor > 0, f"divisor must be positive, not {divisor}")
    _require(0.0 <= dropout < 1.0, f"dropout must be at least 0 and below 1, not {dropout}")
    _require(0 <= key < 2**64, f"dropout_key must be a 64-bit number of at least 0, not {key}")


def _check_offsets(offsets: Tensor, rows: int, max_length: int) -> None:
    """Offsets on a device are trusted (reading them would wait for it), as are those of a graph being traced."""
    _require(
        offsets.dim() == 1 and offsets.dtype == torch.int64 and offsets.shape[0] >= 1,
        f"offsets must be (B + 1,) int64, not {tuple(offsets.shape)} {offsets.dtype}",
    )
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    edges = offsets.tolist()
    _require(
        edges[0] >= 0 and edges[-1] <= rows,
        f"offsets go from {edges[0]} to {edges[-1]}, outside the {rows} rows of q",
    )
    for sequence, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        length = end - begin
        _require(
            length >= 0, f"offsets must not fall, but sequence {sequence} goes from row {begin} to {end}"
        )
        _require(
            length <= max_length, f"sequence {sequence} has {length} rows, more than max_length {max_length}"
        )


def _check_bias(bias: RelativeBias, rows: int, max_length: int, mask: AttentionMask) -> None:
    for name, table in (("position", bias.position), ("time", bias.time)):
        if table is not None:
            _require(
                table.dim() == 1 and table.is_floating_point(),
                f"bias.{name} must be a floating vector, not {tuple(table.shape)} {table.dtype}",
            )
    if bias.position is not None:
        _require(mask.causal, "bias.position is defined for causal attention only")
        _require(
            bias.position.shape[0] >= max_length,
            f"bias.position has {bias.position.shape[0]} entries, fewer than max_length {max_length}",
        )
    if bias.time is None:
        return
    _require(
        bias.time.shape[0] == bias.buckets.count,
        f"bias.time must have {bias.buckets.count} entries, one a bucket, not {bias.time.shape[0]}",
    )
    for name, times in (("query_times", bias.query_times), ("key_times", bias.key_times)):
        _require(times is not None, f"bias.time needs bias.{name}")
        assert times is not None
        _require(
            times.shape == (rows,) and times.dtype == torch.int64,
            f"bias.{name} must be ({rows},) int64, not {tuple(times.shape)} {times.dtype}",
        )
