"""The sampled softmax in Triton: when it can run, and how the kernels are launched.

Shapes: T queries, K negatives, C = 1 + K candidates, I table rows, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.log_partition import log_partition
from gr_kernels.log_partition.schema import Operators
from gr_kernels.log_partition.tiles import WIDEST as WIDEST_SHARED
from gr_kernels.logits import total
from gr_kernels.operators import field
from gr_kernels.sampled_softmax.problem import Problem
from gr_kernels.sampled_softmax.tiles import WIDEST, tiles
from gr_kernels.triton_common.available import on, why_unavailable, wrong_dtype

_LOG2_E = math.log2(math.e)


def obstacle(problem: Problem) -> str:
    """The reason, in a few words, why the kernels can't take this call; "" when they can."""
    queries = problem.queries
    if reason := wrong_dtype(queries.dtype):
        return reason
    widest = WIDEST_SHARED if problem.shared else WIDEST
    if queries.shape[1] > widest:
        return f"rows wider than {widest} don't fit into its tiles"
    return why_unavailable(queries.device)


def sampled_softmax(problem: Problem) -> Tensor:
    """The sum of the losses: a float32 scalar."""
    return total(_shared(problem) if problem.shared else _own(problem), problem.weights)


def _shared(problem: Problem) -> Tensor:
    """log(exp z_y + sum_k exp z_k) - z_y = softplus(log sum_k exp z_k - z_y): log_partition over the negatives.

    The target is excluded there; where every negative is the target, the sum is empty and the loss 0.
    """
    rows_KD, labels_TD = problem.gathered()
    negatives_K, targets_T = problem.negatives, problem.targets
    label_T = (problem.queries.float() * labels_TD.float()).sum(1) * problem.scale
    if problem.bias is not None:
        label_T = label_T + problem.bias[targets_T]
    if len(negatives_K) == 0:
        return label_T * 0.0
    partition_T = log_partition(
        problem.queries,
        rows_KD,
        scale=problem.scale,
        bias_I=problem.negative_bias(),
        excluded_TX=targets_T[:, None],
        names_I=negatives_K,
        implementation="triton",
    )
    return F.softplus(partition_T - label_T)


def _own(problem: Problem) -> Tensor:
    return OPERATORS(
        problem.queries,
        problem.table,
        problem.bias,
        problem.targets,
        problem.negatives,
        scale=problem.scale,
        normalize_eps=problem.normalize_eps,
    )


def _forward(
    queries: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    negatives: Tensor,
    scale: float,
    normalize_eps: float | None,
    want_means: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As log_partition's schema.Operators has it; peaks are in base 2."""
    from gr_kernels.sampled_softmax.triton_kernel import own_negatives

    queries, table = queries.contiguous(), table.contiguous()
    count, width = queries.shape
    losses_T, peaks_T, sums_T = (queries.new_empty(count, dtype=torch.float32) for _ in range(3))
    means_TD = queries.new_empty(count if want_means else 0, width, dtype=torch.float32)
    use = tiles(width)
    if count:
        with on(queries):
            own_negatives[(count,)](
                queries,
                table,
                None if bias is None else bias.float().contiguous(),
                targets.contiguous(),
                negatives.contiguous(),
                losses_T,
                peaks_T,
                sums_T,
                means_TD if want_means else None,
                negatives.shape[1],
                scale * _LOG2_E,
                normalize_eps or 0.0,
                D=width,
                BLOCK_D=use.width,
                BLOCK_K=use.rows,
                NORMALIZE=normalize_eps is not None,
                num_warps=use.num_warps,
            )
    return losses_T, peaks_T, sums_T, means_TD


def _backward(
    grad: Tensor,
    queries: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    negatives: Tensor,
    peaks: Tensor,
    sums: Tensor,
    scale: float,
    normalize_eps: float | None,
    want_table: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """As log_partition's schema.Operators has it."""
    from gr_kernels.sampled_softmax.triton_kernel import row_gradient

    queries, table = queries.contiguous(), table.contiguous()
    catalogue, width = table.shape
    rows_TC = torch.cat([targets.to(negatives.dtype)[:, None], negatives], dim=1)
    # stable: a row's pairs in the order of the queries
    sorted_rows, pairs = rows_TC.flatten().sort(stable=True)
    wanted = torch.arange(catalogue + 1, dtype=sorted_rows.dtype, device=table.device)
    starts = torch.searchsorted(sorted_rows, wanted)
    grad_table = torch.empty_like(table if want_table else table[:0])
    grad_bias = table.new_empty(catalogue if want_bias else 0, dtype=torch.float32)
    use = tiles(width)
    with on(queries):
        row_gradient[(catalogue,)](
            queries,
            table,
            None if bias is None else bias.float().contiguous(),
            targets.contiguous(),
            pairs,
            starts,
            peaks,
            sums,
            grad.float().contiguous(),
            grad_table if want_table else None,
            grad_bias if want_bias else None,
            rows_TC.shape[1],
            scale * _LOG2_E,
            scale,
            normalize_eps or 0.0,
            D=width,
            BLOCK_D=use.width,
            BLOCK_P=use.rows,
            NORMALIZE=normalize_eps is not None,
            num_warps=use.num_warps,
        )
    return grad_table, grad_bias


OPERATORS = Operators(
    "sampled_softmax_triton", (field("Tensor targets"), field("Tensor negatives")), _forward, _backward
)
register = OPERATORS.register
