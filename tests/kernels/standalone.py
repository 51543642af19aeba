"""Runs every public function of gr_kernels, forward and backward, where `gr` can't be imported.

test_packaging.py runs it on an installed package: what a wheel forgot shows. Prints where the package lies and whether
its C++ operators are there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

sys.modules["gr"] = None  # type: ignore[assignment]  # an import of it raises

import gr_kernels  # noqa: E402

assert "torch" not in sys.modules, "importing the package imported torch"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

LENGTHS = [3, 0, 5]
OFFSETS = torch.tensor([0, 3, 3, 8])
T, B, N, I, D = 8, 3, 5, 12, 16
ROWS = torch.arange(T)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def attention() -> Tensor:
    q, k, v = (numbers(T, 2, D) for _ in range(3))
    mask = gr_kernels.AttentionMask(targets=torch.tensor([1, 0, 2]))
    bias = gr_kernels.RelativeBias(
        position=numbers(N),
        time=numbers(129),
        query_times=ROWS,
        key_times=ROWS,
        buckets=gr_kernels.TimeBuckets(),
    )
    return gr_kernels.hstu_attention(q, k, v, OFFSETS, max_length=N, divisor=5.0, mask=mask, bias=bias)


def explanation() -> str:
    queries, table = numbers(T, D), numbers(I, D)
    return gr_kernels.explain(gr_kernels.cross_entropy, queries, table, ROWS)


def preferred() -> str:
    with gr_kernels.preferring("reference"):
        return explanation()


CALLS: dict[str, Callable[[], Any]] = {
    "hstu_attention": attention,
    "explain": explanation,
    "preferring": preferred,
    "add_positions_and_times": lambda: gr_kernels.add_positions_and_times(
        numbers(T, D), OFFSETS, max_length=N, position_PD=numbers(N, D)
    ),
    "bias_table_gradient": lambda: gr_kernels.bias_table_gradient(numbers(T), ROWS % 3, 3),
    "candidate_scores": lambda: gr_kernels.candidate_scores(numbers(T, D), numbers(I, D), ROWS[:, None]),
    "concat_jagged": lambda: gr_kernels.concat_jagged([numbers(T, D), numbers(T, D)], [OFFSETS, OFFSETS]),
    "cross_entropy": lambda: gr_kernels.cross_entropy(numbers(T, D), numbers(I, D), ROWS),
    "dense_to_jagged": lambda: gr_kernels.dense_to_jagged(numbers(B, N, D), OFFSETS, rows=T),
    "derive_key": lambda: gr_kernels.derive_key(1, "a", 2),
    "gated_output": lambda: gr_kernels.gated_output(
        numbers(T, D), numbers(T, D), numbers(T, D), numbers(D, D), eps=1e-6, dropout=0.5, dropout_key=3
    ),
    "jagged_dropout": lambda: gr_kernels.jagged_dropout(numbers(T, D), 0.5, key=1),
    "jagged_to_dense": lambda: gr_kernels.jagged_to_dense(numbers(T, D), OFFSETS, max_length=N),
    "log_partition": lambda: gr_kernels.log_partition(numbers(T, D), numbers(I, D)),
    "norm_linear_silu": lambda: gr_kernels.norm_linear_silu(numbers(T, D), numbers(4, D), eps=1e-6),
    "norm_linear_silu_parts": lambda: gr_kernels.norm_linear_silu_parts(
        numbers(T, D), numbers(5, D), (2, 3), eps=1e-6
    ),
    "sampled_softmax": lambda: gr_kernels.sampled_softmax(
        numbers(T, D), numbers(I, D), ROWS, torch.tensor([1, 5])
    ),
    "split_jagged": lambda: gr_kernels.split_jagged(
        numbers(T, D), OFFSETS, torch.tensor([1, 0, 2]), tail_rows=3
    ),
    "truncated_normal_rows": lambda: gr_kernels.truncated_normal_rows(1, range(T), D, 0.02),
    "uniform_floats": lambda: gr_kernels.uniform_floats(1, ROWS, ROWS, 3),
    "uniform_integers": lambda: gr_kernels.uniform_integers(1, ROWS, ROWS, 3, 100),
}


def check(name: str, result: Any) -> None:
    for out in result if isinstance(result, tuple) else (result,):
        if isinstance(out, Tensor):
            assert out.isfinite().all(), name
            if out.requires_grad:
                out.sum().backward(retain_graph=True)
        else:
            assert out, name


def main() -> None:
    public = {name for name in dir(gr_kernels) if callable(getattr(gr_kernels, name)) and name[0].islower()}
    functions = {name for name in public if getattr(gr_kernels, name).__module__.startswith("gr_kernels.")}
    assert functions == set(CALLS), f"not called here, or no longer there: {functions ^ set(CALLS)}"
    for name, call in CALLS.items():
        check(name, call())
    from gr_kernels import native

    assert gr_kernels.__file__ is not None
    print(os.path.dirname(gr_kernels.__file__), "with C++" if native.available() else "without C++")


if __name__ == "__main__":
    main()
