"""The area under the ROC curve, exactly: pairs are counted, as integers, over any number of processes.

A number's place among float32 numbers is an integer (:func:`ordered`); with a group in front of it one sorted list
answers for all groups at once.  Negatives go round the processes, one process's at a time.

Shapes: P positives and N negatives of this process, G groups, E entries, U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gr.processes import Axis

BITS = 32
UNIT_BITS, HALF_BITS = 52, 26
"""Areas are added up in units of 2**-52, in two halves, so that no sum overflows, or hangs on its order."""


def ordered(logits: Tensor) -> Tensor:
    """int64 in [0, 2**32): integers that stand in the order of the float32 ``logits``; both zeros are one."""
    bits = (logits.float() + 0.0).view(torch.int32).long() & (2**BITS - 1)
    return torch.where(bits < 2 ** (BITS - 1), bits + 2 ** (BITS - 1), 2**BITS - 1 - bits)


def wins(positives_P: Tensor, negatives_N: Tensor, groups: int, axis: Axis) -> Tensor:
    """(G,) int64: twice the pairs of a positive and a negative of one group in which the positive is the higher, pairs
    of equal ones counted once; over all processes of ``axis``, which call this together.

    Both int64: group * 2**32 + ordered logit.  A process holds another one's negatives beside its own."""
    total_G = torch.zeros(groups, dtype=torch.int64)
    sorted_N = negatives_N.sort().values
    group_P = positives_P >> BITS
    for shift in range(axis.size):
        theirs = sorted_N
        if shift:
            to = (axis.rank + shift) % axis.size
            counts = [len(sorted_N) if rank == to else 0 for rank in range(axis.size)]
            theirs, _ = axis.exchange(sorted_N, counts)
        first_P = torch.searchsorted(theirs, group_P << BITS)
        below_P = torch.searchsorted(theirs, positives_P)
        upto_P = torch.searchsorted(theirs, positives_P, right=True)
        total_G.index_add_(0, group_P, below_P + upto_P - 2 * first_P)
    return axis.add_up(total_G)


@dataclass(frozen=True)
class ByUser:
    """Areas of single users.  area, weighted: means over the users that have both labels, each as one, and by the
    number of its labels; None without such.  users: those; one_class: users whose labels are all the same."""

    area: float | None
    weighted: float | None
    users: int
    one_class: int


def by_user(users_E: Tensor, keys_E: Tensor, labels_E: Tensor, axis: Axis) -> ByUser:
    """GAUC (Zhou et al., arXiv 1706.06978, equation 11) of known labels: all of a user's are one process's.

    users_E: int64; keys_E: ordered logits; labels_E: bool."""
    order = torch.argsort(keys_E, stable=True)
    order = order[torch.argsort(users_E[order], stable=True)]
    users, keys, labels = users_E[order], keys_E[order], labels_E[order]
    _, own_E, size_U = torch.unique_consecutive(users, return_inverse=True, return_counts=True)
    start_U = size_U.cumsum(0) - size_U
    # twice the mean rank of equal logits in their user's list
    change_E = torch.ones(len(users), dtype=torch.bool)
    change_E[1:] = (own_E.diff() != 0) | (keys.diff() != 0)
    tie_E = change_E.long().cumsum(0) - 1
    tied_C = torch.bincount(tie_E)
    first_C = tied_C.cumsum(0) - tied_C
    rank2_E = 2 * (first_C[tie_E] - start_U[own_E]) + tied_C[tie_E] + 1
    zero_U = torch.zeros_like(size_U)
    positives_U = zero_U.index_add(0, own_E, labels.long())
    ranks2_U = zero_U.index_add(0, own_E, rank2_E * labels)
    mixed_U = (positives_U > 0) & (positives_U < size_U)
    p, n, s = positives_U[mixed_U], (size_U - positives_U)[mixed_U], ranks2_U[mixed_U]
    area = (s - p * (p + 1)).double() / (2 * p * n).double()
    fixed = (area * 2.0**UNIT_BITS).round().long()
    high, low = fixed >> HALF_BITS, fixed & (2**HALF_BITS - 1)
    weight = p + n
    sums = torch.stack(
        [
            *(part.sum() for part in (high, low, weight * high, weight * low, weight)),
            torch.tensor(len(p)),
            torch.tensor(len(size_U) - len(p)),
        ]
    )
    high_1, low_1, high_w, low_w, weights, mixed, alike = axis.add_up(sums).tolist()
    if not mixed:
        return ByUser(None, None, 0, alike)
    unit = 2**UNIT_BITS
    return ByUser(
        ((high_1 << HALF_BITS) + low_1) / (unit * mixed),
        ((high_w << HALF_BITS) + low_w) / (unit * weights),
        mixed,
        alike,
    )


def joined(parts: list[Tensor]) -> Tensor:
    """The parts in one, an empty int64 tensor of none."""
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
