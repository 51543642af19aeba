"""The attention that encoders call: inside each sequence, wherever its rows are.

Shapes: T rows of this process, H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

from torch import Tensor

from gr.models.context import shared_attention
from gr.models.layout import JaggedLayout
from gr_kernels.hstu_attention import AttentionMask, RelativeBias, TimeBuckets, hstu_attention
from gr_kernels.hstu_attention.problem import Activation


def attention(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    layout: JaggedLayout,
    *,
    scale: float,
    activation: Activation,
    divisor: float = 1.0,
    causal: bool = True,
    position: Tensor | None = None,
    time: Tensor | None = None,
    buckets: TimeBuckets | None = None,
    dropout: float = 0.0,
    dropout_key: int = 0,
) -> Tensor:
    """(T, H, V): gr_kernels' hstu_attention over the sequences of ``layout``, whose arguments the others are."""
    if layout.memory is not None:
        assert causal and not dropout, "a history is kept of causal encoders, whose attention drops nothing"
        return layout.memory.attend(
            q_THQ,
            k_THQ,
            v_THV,
            layout,
            scale=scale,
            divisor=divisor,
            activation=activation,
            position=position,
            time=time,
            buckets=buckets,
        )
    mask = AttentionMask(causal=causal)
    if layout.cut is not None:
        return shared_attention(
            q_THQ,
            k_THQ,
            v_THV,
            layout,
            scale=scale,
            divisor=divisor,
            activation=activation,
            mask=mask,
            position=position,
            time=time,
            buckets=buckets,
            dropout=dropout,
            dropout_key=dropout_key,
        )
    return hstu_attention(
        q_THQ,
        k_THQ,
        v_THV,
        layout.offsets_B1,
        max_length=layout.max_length,
        scale=scale,
        divisor=divisor,
        activation=activation,
        mask=mask,
        bias=RelativeBias(position, time, layout.query_times_T, layout.key_times_T, buckets),  # type: ignore[arg-type]
        dropout=dropout,
        dropout_key=dropout_key,
        order=layout.start_order_B,
    )
