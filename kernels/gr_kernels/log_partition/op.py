"""Sums over the whole catalogue, a part of the T x I logits at a time: log-partition function and cross-entropy.

Shapes: T queries, I catalogue size, D width, X excluded items of a query. Logits and sums are float32 (float64 for
float64 inputs), whatever the inputs' precision.
"""

from __future__ import annotations

from torch import Tensor

from gr_kernels.dispatch import Implementation, choose, takes_all
from gr_kernels.log_partition import chunked, cpp, reference, triton_op
from gr_kernels.log_partition.problem import Problem, check

MAX_SCORES = 1 << 24

# In order of preference. Each is a module of log_partition and cross_entropy.
# Chunks of GEMMs write and read each float32 logit ten times or so: 45 bytes, 10 ps of an H200's memory, against
# 0.5 ps of tensor cores for its three products at D = 64 in bf16 (1 ps at 128). Within 1.3 times the products' time
# logits can't leave the processor, so on CUDA the kernels that keep them there come first.
IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        cpp.obstacle,
        cpp,
        "float32 on cpu: logits, softmax and gradients in one pass of the C++ operator",
        device="cpu",
    ),
    Implementation(
        "triton",
        triton_op.obstacle,
        triton_op,
        "logits stay on the chip; deterministic",
        device="cuda",
        register=triton_op.register,
    ),
    Implementation("chunked", takes_all, chunked, "GEMMs over chunks of queries, any device and precision"),
    Implementation("reference", takes_all, reference, "the definition: all T x I logits at once"),
)


def log_partition(
    queries_TD: Tensor,
    table_ID: Tensor,
    *,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
    excluded_TX: Tensor | None = None,
    names_I: Tensor | None = None,
    max_scores: int = MAX_SCORES,
    implementation: str = "auto",
) -> Tensor:
    """log sum_i exp(scale * q_t . e_i + bias_i), the sum over the items that query t sees: all but its excluded ones.

    queries_TD: (T, D); table_ID: (I, D), of the same float dtype; scale: 1 / temperature; normalize_eps: divide
    each e_i by max(|e_i|, eps); bias_I: (I,) added to the logits: a learned bias, -log q_i where the table is a
    sample (logQ correction), -inf to leave an item out for everybody. excluded_TX: (T, X) integers, items that one
    query doesn't see, -1 for none, repeated ones count once; where all are excluded (or have a bias of -inf) the
    sum is empty: -inf, which moves nothing. names_I: (I,) integers below 2^31, what excluded_TX calls the table's
    rows (default: 0 to I - 1), for tables that hold an item several times. Differentiable once in queries, table
    and bias. implementation: 'auto', 'cpp' (float32 on CPU, nothing excluded), 'triton', 'chunked', 'reference';
    gr_kernels.explain tells what 'auto' takes. max_scores: the most logits 'chunked' holds at once (the others'
    tiles are their own, see README.md).

    'cpp' and 'chunked': one GEMM of T x I x D forward. Backward forms the logits again (3 more GEMMs), because the
    upstream gradient weighs the rows of the table's gradient; where the table and bias need none, the queries'
    gradient is formed in the forward pass (one more GEMM, none backward). For a loss whose weights are known
    beforehand ``cross_entropy`` does with 3 in all. 'triton': 2 forward where queries need a gradient (else 1), 2
    backward, for both functions.

    Returns (T,) float32 (float64 for float64 inputs). Raises ValueError or TypeError for inputs that don't fit,
    IndexError (on CPU) for the first excluded item that isn't in the table.
    """
    problem = Problem(
        queries=queries_TD,
        table=table_ID,
        scale=scale,
        normalize_eps=normalize_eps,
        bias=bias_I,
        excluded=excluded_TX,
        names=names_I,
        max_scores=max_scores,
    )
    check(problem)
    problem = problem.heeding_no_grad()
    choice = choose("log_partition", IMPLEMENTATIONS, queries_TD.device, (problem,), implementation)
    return choice.implementation.run.log_partition(problem)  # type: ignore[no-any-return]


def cross_entropy(
    queries_TD: Tensor,
    table_ID: Tensor,
    targets_T: Tensor,
    *,
    weights_T: Tensor | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
    excluded_TX: Tensor | None = None,
    names_I: Tensor | None = None,
    max_scores: int = MAX_SCORES,
    implementation: str = "auto",
) -> Tensor:
    """sum_t w_t (log sum_i exp(logit_ti) - logit_t,target), logit = scale * q . e + bias.

    targets_T: (T,) int64 or int32 rows of the table; weights_T: (T,) constants (1 where None), not differentiated. The
    rest as in ``log_partition``; a target is always seen, also where excluded_TX holds it. The weights being known,
    'cpp' and 'chunked' form gradients in the forward pass (3 GEMMs in all) and multiply them by the scalar upstream
    gradient in the backward pass.

    Returns a float32 scalar (float64 for float64 inputs). Raises IndexError (on CPU) for the first target outside
    the table, and what ``log_partition`` raises.
    """
    problem = Problem(
        queries=queries_TD,
        table=table_ID,
        scale=scale,
        normalize_eps=normalize_eps,
        bias=bias_I,
        excluded=excluded_TX,
        names=names_I,
        max_scores=max_scores,
        targets=targets_T,
        weights=None if weights_T is None else weights_T.detach(),
    )
    check(problem)
    problem = problem.heeding_no_grad().keeping_targets()
    choice = choose("cross_entropy", IMPLEMENTATIONS, queries_TD.device, (problem,), implementation)
    return choice.implementation.run.cross_entropy(problem)  # type: ignore[no-any-return]
