"""The sums over a table in Triton: when they can run, and how the kernels are launched.

Shapes: T queries, I table rows, D width, X excluded names of a query, S splits of the table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gr_kernels.log_partition.problem import Problem
from gr_kernels.log_partition.schema import Operators
from gr_kernels.log_partition.tiles import WIDEST, splits, tiles
from gr_kernels.logits import full_precision, total
from gr_kernels.operators import field
from gr_kernels.triton_common.available import interpreting, on, why_unavailable, wrong_dtype

MOST_EXCLUDED = 16  # compared one after the other with every logit
_LOG2_E = math.log2(math.e)
_INTERPRETED_PROCESSORS = 4  # so that tests see the table split


def obstacle(problem: Problem) -> str:
    """The reason, in a few words, why the kernels can't take this call; "" when they can."""
    if reason := wrong_dtype(problem.queries.dtype):
        return reason
    if problem.queries.shape[1] > WIDEST:
        return f"rows wider than {WIDEST} don't fit into its tiles"
    if problem.excluded is not None and problem.excluded.shape[1] > MOST_EXCLUDED:
        return f"it takes at most {MOST_EXCLUDED} excluded names of a query, not {problem.excluded.shape[1]}"
    if problem.table.shape[0] >= 1 << 31:
        return "it counts table rows in 32 bits"
    return why_unavailable(problem.queries.device)


def log_partition(problem: Problem) -> Tensor:
    """(T,) float32; with targets, the losses."""
    if problem.queries.dtype == torch.float16:
        # a share times 1 / |e|, as the kernel forms it, may be beyond float16's 65,504
        problem = problem.with_normalized_table()
    return OPERATORS(
        problem.queries,
        problem.table,
        problem.bias,
        problem.targets,
        problem.excluded,
        problem.names,
        scale=problem.scale,
        normalize_eps=problem.normalize_eps,
    )


def cross_entropy(problem: Problem) -> Tensor:
    return total(log_partition(problem), problem.weights)


def _forward(
    queries: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    excluded: Tensor | None,
    names: Tensor | None,
    scale: float,
    normalize_eps: float | None,
    want_means: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As schema.Operators has it; peaks are in base 2. A mean is that of the (normalised) rows by their shares, less
    the target's."""
    from gr_kernels.log_partition.triton_kernel import partial_sums

    queries, table = queries.contiguous(), table.contiguous()
    count, width = queries.shape
    catalogue = table.shape[0]
    inverse = _inverse_norms(table, normalize_eps)
    use = tiles(width, 8 * queries.element_size(), _capability(queries.device), gradient=False)
    row_blocks, item_tiles = -(-count // use.held), -(-catalogue // use.streamed)
    parts = splits(row_blocks, item_tiles, use.resident * _processors(queries.device))
    peaks_ST = queries.new_empty(parts, count, dtype=torch.float32)
    sums_ST = torch.empty_like(peaks_ST)
    means_STD = queries.new_empty(parts, count, width, dtype=torch.float32) if want_means else None
    if count:
        with on(queries):
            partial_sums[(row_blocks * parts,)](
                queries,
                table,
                inverse,
                _float32(bias),
                _int32(names),
                _int32(excluded),
                peaks_ST,
                sums_ST,
                means_STD,
                count,
                catalogue,
                -(-item_tiles // parts),
                scale * _LOG2_E,
                D=width,
                X=0 if excluded is None else excluded.shape[1],
                BLOCK_D=use.width,
                BLOCK_T=use.held,
                BLOCK_I=use.streamed,
                PRECISION=_precision(queries),
                num_warps=use.num_warps,
                num_stages=use.num_stages,
            )
    peaks_T = peaks_ST.amax(0)
    empty_T = peaks_T == -math.inf  # a query that sees no row at all: exp2(-inf - 0) = 0, an empty sum
    base_T = peaks_T.masked_fill(empty_T, 0.0)
    shares_ST = torch.exp2(peaks_ST - base_T)
    sums_T = (sums_ST * shares_ST).sum(0)
    values_T = base_T / _LOG2_E + sums_T.log()
    # what divides the terms, all 0, of an empty sum: it moves nothing; as a loss of its target it is 0 / 0
    sums_T = sums_T.masked_fill(empty_T, 1.0 if targets is None else math.nan)
    means_TD = queries.new_empty(0, width, dtype=torch.float32)
    if means_STD is not None:
        with full_precision(queries):
            means_TD = torch.einsum("st,std->td", shares_ST, means_STD) / sums_T[:, None]
    if targets is not None:
        label_TD = table[targets].float()
        if inverse is not None:
            label_TD = label_TD * inverse[targets].abs()[:, None]
        label_T = (queries.float() * label_TD).sum(1) * scale
        if bias is not None:
            label_T = label_T + bias[targets]
        values_T = (base_T / _LOG2_E - label_T) + sums_T.log()
        if want_means:
            means_TD -= label_TD
    # backward, exp2(-inf - inf) = 0
    return values_T, peaks_T.masked_fill(empty_T, math.inf), sums_T, means_TD


def _backward(
    grad: Tensor,
    queries: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    excluded: Tensor | None,
    names: Tensor | None,
    peaks: Tensor,
    sums: Tensor,
    scale: float,
    normalize_eps: float | None,
    want_table: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """As schema.Operators has it."""
    from gr_kernels.log_partition.triton_kernel import table_gradient

    queries, table, grad = queries.contiguous(), table.contiguous(), grad.float().contiguous()
    (count, width), catalogue = queries.shape, table.shape[0]
    inverse = _inverse_norms(table, normalize_eps)
    use = tiles(width, 8 * queries.element_size(), _capability(queries.device), gradient=True)
    grad_table = torch.empty_like(table if want_table else table[:0])
    grad_bias = table.new_empty(catalogue if want_bias else 0, dtype=torch.float32)
    with on(queries):
        table_gradient[(-(-catalogue // use.held),)](
            queries,
            table,
            inverse,
            _float32(bias),
            _int32(names),
            _int32(excluded),
            _int32(targets),
            peaks,
            grad / sums,
            grad,
            grad_table if want_table else None,
            grad_bias if want_bias else None,
            count,
            catalogue,
            scale * _LOG2_E,
            scale,
            D=width,
            X=0 if excluded is None else excluded.shape[1],
            BLOCK_D=use.width,
            BLOCK_T=use.streamed,
            BLOCK_I=use.held,
            PRECISION=_precision(queries),
            num_warps=use.num_warps,
            num_stages=use.num_stages,
        )
    return grad_table, grad_bias


OPERATORS = Operators(
    "log_partition_triton",
    (field("Tensor? targets"), field("Tensor? excluded"), field("Tensor? names")),
    _forward,
    _backward,
)
register = OPERATORS.register


def _inverse_norms(table: Tensor, normalize_eps: float | None) -> Tensor | None:
    """(I,) float32: 1 / max(|e|, eps), negative where eps was the larger: there the divisor is a constant."""
    if normalize_eps is None:
        return None
    norms_I = torch.linalg.vector_norm(table, dim=1, dtype=torch.float32)
    inverse_I = norms_I.clamp_min(normalize_eps).reciprocal()
    return torch.where(norms_I < normalize_eps, -inverse_I, inverse_I)


def _precision(queries: Tensor) -> str:
    """How products of float32 are made: of three tf32 ones, or of one where PyTorch's own may be."""
    if queries.dtype != torch.float32 or interpreting():
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _capability(device: torch.device) -> int:
    """9 for sm_90."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()
