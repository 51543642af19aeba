"""The operations of gr_kernels.jagged as benchmarks call them, and as plain PyTorch computes them.

What plain PyTorch needs to find its rows (an index) is made with the case and not timed; ours finds them anew.

B sequences, T rows in the batch, N longest sequence, D width of a row, E entries of the table of times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels import library, padding
from benchmarks.kernels.problem import Case, Output
from benchmarks.kernels.shapes import JaggedSpec
from gr_kernels.hstu_attention import TimeBuckets
from gr_kernels.jagged import (
    add_positions_and_times,
    concat_jagged,
    dense_to_jagged,
    jagged_dropout,
    jagged_to_dense,
    split_jagged,
)
from gr_kernels.jagged.concat_split import op as concat_split
from gr_kernels.jagged.dense import op as dense
from gr_kernels.jagged.dropout import op as dropout
from gr_kernels.jagged.positions_and_times import op as positions_and_times

BUCKETS = TimeBuckets("log", 129, 0.301)
PROBABILITY, KEY = 0.2, 0x1234_5678_9ABC_DEF0


@dataclass(frozen=True)
class Operation:
    """leaves: the shapes of what gets gradients, of a case's T, its rows that are tails, B, N and D.
    out: the shape of the result.  ours: by the name of an implementation.
    other_bytes: besides rows read and written.  own_numbers: plain PyTorch draws other random numbers than ours."""

    implementations: tuple[str, ...]
    leaves: Callable[[Sizes], dict[str, tuple[int, ...]]]
    out: Callable[[Sizes], tuple[int, ...]]
    ours: Callable[[Case, str], Output]
    eager: Callable[[Case], Output]
    other_bytes: Callable[[Sizes], float] = lambda sizes: 0.0
    own_numbers: bool = False


@dataclass(frozen=True)
class Sizes:
    """T: rows; tails: those of them that are the last of their sequences, as candidates are."""

    T: int
    tails: int
    B: int
    N: int
    D: int


def _names(implementations: Iterable[object]) -> tuple[str, ...]:
    return tuple(library.names(implementations, without=()))


def _one(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {"x": (sizes.T, sizes.D)}


def _rows(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.T, sizes.D)


def _padded(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.B, sizes.N, sizes.D)


def _spec(case: Case) -> JaggedSpec:
    assert isinstance(case.spec, JaggedSpec)
    return case.spec


def _concat(case: Case, name: str) -> Tensor:
    parts, offsets = list(case.leaves.values()), [case.fixed["head_offsets"], case.fixed["tail_offsets"]]
    return concat_jagged(parts, offsets, implementation=name)[0]


def _concat_eager(case: Case) -> Tensor:
    return torch.cat(list(case.leaves.values())).index_select(0, case.fixed["joined_order"])


def _split(case: Case, name: str) -> Output:
    fixed, tails = case.fixed, case.fixed["tail_rows"]
    cut = split_jagged(
        case.leaves["x"], fixed["offsets"], fixed["tail_lengths"], tail_rows=tails, implementation=name
    )
    return cut[0], cut[2]


def _split_eager(case: Case) -> Output:
    x, tails = case.leaves["x"], case.fixed["tail_rows"]
    return x.index_select(0, case.fixed["split_order"]).split([len(x) - tails, tails])


def _to_dense(case: Case, name: str) -> Tensor:
    offsets, N = case.fixed["offsets"], _spec(case).N
    return jagged_to_dense(case.leaves["x"], offsets, max_length=N, implementation=name)


def _to_dense_eager(case: Case) -> Tensor:
    return padding.pad(case.leaves["x"], case.fixed["index"], _spec(case).B, _spec(case).N)


def _to_jagged(case: Case, name: str) -> Tensor:
    return dense_to_jagged(case.leaves["dense"], case.fixed["offsets"], rows=case.tokens, implementation=name)


def _to_jagged_eager(case: Case) -> Tensor:
    return padding.unpad(case.leaves["dense"], case.fixed["index"])


def _add(case: Case, name: str) -> Tensor:
    leaves, fixed = case.leaves, case.fixed
    return add_positions_and_times(
        leaves["x"],
        fixed["offsets"],
        max_length=_spec(case).N,
        scale=_spec(case).D ** 0.5,
        position_PD=leaves["position"],
        time_ED=leaves["time"],
        time_differences_T=fixed["differences"],
        buckets=BUCKETS,
        implementation=name,
    )


def _add_eager(case: Case) -> Tensor:
    leaves, fixed = case.leaves, case.fixed
    bucket_T = torch.bucketize(fixed["differences"].abs(), fixed["thresholds"], right=True)
    scaled_TD = leaves["x"] * _spec(case).D ** 0.5
    return scaled_TD + F.embedding(fixed["place"], leaves["position"]) + F.embedding(bucket_T, leaves["time"])


def _dropout(case: Case, name: str) -> Tensor:
    return jagged_dropout(case.leaves["x"], PROBABILITY, key=KEY, implementation=name)


def _dropout_eager(case: Case) -> Tensor:
    return F.dropout(case.leaves["x"], PROBABILITY)


OPERATIONS = {
    "concat": Operation(
        _names(concat_split.IMPLEMENTATIONS),
        lambda s: {"head": (s.T - s.tails, s.D), "tail": (s.tails, s.D)},
        _rows,
        _concat,
        _concat_eager,
    ),
    "split": Operation(_names(concat_split.IMPLEMENTATIONS), _one, _rows, _split, _split_eager),
    "to_dense": Operation(_names(dense.TO_DENSE), _one, _padded, _to_dense, _to_dense_eager),
    "to_jagged": Operation(
        _names(dense.TO_JAGGED), lambda s: {"dense": _padded(s)}, _rows, _to_jagged, _to_jagged_eager
    ),
    "positions_and_times": Operation(
        _names(positions_and_times.IMPLEMENTATIONS),
        lambda s: {"x": (s.T, s.D), "position": (s.N, s.D), "time": (BUCKETS.count, s.D)},
        _rows,
        _add,
        _add_eager,
        lambda s: 8.0 * s.T,
    ),
    "dropout": Operation(
        _names(dropout.IMPLEMENTATIONS), _one, _rows, _dropout, _dropout_eager, own_numbers=True
    ),
}
