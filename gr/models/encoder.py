"""What every sequence encoder is, and the softmax attention that several share.

Shapes: T actions in the batch, D model width, H heads, Q query/key width per head, V value width per head.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gr.errors import UserError
from gr.models.attention import attention
from gr.models.layout import JaggedLayout
from gr.models.tasks import Task


class Encoder(Protocol):
    """(T, D) vectors of jagged sequences -> (T, D).  No row depends on another sequence's rows.

    ``uses_times``: whether the layout must carry times.  ``causal``: whether a row's output depends on that row and
    earlier ones alone.  ``cuttable``: whether processes may share a sequence's rows (gr/models/cut.py): rows meet in
    attention alone.  One whose ``reads_items`` is False sees what else is known of actions and users alone.
    """

    uses_times: bool
    causal: bool
    cuttable: bool

    def __call__(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor: ...


def check_causal(
    task: Task, encoder: Encoder, encoder_name: str, instead: str = ", or model.task=cloze"
) -> None:
    """Refuse an encoder that would see what it has to predict: the loss would fall to zero and nothing be learnt.
    ``instead``: what else could be done."""
    if task.needs_causal and not encoder.causal:
        raise UserError(
            f"model.task {task.config.name} predicts each action from those before it, and model.encoder "
            f"{encoder_name} sees those behind it too (causal is false): set model.encoder.causal=true{instead}"
        )


def softmax_attention(
    q_THQ: Tensor,
    k_THQ: Tensor,
    v_THV: Tensor,
    layout: JaggedLayout,
    *,
    causal: bool,
    dropout: float,
    dropout_key: int,
) -> Tensor:
    """Scaled dot-product attention inside each sequence, (T, H, V): softmax(q . k / sqrt(Q)) v."""
    return attention(
        q_THQ,
        k_THQ,
        v_THV,
        layout,
        scale=q_THQ.shape[-1] ** -0.5,
        activation="softmax",
        causal=causal,
        dropout=dropout,
        dropout_key=dropout_key,
    )


def head_width(dim: int, heads: int, what: str) -> int:
    """dim / heads, or a UserError when it does not divide."""
    if dim % heads:
        raise UserError(
            f"model.dim={dim} cannot be shared by {heads} heads of {what}: choose model.encoder.heads "
            "that divides it"
        )
    return dim // heads
