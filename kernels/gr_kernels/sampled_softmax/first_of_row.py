"""Cross-entropy of the first candidate of each row, in few passes over the scores.

Shapes: T queries, K other candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_HIDDEN = -1e30  # added to the score of a candidate that must not count: its share is exactly zero


def cross_entropy_of_first(
    logits: Tensor, rows: Tensor, targets_T1: Tensor, weights_T: Tensor | None = None
) -> Tensor:
    """Sum over t of ``w_t (log(exp l_t0 + sum_{k > 0, row_tk != target_t} exp l_tk) - l_t0)``: a scalar.

    logits: (T, 1 + K), the target's score first.  rows: (T, 1 + K), the item rows that the scores are of; column 0 is
    not read.  targets_T1: of the dtype of ``rows``.
    The gradient of the logits is formed in the forward pass.  Differentiable once.
    """
    return _CrossEntropyOfFirst.apply(logits, rows, targets_T1, weights_T)


class _CrossEntropyOfFirst(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, targets_T1: Tensor, weights_T: Tensor | None
    ) -> Tensor:
        # comparing into floats and adding is several times faster on the CPU than filling through a boolean mask
        hidden = torch.empty_like(logits)
        torch.eq(rows, targets_T1, out=hidden)
        hidden[:, 0] = 0.0
        log_shares = torch.add(logits, hidden, alpha=_HIDDEN, out=hidden).log_softmax(dim=1)
        losses = -log_shares[:, 0]
        loss = losses.sum() if weights_T is None else (losses * weights_T).sum()
        if ctx.needs_input_grad[0]:
            grad = log_shares.exp_()
            grad[:, 0] -= 1.0
            ctx.save_for_backward(grad if weights_T is None else grad.mul_(weights_T[:, None]))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None
