"""Launches the Triton kernels: torch.ops.gr_kernels.sampled_softmax_triton, its meta implementation and gradients.

Shapes: T queries, K negatives, C = 1 + K candidates, I table rows, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.log_partition import log_partition
from gr_kernels.log_partition.tiles import WIDEST
from gr_kernels.log_partition.triton_autograd import register_autograd, table_gradient_fake
from gr_kernels.sampled_softmax.problem import Problem
from gr_kernels.sampled_softmax.scores import gathered
from gr_kernels.triton_common.available import on, why_unavailable
from gr_kernels.triton_common.sizes import power_of_two

_LOG2_E = math.log2(math.e)
_WIDEST = 1024


def obstacle(problem: Problem) -> str:
    """The reason, in a few words, why the kernels can't take this call; "" when they can."""
    queries = problem.queries
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 or bfloat16, not {queries.dtype}"
    widest = WIDEST if problem.shared else _WIDEST
    if queries.shape[1] > widest:
        return f"rows wider than {widest} don't fit into its tiles"
    return why_unavailable(queries.device)


def loss(problem: Problem) -> Tensor:
    """The sum of the losses: a float32 scalar."""
    return problem.total(_shared(problem) if problem.shared else _own(problem))


def _shared(problem: Problem) -> Tensor:
    """log(exp z_y + sum_k exp z_k) - z_y = softplus(log sum_k exp z_k - z_y): log_partition over the negatives.

    The target is excluded there; where every negative is the target, the sum is empty and the loss 0.
    """
    rows_KD, labels_TD = gathered(problem)
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
    out: Tensor = torch.ops.gr_kernels.sampled_softmax_triton(
        problem.queries,
        problem.table,
        problem.bias,
        problem.targets,
        problem.negatives,
        problem.scale,
        problem.normalize_eps,
        problem.queries.requires_grad,
    )[0]
    return out


def blocks(width: int) -> dict[str, int]:
    """Tiles of about 2,048 numbers, 16 a thread: several gathered rows in flight, many programs a processor."""
    padded = max(16, power_of_two(width))
    return {"D": width, "BLOCK_D": padded, "rows": max(4, min(64, 2048 // padded))}


@torch.library.custom_op("gr_kernels::sampled_softmax_triton", mutates_args=())
def _forward(
    queries: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    negatives: Tensor,
    scale: float,
    normalize_eps: float | None,
    want_directions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses_T, peaks_T in base 2, sums_T, directions_TD float32 or empty).

    directions: d loss / d query / scale.
    """
    from gr_kernels.sampled_softmax.triton_kernel import own_negatives

    queries, table = queries.contiguous(), table.contiguous()
    count, width = queries.shape
    losses_T, peaks_T, sums_T = (queries.new_empty(count, dtype=torch.float32) for _ in range(3))
    directions_TD = queries.new_empty(count if want_directions else 0, width, dtype=torch.float32)
    sizes = blocks(width)
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
                directions_TD if want_directions else None,
                negatives.shape[1],
                scale * _LOG2_E,
                normalize_eps or 0.0,
                D=sizes["D"],
                BLOCK_D=sizes["BLOCK_D"],
                BLOCK_K=sizes["rows"],
                NORMALIZE=normalize_eps is not None,
                num_warps=4,
            )
    return losses_T, peaks_T, sums_T, directions_TD


@_forward.register_fake
def _forward_fake(
    queries: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    negatives: Tensor,
    scale: float,
    normalize_eps: float | None,
    want_directions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, width = queries.shape
    losses_T, peaks_T, sums_T = (queries.new_empty(count, dtype=torch.float32) for _ in range(3))
    directions = queries.new_empty(count if want_directions else 0, width, dtype=torch.float32)
    return losses_T, peaks_T, sums_T, directions


@torch.library.custom_op("gr_kernels::sampled_softmax_triton_table_gradient", mutates_args=())
def _table_gradient(
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
    """The gradients of the table (I, D) in its dtype and of the bias (I,) float32, for (T,) upstream ones.

    Empty where not wanted.
    """
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
    sizes = blocks(width)
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
            D=sizes["D"],
            BLOCK_D=sizes["BLOCK_D"],
            BLOCK_P=sizes["rows"],
            NORMALIZE=normalize_eps is not None,
            num_warps=4,
        )
    return grad_table, grad_bias


_table_gradient.register_fake(table_gradient_fake)
register_autograd("sampled_softmax_triton")
