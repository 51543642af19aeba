"""InfoNCE of likes against the items of a global batch (IntTower's CIR), the scores of some likes at a time.

Shapes: N likes, G impressions of all processes, W width of the tops, C likes of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gr_kernels.logits import full_precision
from gr_kernels.rows import chunks
from gr_kernels.tracing import device_type

SCORES = {"cpu": 1 << 19}
"""That exist at a time, by the type of device: on a CPU 2 MB, which stay in its cache while scores become shares
and gradients; elsewhere 2^24."""

Same = Sequence[tuple[Tensor, Tensor]]
"""Pairs of integers of the likes (N,) and of the impressions (G,): a like doesn't see an impression where two are
equal."""


def contrast(user_NW: Tensor, item_GW: Tensor, own_N: Tensor, same: Same, temperature: float) -> Tensor:
    """The sum over likes of -log(exp(s_own) / (exp(s_own) + sum of exp(s) over the impressions that the like sees)),
    s = <u, v> / temperature, in the inputs' dtype.  Differentiable once.

    own_N: int64, which impression a like is; its score counts once, seen or not."""
    with full_precision(user_NW):
        return _Contrast.apply(user_NW, item_GW, own_N, same, temperature)  # type: ignore[no-any-return]


class _Contrast(Function):
    """Its gradients are formed with the sum: what comes from above scales them all."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, user_NW: Tensor, item_GW: Tensor, own_N: Tensor, same: Same, temperature: float
    ) -> Tensor:
        loss, d_user_NW, d_item_GW = (
            user_NW.new_zeros(()),
            torch.empty_like(user_NW),
            torch.zeros_like(item_GW),
        )
        most = SCORES.get(device_type(user_NW.device), 1 << 24)
        for some in chunks(len(user_NW), len(item_GW), most):
            scaled_CW, own_C1 = user_NW[some] / temperature, own_N[some, None]
            scores_CG = scaled_CW @ item_GW.t()
            score_C1 = scores_CG.gather(1, own_C1)
            for of_likes_N, of_impressions_G in same:
                scores_CG.masked_fill_(of_likes_N[some, None] == of_impressions_G, -torch.inf)
            scores_CG.scatter_(1, own_C1, score_C1)
            largest_C1 = scores_CG.amax(1, keepdim=True)
            # shares are of the sum, not exp(score - its logarithm), whose rounding would be in each of them
            sum_C1 = scores_CG.sub_(largest_C1).exp_().sum(1, keepdim=True)
            loss += (largest_C1 - score_C1 + sum_C1.log()).sum()
            gradient_CG = scores_CG.div_(sum_C1)
            gradient_CG.scatter_add_(1, own_C1, torch.full_like(score_C1, -1.0))
            torch.mm(gradient_CG, item_GW, out=d_user_NW[some])
            torch.addmm(d_item_GW, gradient_CG.t(), scaled_CW, out=d_item_GW)
        ctx.save_for_backward(d_user_NW.div_(temperature), d_item_GW)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_user_NW, d_item_GW = ctx.saved_tensors
        return gradient * d_user_NW, gradient * d_item_GW, None, None, None
