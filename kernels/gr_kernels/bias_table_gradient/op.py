"""The gradient of a table whose entries were added to scores: checks a call, picks an implementation, runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.bias_table_gradient import cpp, reference, triton_op
from gr_kernels.dispatch import Choice, Implementation, choose, takes_all

_NAME = "bias_table_gradient"


IMPLEMENTATIONS = (
    Implementation(
        "cuda", cpp.cuda_obstacle, cpp.table_gradient, "histograms in shared memory", device="cuda"
    ),
    Implementation(
        "triton",
        triton_op.obstacle,
        triton_op.table_gradient,
        "values sorted by bucket; deterministic",
        device="cuda",
        register=triton_op.register,
    ),
    Implementation(
        "cpp",
        cpp.cpp_obstacle,
        cpp.table_gradient,
        "compiled, on every thread, sums in float64",
        device="cpu",
    ),
    Implementation(
        "reference", takes_all, reference.table_gradient, "plain PyTorch, any device and precision"
    ),
)


def bias_table_gradient(
    values: Tensor,
    buckets: Tensor,
    entries: int,
    *,
    deterministic: bool | None = None,
    implementation: str = "auto",
) -> Tensor:
    """gradient[c] = sum of the values whose bucket is c: what a table added to scores gets from the scores' gradients.

    Where scores s_ij = ... + table[bucket_ij], d table[c] = sum of d s_ij over bucket_ij = c. The values come in any
    shape and order, so blocks of scores can be handed over as a kernel has them.

    Args:
        values: floating, any shape, M numbers: gradients of scores.
        buckets: int32 or int64, of that shape; a negative bucket (of a score that the mask forbids) counts nowhere.
        entries: of the table.
        deterministic: the same bits every time; None: as torch.are_deterministic_algorithms_enabled() says. ("cpp" and
            "triton" always give the same.)
        implementation: "auto", or "cuda", "triton", "cpp", "reference".

    Returns:
        (entries,) float32, or float64 for float64 values. A gradient: not differentiable itself.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run.
        IndexError: a bucket is not below ``entries``. (On a device, and in Triton, it isn't looked for: such values are
            left out.)
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    choice = _choose(values, buckets, entries, implementation)
    return choice.implementation.run(values.detach(), buckets, entries, deterministic)  # type: ignore[no-any-return]


def _choose(values: Tensor, buckets: Tensor, entries: int, name: str) -> Choice:
    if not values.is_floating_point() or buckets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{_NAME}: values must be floating with int32 or int64 buckets, not {values.dtype} with {buckets.dtype}."
        )
    if values.shape != buckets.shape or values.device != buckets.device:
        raise ValueError(
            f"{_NAME}: values are {tuple(values.shape)} on {values.device}, buckets {tuple(buckets.shape)} on "
            f"{buckets.device}: they must be alike."
        )
    if entries < 0:
        raise ValueError(f"{_NAME}: entries must be at least 0, not {entries}.")
    return choose(_NAME, IMPLEMENTATIONS, values.device, (values, entries), name)
