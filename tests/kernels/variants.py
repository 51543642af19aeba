"""Which of the operators' Triton kernels would be compiled again in mid-training, because a batch has another size.

Triton compiles a variant of a kernel for each combination of its arguments' types, of integers that are 1 or multiples
of 16, of pointers' alignments and of constexprs.  The operators run here on batches of many sizes, on CPU tensors, and
every launch is replaced by the lookup of its variant: no GPU is needed, and results mean nothing.

Prints JSON: {"launched": kernels, "compiled again": {operation: {kernel: arguments}}}.  test_variants.py runs it.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from gr_kernels.triton_common import available

available.why_unavailable = lambda device: ""  # before the operators are imported

import gr_kernels  # noqa: E402

Variant = dict[str, str]
I, D, K = 300, 64, 20
# (lengths of the sequences): one action, odd numbers, multiples of 16
BATCHES = [
    [5, 0, 12, 3, 9],
    [1],
    [16],
    [7] * 16,
    [2, 30],
    [1] * 160,
    [64, 64],
    [33, 1, 0],
]
TRITON: dict[str, Any] = {"implementation": "triton"}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def targets(tokens: int) -> Tensor:
    return torch.arange(tokens) % I


def cross_entropy(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    return gr_kernels.cross_entropy(
        numbers(tokens, D), numbers(I, D), targets(tokens), bias_I=numbers(I), **TRITON
    )


def log_partition(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    return gr_kernels.log_partition(numbers(tokens, D), numbers(I, D), normalize_eps=1e-6, **TRITON)


def own_negatives(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    negatives = torch.zeros(tokens, K, dtype=torch.int32)
    return gr_kernels.sampled_softmax(numbers(tokens, D), numbers(I, D), targets(tokens), negatives, **TRITON)


def in_batch(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    candidates = targets(tokens)
    return gr_kernels.sampled_softmax(numbers(tokens, D), numbers(I, D), candidates, candidates, **TRITON)


def concat_and_split(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    joined, edges = gr_kernels.concat_jagged(
        [numbers(tokens, D), numbers(tokens, D)], [offsets, offsets], **TRITON
    )
    head, _, tail, _ = gr_kernels.split_jagged(joined, edges, offsets.diff(), tail_rows=tokens, **TRITON)
    return head + tail


def dense_and_back(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    dense = gr_kernels.jagged_to_dense(numbers(tokens, D), offsets, max_length=longest, **TRITON)
    return gr_kernels.dense_to_jagged(dense, offsets, rows=tokens, **TRITON)


def positions(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    table = numbers(200, D)
    return gr_kernels.add_positions_and_times(
        numbers(tokens, D), offsets, max_length=longest, position_PD=table, **TRITON
    )


def dropout(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    return gr_kernels.jagged_dropout(numbers(tokens, D), 0.5, key=tokens, **TRITON)


OPERATIONS: list[Callable[[Tensor, int, int], Tensor]] = [
    cross_entropy,
    log_partition,
    own_negatives,
    in_batch,
    concat_and_split,
    dense_and_back,
    positions,
    dropout,
]

_backend = make_backend(GPUTarget("cuda", 90, 32))
_found: dict[str, list[Variant]] = defaultdict(list)


def _look_up(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, _backend)
    bound, specialization, options = bind(*arguments, **settings)
    variant = {name: str(value) for name, value in zip(bound, specialization)} | {"options": str(options)}
    if variant not in _found[kernel.fn.__name__]:
        _found[kernel.fn.__name__].append(variant)


def compiled_again(
    operation: Callable[[Tensor, int, int], Tensor], launched: set[str]
) -> dict[str, list[str]]:
    """Of each kernel that got a variant after the first batch: the arguments whose values are to blame."""
    first: dict[str, list[Variant]] = {}
    _found.clear()
    for lengths in BATCHES:
        offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        operation(offsets, sum(lengths), max(lengths)).sum().backward()
        first = first or {name: list(variants) for name, variants in _found.items()}
    launched.update(_found)
    blame = {}
    for name, variants in _found.items():
        if more := [variant for variant in variants if variant not in first.get(name, [])]:
            known = first.get(name, variants)
            blame[name] = sorted({n for n in more[0] if any(v[n] not in {f[n] for f in known} for v in more)})
    return blame


if __name__ == "__main__":
    jit.JITFunction.run = _look_up
    launched: set[str] = set()
    blame = {operation.__name__: compiled_again(operation, launched) for operation in OPERATIONS}
    print(json.dumps({"launched": sorted(launched), "compiled again": {n: b for n, b in blame.items() if b}}))
