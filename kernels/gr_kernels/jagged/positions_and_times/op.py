"""Position and time embeddings added to x: checks a call, picks an implementation, runs it.

B sequences, T rows (sum of lengths), D width, P entries of the position table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.dispatch import Choice, Implementation, choose, takes_all
from gr_kernels.hstu_attention.buckets import TimeBuckets
from gr_kernels.jagged.offsets import check_offsets
from gr_kernels.jagged.positions_and_times import bucket_op, reference, triton_op
from gr_kernels.jagged.positions_and_times.problem import CountFrom, Problem
from gr_kernels.tracing import values_are_at_hand

_NAME = "add_positions_and_times"


IMPLEMENTATIONS = (
    Implementation(
        "triton", triton_op.obstacle, triton_op.add_positions_and_times, "one pass, gradients without atomics",
        device="cuda", register=triton_op.register,
    ),
    Implementation(
        "reference", takes_all, reference.add_positions_and_times, "plain PyTorch, any device and precision",
        register=bucket_op.register,
    ),
)  # fmt: skip


def add_positions_and_times(
    x_TD: Tensor,
    offsets_B1: Tensor,
    *,
    max_length: int,
    scale: float = 1.0,
    position_PD: Tensor | None = None,
    time_ED: Tensor | None = None,
    time_differences_T: Tensor | None = None,
    buckets: TimeBuckets = TimeBuckets(),
    targets_B: Tensor | None = None,
    count_from: CountFrom = "front",
    implementation: str = "auto",
) -> Tensor:
    """x scale + position[p] + time[bucket(dt)] for every row, in one pass.

    In a sequence of n rows of which the last m are targets (candidates to score), row i has the entry
        count_from="front": p = min(i, n - m): the place in the sequence; all targets stand where the next row would;
        count_from="back":  p = max(n - m - i, 0): 1 for the last row of history, 2 before it; targets have 0.

    Args:
        x_TD: (T, D) floating.
        offsets_B1: (B + 1,) int64, ascending: sequence b is rows offsets[b] to offsets[b + 1].
        max_length: no sequence is longer than this.
        scale: multiplies x (HSTU and SASRec: sqrt(D)).
        position_PD: (P, D) floating, or None; P >= max_length, counted from the back P >= max_length + 1.
        time_ED: (buckets.count, D) floating, or None.
        time_differences_T: (T,) int64, with time_ED: dt, whose sign doesn't matter.
        buckets: of |dt|.
        targets_B: (B,) int64 or int32: the number of targets of each sequence; None: none.
        count_from: "front" or "back".
        implementation: "auto", or "triton", "reference".

    Returns:
        (T, D) in x's dtype, contiguous; summed in float32 (float64 for that) and rounded once. Rows of no sequence are
        zero. Differentiable in x and in both tables.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run. (The
            values of offsets and targets on a device are trusted: looking at them would wait for it.)
    """
    problem = Problem(
        offsets=offsets_B1,
        max_length=max_length,
        scale=scale,
        position=position_PD,
        time=time_ED,
        time_differences=time_differences_T if time_ED is not None else None,
        buckets=buckets,
        targets=targets_B,
        count_from=count_from,
    )
    return _choose(x_TD, problem, implementation).implementation.run(x_TD, problem)  # type: ignore[no-any-return]


def _choose(x_TD: Tensor, problem: Problem, name: str) -> Choice:
    _check(x_TD, problem)
    return choose(_NAME, IMPLEMENTATIONS, x_TD.device, (x_TD, problem), name)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(f"{_NAME}: {sentence}.")


def _check(x_TD: Tensor, problem: Problem) -> None:
    _require(
        x_TD.dim() == 2 and x_TD.is_floating_point(),
        f"x must be (T, D) floating, not {tuple(x_TD.shape)} {x_TD.dtype}",
    )
    rows, width = x_TD.shape
    check_offsets(_NAME, problem.offsets, rows, x_TD.device, problem.max_length)
    _require(
        problem.count_from in ("front", "back"),
        f"count_from is 'front' or 'back', not {problem.count_from!r}",
    )
    entries = problem.max_length + (problem.count_from == "back")
    for table_name, table, least in (
        ("position", problem.position, entries),
        ("time", problem.time, problem.buckets.count),
    ):
        if table is None:
            continue
        _require(
            table.dim() == 2
            and table.shape[1] == width
            and table.is_floating_point()
            and table.device == x_TD.device,
            f"the {table_name} table must be floating, {width} wide and on {x_TD.device} as x is, not "
            f"{tuple(table.shape)} {table.dtype} on {table.device}",
        )
        exact = table_name == "time"
        _require(
            table.shape[0] == least if exact else table.shape[0] >= least,
            f"the {table_name} table needs {least} entries{'' if exact else ' or more'}, not {table.shape[0]}",
        )
    if problem.time is not None:
        _check_vector("time_differences", problem.time_differences, rows, x_TD.device, (torch.int64,))
    if problem.targets is not None:
        sequences = problem.offsets.shape[0] - 1
        _check_vector("targets", problem.targets, sequences, x_TD.device, (torch.int64, torch.int32))
        if values_are_at_hand(x_TD):
            wrong_B = (problem.targets < 0) | (problem.targets > problem.offsets.diff())
            _require(
                not bool(wrong_B.any()), f"sequence {int(wrong_B.to(torch.int8).argmax()) if sequences else 0} has "
                "fewer rows than targets"
            )  # fmt: skip


def _check_vector(
    name: str, vector: Tensor | None, count: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    _require(vector is not None, f"a time table needs {name}")
    assert vector is not None
    _require(
        vector.shape == (count,) and vector.dtype in dtypes and vector.device == device,
        f"{name} must be ({count},) {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} on {device}, not "
        f"{tuple(vector.shape)} {vector.dtype} on {vector.device}",
    )
