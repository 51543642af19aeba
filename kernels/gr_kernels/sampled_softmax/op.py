"""The loss of a target among itself and sampled negatives: one function, several ways of computing it.

Shapes: T queries, K negatives, I table rows, D width.
"""

from __future__ import annotations

from torch import Tensor

from gr_kernels.dispatch import Implementation, choose, takes_all
from gr_kernels.sampled_softmax import reference, scores, triton_op
from gr_kernels.sampled_softmax.problem import Problem, check
from gr_kernels.tracing import device_type

MAX_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}  # on a CPU few enough to stay in its caches

# In order of preference.
IMPLEMENTATIONS = (
    Implementation(
        "triton",
        triton_op.obstacle,
        triton_op.sampled_softmax,
        "stores no T x K scores; deterministic",
        device="cuda",
        register=triton_op.register,
    ),
    Implementation(
        "scores",
        takes_all,
        scores.sampled_softmax,
        "gr_kernels.candidate_scores or one GEMM, then the cross-entropy of the first",
    ),
    Implementation(
        "reference", takes_all, reference.sampled_softmax, "the definition, every gathered row stored"
    ),
)


def sampled_softmax(
    queries_TD: Tensor,
    table_ID: Tensor,
    targets_T: Tensor,
    negatives: Tensor,
    *,
    weights_T: Tensor | None = None,
    counts_K: Tensor | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    bias_I: Tensor | None = None,
    max_scores: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """sum_t w_t (log(exp z_ty + sum_{k: r_tk != y} exp z_tk) - z_ty), z_ti = scale * q_t . e_i + bias_i, y = target t.

    queries_TD: (T, D); table_ID: (I, D), of the same float dtype; targets_T: (T,) int64 or int32 rows. negatives:
    (T, K) rows drawn for each query, or (K,) that all share; one that is the query's target counts nothing, one drawn
    twice counts twice. counts_K: (K,) constants, how often each shared negative counts (1 where None; 0: not at all),
    for rows listed once. weights_T: (T,) constants (1 where None). scale: 1 / temperature; normalize_eps: divide
    each e_i by max(|e_i|, eps). bias_I: (I,) added to an item's logits, the target's too: a learned bias, -log q_i
    where q_i is the chance of drawing item i (logQ correction; Bengio and Senecal 2008), or their sum. Differentiable
    once in queries, table (a dense gradient) and bias; what 'triton' computes is deterministic.

    The in-batch softmax, debiased (Yi et al., RecSys 2019), is this with the batch's targets as shared negatives, or
    all items with their counts, and bias_I = -log p_I: see README.md.

    implementation: 'auto', 'triton', 'scores', 'reference'; gr_kernels.explain tells what 'auto' takes. max_scores:
    the most scores 'scores' forms at once with shared negatives (default: 2^21 on CPU, 2^26 on CUDA), a chunk of
    queries after the other.

    Returns a float32 scalar (float64 for float64 inputs). Raises IndexError (on CPU) for the first row outside the
    table, ValueError or TypeError for inputs that don't fit.
    """
    problem = Problem(
        queries=queries_TD,
        table=table_ID,
        targets=targets_T,
        negatives=negatives,
        weights=None if weights_T is None else weights_T.detach(),
        scale=scale,
        normalize_eps=normalize_eps,
        bias=bias_I,
        counts=None if counts_K is None else counts_K.detach(),
        max_scores=MAX_SCORES.get(device_type(queries_TD.device), 1 << 24)
        if max_scores is None
        else max_scores,
    )
    check(problem)
    problem = problem.heeding_no_grad()
    choice = choose("sampled_softmax", IMPLEMENTATIONS, queries_TD.device, (problem,), implementation)
    return choice.implementation.run(problem)  # type: ignore[no-any-return]
