"""The attention operator: checks a call, picks an implementation, runs it.

B sequences, T query and S key rows in the batch, H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gr_kernels.dispatch import Implementation, choose, takes_all
from gr_kernels.hstu_attention import blocked, cpp, reference, triton_op
from gr_kernels.hstu_attention.checks import check
from gr_kernels.hstu_attention.problem import (
    Activation,
    AttentionMask,
    Problem,
    RelativeBias,
)

# In order of preference; "auto" takes the first without an obstacle. A new kernel is one line here.
IMPLEMENTATIONS = (
    Implementation(
        "triton",
        triton_op.obstacle,
        triton_op.attention,
        "tiles on the GPU's tensor cores",
        device="cuda",
        register=triton_op.attention.register,
    ),
    Implementation(
        "cpp", cpp.obstacle, cpp.attention, "compiled, float32 on CPU", device="cpu", register=cpp.register
    ),
    Implementation(
        "blocked",
        takes_all,
        blocked.attention,
        "plain PyTorch in blocks, any device and precision",
        register=blocked.attention.register,
    ),
    Implementation(
        "reference",
        takes_all,
        reference.attention,
        "the definition, every score stored",
    ),
)


_NO_BIAS = RelativeBias()


def hstu_attention(
    q_THQ: Tensor,
    k_SHQ: Tensor,
    v_SHV: Tensor,
    offsets_B1: Tensor,
    *,
    max_length: int,
    scale: float = 1.0,
    divisor: float,
    activation: Activation = "silu",
    mask: AttentionMask = AttentionMask(),
    bias: RelativeBias | None = None,
    dropout: float = 0.0,
    dropout_key: int = 0,
    query_offsets: Tensor | None = None,
    order: Tensor | None = None,
    deterministic: bool | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention of every row over the keys of its own sequence, for sequences stored end to end.

    For head h, row i and key j of one sequence, s_ij = scale q_i · k_j + bias_ij, and
        silu:    A_ij = SiLU(s_ij) / divisor  (pointwise; HSTU, Zhai et al., ICML 2024, eq. 2)
        softmax: A_ij = exp(s_ij) / sum_j exp(s_ij)
    over the keys the mask allows; the output is sum_j A_ij v_j.

    Args:
        q_THQ: queries, floating, any row and head stride (slices of one projection aren't copied).
        k_SHQ, v_SHV: keys and values, likewise; V may differ from Q. Without query_offsets they belong to the
            queries' rows (S = T).
        offsets_B1: (B + 1,) int64, ascending: sequence b is rows offsets[b] to offsets[b + 1]. Rows outside every
            sequence are not read, and their outputs and gradients are zero.
        max_length: no sequence is longer than this.
        scale: multiplies q · k.
        divisor: divides SiLU's weights (HSTU: the longest length of the model); ignored by softmax.
        activation: "silu" or "softmax".
        mask: which keys a row sees.
        bias: relative position and time bias; its tables get gradients.
        dropout: probability with which a weight A_ij is zeroed (the others are divided by 1 - dropout), as a pure
            function of (dropout_key, row of the batch, head, j): pass another key at every step and layer.
        dropout_key: 64-bit.
        query_offsets: (B + 1,) int64: the cross form, for incremental inference. Rows query_offsets[b] to
            query_offsets[b + 1] of q (and of bias.query_times) are the last rows of sequence b, whose keys and values
            are all there; the result is what these rows get when the whole sequence is computed.
        order: (B,) int64: sequences in the order in which their work should start, e.g. longest first; any permutation
            gives the same results (the bias tables' gradients are summed in this order, so their last bits may
            differ). None: computed when needed, in every call; a model of many layers does better to pass it.
        deterministic: equal calls give equal bits, gradients included. None: as
            torch.are_deterministic_algorithms_enabled() says.
        implementation: "auto", or the name of one ("triton", "cpp", "blocked", "reference").

    Returns:
        (T, H, V) in q's dtype, contiguous. Nothing of the size of the scores is kept for the backward pass.

    Raises:
        ValueError: one sentence saying which argument is wrong, or why the asked-for implementation can't run.
    """
    bias = bias or _NO_BIAS
    if bias.time is None:  # times that nobody looks at
        bias = RelativeBias(bias.position, buckets=bias.buckets)
    problem = Problem(
        offsets=offsets_B1,
        max_length=max_length,
        divisor=divisor,
        scale=scale,
        activation=activation,
        mask=mask,
        bias=bias,
        dropout=dropout,
        dropout_key=dropout_key,
        query_offsets=query_offsets,
        order=order,
        deterministic=torch.are_deterministic_algorithms_enabled()
        if deterministic is None
        else deterministic,
    )
    arguments = (q_THQ, k_SHQ, v_SHV, problem)
    check(*arguments)
    choice = choose("hstu_attention", IMPLEMENTATIONS, q_THQ.device, arguments, implementation)
    return choice.implementation.run(*arguments)  # type: ignore[no-any-return]
