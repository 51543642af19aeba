"""Measures gr_kernels.jagged: what moves or marks the rows of jagged tensors, an operation a case.

B sequences, T rows in the batch, N longest sequence, D width of a row.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels import padding, shapes
from benchmarks.kernels.jagged_operations import BUCKETS, OPERATIONS, Operation, Sizes
from benchmarks.kernels.peers import compiled
from benchmarks.kernels.problem import Case, Step, Way, Work, as_it_is, in_float64
from benchmarks.kernels.shapes import JaggedSpec

NAME = "jagged"
FORMULA = (
    "bytes: every row read once and written once a pass, tables likewise, padding written (forward of to_dense, "
    "backward of to_jagged); plain PyTorch's indices are made beforehand"
)
TAIL = 4  # every sequence's last quarter is another part: candidates after a history
ROWS, OWN_NUMBERS = "rows", "dropout"


def specs(device: str, grid: str) -> list[JaggedSpec]:
    return shapes.jagged(device, grid)


def build(spec: JaggedSpec, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    length_B = shapes.draw(spec.lengths, spec.B, spec.N)
    tail_B = -(-length_B // TAIL)
    sizes = Sizes(int(length_B.sum()), int(tail_B.sum()), spec.B, spec.N, spec.D)
    operation, dtype = OPERATIONS[spec.operation], getattr(torch, spec.dtype)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    leaves = {name: normal(shape).requires_grad_() for name, shape in operation.leaves(sizes).items()}
    return Case(
        spec=spec,
        leaves=leaves,
        upstream=normal(operation.out(sizes)),
        fixed={name: x.to(device) for name, x in _rows(length_B, tail_B, spec.N).items()}
        | {"tail_rows": sizes.tails},
        work=_work(operation, sizes, dtype.itemsize),
        tokens=sizes.T,
    )


def _rows(length_B: np.ndarray, tail_B: np.ndarray, N: int) -> dict[str, Tensor]:
    """Where the rows of each sequence are, in what ours takes and in what plain PyTorch takes."""
    offsets, head_offsets, tail_offsets = (
        torch.tensor([0, *itertools.accumulate(lengths.tolist())])
        for lengths in (length_B, length_B - tail_B, tail_B)
    )
    of_sequence = [np.repeat(np.arange(len(length_B)), lengths) for lengths in (length_B - tail_B, tail_B)]
    order_T = torch.from_numpy(np.concatenate(of_sequence).argsort(kind="stable"))
    index_T = padding.index(offsets, N)
    gaps_T = 10 ** np.random.default_rng(0).uniform(0, 6, int(length_B.sum()))
    return {
        "offsets": offsets,
        "head_offsets": head_offsets,
        "tail_offsets": tail_offsets,
        "tail_lengths": torch.from_numpy(tail_B),
        "joined_order": order_T,
        "split_order": order_T.argsort(),
        "index": index_T,
        "place": index_T % N,
        "differences": torch.from_numpy(gaps_T.astype(np.int64)),
        "thresholds": BUCKETS.thresholds(),
    }


def _work(operation: Operation, sizes: Sizes, item_bytes: int) -> Work:
    """Nothing is read for padding, and its gradient is zero: a pass reads T rows and writes a whole result."""
    rows = sizes.T * sizes.D
    leaves = {name: math.prod(shape) for name, shape in operation.leaves(sizes).items()}
    read = sum(min(numbers, rows) for numbers in leaves.values())
    forward = read + math.prod(operation.out(sizes))
    backward = rows + sum(leaves.values())
    other = operation.other_bytes(sizes)
    return Work(0.0, 0.0, item_bytes * forward + other, item_bytes * backward + other)


def ways(case: Case) -> list[Way]:
    """An implementation that another operation has is named, too: a run asks for ways of all its cases."""
    operation, answer = _operation(case), _answer(case)
    every = dict.fromkeys(name for each in OPERATIONS.values() for name in each.implementations)

    def missing(name: str, case: Case) -> str:
        return (
            "" if name in operation.implementations else f"{_spec(case).operation} has no such implementation"
        )

    ours = [
        Way(name, partial(_ours, name), partial(missing, name), ours=True, answer=answer) for name in every
    ]
    note = "draws its own random numbers: no gate" if operation.own_numbers else ""
    gate = "" if operation.own_numbers else answer
    eager = Way("eager", _eager, answer=gate, note=note)
    compiled_ = Way("compiled", _compiled, answer=gate, note=note)
    return [*ours, eager, compiled_]


def _spec(case: Case) -> JaggedSpec:
    assert isinstance(case.spec, JaggedSpec)
    return case.spec


def _operation(case: Case) -> Operation:
    return OPERATIONS[_spec(case).operation]


def _answer(case: Case) -> str:
    return OWN_NUMBERS if _operation(case).own_numbers else ROWS


def _ours(implementation: str, case: Case) -> Step:
    operation = _operation(case)
    return Step(lambda: operation.ours(case, implementation), case.leaves)


def _eager(case: Case) -> Step:
    operation = _operation(case)
    return Step(lambda: operation.eager(case), case.leaves)


def _compiled(case: Case) -> Step:
    operation = _operation(case)
    return Step(compiled(lambda: operation.eager(case)), case.leaves)


def _judge(case: Case) -> Step:
    """Plain PyTorch; where it draws random numbers, gr_kernels' reference, which the tests hold to its words."""
    return _ours("reference", case) if _operation(case).own_numbers else _eager(case)


exact, plain = in_float64(_judge), as_it_is(_judge)
