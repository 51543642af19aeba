"""FE-Block: the heads of a user's layers meet an item's heads by MaxSim (IntTower, arXiv 2210.09890; Khattab and
Zaharia, arXiv 2004.12832).

A batch's user heads would be the largest tensors of a step, written to memory and read again several times.  On a CPU
those of some impressions exist at a time, in its cache, forward and backward.

Shapes: S impressions, C of a chunk, U users, V items, P pairs of a chunk, W width of a layer, E numbers of its heads, N
heads of all layers, J heads of an item, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gr_kernels.logits import full, full_precision
from gr_kernels.products import NARROW
from gr_kernels.rows import chunks
from gr_kernels.tracing import device_type

NUMBERS = 256 * 3 * 32 * 64
"""Of the user heads that exist at a time, 6 MB: those of 256 impressions with the published heads.  With fewer, the
products would be slower."""

Layer = tuple[Tensor, Tensor, Tensor]
"""x_SW, weight_EW and bias_E of a layer of a user's tower, whose heads are x W^T + b."""


def max_similarity(
    layers: Sequence[Layer], item_VJK: Tensor, meeting: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(S,) of pairs: over the heads h of all of a user's layers, the sum of max_j <u_h, v_j>; in at least float32.

    meeting: int64 (S,) each, which of the U users meets which of the V items, without gradients; without it each meets
    the one in its place, differentiable once.  The user's heads are computed in ``item_VJK``'s dtype.  Of equal
    products the first counts, as in torch's ``max``."""
    flat = [tensor.to(item_VJK.dtype) for layer in layers for tensor in layer]
    with full_precision(item_VJK):
        if meeting is not None:
            return _meet_many(item_VJK, flat, *meeting)
        if torch.is_grad_enabled():
            return _MaxSimilarity.apply(item_VJK, *flat)  # type: ignore[no-any-return]
        return _meet(item_VJK, flat, None, None)


class _MaxSimilarity(Function):
    """Its gradient is a matter of rows: a user's head gets the one item's head that it met, and that one the user's.
    So nothing is kept of users' heads but which met which, and of each of an item's heads the sum of those that met it.
    The gradient of an impression's result scales the narrow side of every product."""

    @staticmethod
    def forward(ctx: Any, item_SJK: Tensor, *flat: Tensor) -> Tensor:  # type: ignore[override]
        heads = sum(weight.shape[0] for weight in flat[1::3]) // item_SJK.shape[2]
        met_SJK = torch.empty_like(item_SJK)
        chosen_SN = torch.empty(len(item_SJK), heads, dtype=torch.int64, device=item_SJK.device)
        total_S = _meet(item_SJK, flat, chosen_SN, met_SJK)
        ctx.save_for_backward(item_SJK, met_SJK, chosen_SN, *flat)
        return total_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_S: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        item_SJK, met_SJK, chosen_SN, *flat = ctx.saved_tensors
        xs_SW, weights_EW, biases_E = flat[::3], flat[1::3], flat[2::3]
        gradient_S1 = gradient_S[:, None].to(item_SJK.dtype)
        # E is many times W, and products with E along their rows take up to a quarter less time on a CPU
        weights_WE = [weight_EW.t().contiguous() for weight_EW in weights_EW]
        d_xs_SW = [torch.empty_like(x_SW) for x_SW in xs_SW]
        d_weights_WE = [torch.zeros_like(weight_WE) for weight_WE in weights_WE]
        d_biases_E = [torch.zeros_like(bias_E) for bias_E in biases_E]
        for some in _chunks(item_SJK, chosen_SN.shape[1], len(item_SJK)):
            g_C1, place_R = gradient_S1[some], _places(chosen_SN[some], item_SJK.shape[1])
            met_RK = item_SJK[some].flatten(0, 1).index_select(0, place_R)
            met_CE = met_RK.view(len(g_C1), chosen_SN.shape[1] * item_SJK.shape[2])
            of_layers = met_CE.split([weight_EW.shape[0] for weight_EW in weights_EW], dim=1)
            for layer, met_CE in enumerate(of_layers):
                torch.mm(met_CE, weights_WE[layer].t(), out=d_xs_SW[layer][some]).mul_(g_C1)
                scaled_CW, d_WE, d_E = xs_SW[layer][some] * g_C1, d_weights_WE[layer], d_biases_E[layer]
                torch.addmm(d_WE, scaled_CW.t(), met_CE, out=d_WE)
                torch.addmv(d_E, met_CE.t(), g_C1[:, 0], out=d_E)
        d_weights_EW = [d_WE.t().contiguous() for d_WE in d_weights_WE]
        found = [d for of_layer in zip(d_xs_SW, d_weights_EW, d_biases_E, strict=True) for d in of_layer]
        return met_SJK * gradient_S1[:, :, None], *found


def _meet(
    item_SJK: Tensor, flat: Sequence[Tensor], chosen_SN: Tensor | None, met_SJK: Tensor | None
) -> Tensor:
    """(S,) the sums; where asked for, into ``chosen_SN`` which of the item's heads each head met, and into ``met_SJK``
    the sum of the heads that met each of the item's."""
    heads = sum(weight.shape[0] for weight in flat[1::3]) // item_SJK.shape[2]
    total_S = full(item_SJK.new_empty(len(item_SJK)))
    for some in _chunks(item_SJK, heads, len(item_SJK)):
        item_CJK, user_CNK = item_SJK[some], _heads(flat, some, item_SJK.shape[2])
        best_CN, chosen_CN = torch.bmm(user_CNK, item_CJK.transpose(1, 2)).max(2)
        torch.sum(best_CN, 1, dtype=total_S.dtype, out=total_S[some])
        if chosen_SN is not None and met_SJK is not None:
            chosen_SN[some] = chosen_CN
            place_R = _places(chosen_CN, item_SJK.shape[1])
            # the heads' rows, added up by place
            met_RK = torch.ops.aten.embedding_dense_backward(
                user_CNK.flatten(0, 1), place_R, item_CJK.shape[0] * item_CJK.shape[1], -1, False
            )
            met_SJK[some] = met_RK.view_as(item_CJK)
    return total_S


def _meet_many(item_VJK: Tensor, flat: Sequence[Tensor], user_S: Tensor, item_S: Tensor) -> Tensor:
    """(S,) the sums of pairs of which is said who meets whom: a user's heads are found once for all that it meets."""
    heads = sum(weight.shape[0] for weight in flat[1::3]) // item_VJK.shape[2]
    total_S = full(item_VJK.new_empty(len(user_S)))
    sorted_S, order_S = user_S.sort()
    for some in _chunks(item_VJK, heads, len(flat[0])):
        user_CNK = _heads(flat, some, item_VJK.shape[2])
        first, last = torch.searchsorted(sorted_S, sorted_S.new_tensor([some.start, some.stop])).tolist()
        for part in _chunks(item_VJK, heads, last - first):
            pairs_P = order_S[first:last][part]
            user_PNK = user_CNK.index_select(0, user_S[pairs_P] - some.start)
            item_PJK = item_VJK.index_select(0, item_S[pairs_P])
            best_PN = torch.bmm(user_PNK, item_PJK.transpose(1, 2)).amax(2)
            total_S[pairs_P] = best_PN.sum(1, dtype=total_S.dtype)
    return total_S


def _heads(flat: Sequence[Tensor], some: slice, width: int) -> Tensor:
    """(C, N, K) the heads of some users, their layers' one after another."""
    user_CE = flat[0].new_empty(len(flat[0][some]), sum(weight.shape[0] for weight in flat[1::3]))
    of_layers = user_CE.split([weight.shape[0] for weight in flat[1::3]], dim=1)
    for x_UW, weight_EW, bias_E, out_CE in zip(flat[::3], flat[1::3], flat[2::3], of_layers, strict=True):
        torch.addmm(bias_E, x_UW[some], weight_EW.t(), out=out_CE)
    return user_CE.unflatten(1, (-1, width))


def _places(chosen_CN: Tensor, heads: int) -> Tensor:
    """(C N,) int64: the chosen ones' places among all item heads of a chunk, J = ``heads`` an item."""
    first_C1 = torch.arange(len(chosen_CN), device=chosen_CN.device)[:, None] * heads
    return (chosen_CN + first_C1).flatten()


def _chunks(item_SJK: Tensor, heads: int, count: int) -> list[slice]:
    """Of ``count`` users: all at once on GPUs, and where sums over chunks would be rounded to 16 bits."""
    if device_type(item_SJK.device) != "cpu" or item_SJK.dtype in NARROW:
        return [slice(0, count)]
    return chunks(count, heads * item_SJK.shape[2], NUMBERS)
