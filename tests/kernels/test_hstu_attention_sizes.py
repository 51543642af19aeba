"""The Triton attention where numbers get large: sequences of 65,536 rows, rows and heads more than 2^31 numbers apart.

Against plain PyTorch in float64, gradients included.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gr_kernels.hstu_attention import AttentionMask, AttentionProblem, RelativeBias
from gr_kernels.hstu_attention.reference import definition as specification
from tests.kernels.attention_problems import session_times
from tests.precision import analysed, assert_within

pytest.importorskip("triton")
from gr_kernels.hstu_attention import tiles, triton_op
from gr_kernels.triton_common.available import interpreting

pytestmark = pytest.mark.usefixtures("poisoned_memory")
triton_op.attention.register()  # it is called here without being chosen

LONG = 65_536
DIVISOR = 100.0
NAMES = ("q", "k", "v", "position", "time")


def with_tile(monkeypatch: pytest.MonkeyPatch, rows: int, keys: int) -> None:
    """The interpreter's time is mostly spent per tile, so long sequences get large ones there."""
    if interpreting():
        monkeypatch.setattr(tiles, "choose", lambda *_, **settings: tiles.Tile(rows, keys, 4, 1))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem_of(
    lengths: tuple[int, ...], queries: tuple[int, ...] | None = None, biased: bool = True, **settings: Any
) -> AttentionProblem:
    """A problem on the CPU, with both tables or none."""
    rows, longest = sum(lengths), max(lengths)
    times = session_times(rows + 1, torch.Generator().manual_seed(7))
    edges = [0, *itertools.accumulate(lengths)]
    query_times = times[1:]
    query_offsets = None
    if queries is not None:
        query_offsets = torch.tensor([0, *itertools.accumulate(queries)])
        query_times = torch.cat([query_times[end - m : end] for end, m in zip(edges[1:], queries)])
    tables = (numbers(longest, seed=5), numbers(129, seed=6)) if biased else (None, None)
    bias = RelativeBias(*tables, query_times=query_times, key_times=times[:-1])
    return AttentionProblem(
        offsets=torch.tensor(edges), query_offsets=query_offsets, max_length=longest, divisor=DIVISOR, bias=bias,
        deterministic=True, **settings,
    )  # fmt: skip


def leaves_of(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """What gets gradients: the first of NAMES."""
    some = (q, k, v, problem.bias.position, problem.bias.time)
    return [x.detach().to(device, dtype, copy=True).requires_grad_() for x in some if x is not None]


def exact(
    leaves: list[Tensor], d_out: Tensor, problem: AttentionProblem, block: int = 512
) -> dict[str, Tensor]:
    """Output and gradients by the specification, a block of rows at a time: no row needs keys behind its window."""
    q, k, v = leaves[:3]
    bias = problem.bias
    assert bias.query_times is not None and bias.key_times is not None
    key_edges = problem.offsets.tolist()
    query_edges = key_edges if problem.query_offsets is None else problem.query_offsets.tolist()
    out = torch.empty_like(d_out)
    for keys, queries in zip(itertools.pairwise(key_edges), itertools.pairwise(query_edges)):
        ahead = (keys[1] - keys[0]) - (queries[1] - queries[0])
        for first in range(*queries, block):
            end = min(first + block, queries[1])
            key_end = keys[0] + ahead + end - queries[0]
            key_first = keys[0]
            if problem.mask.window:
                key_first = max(key_first, key_end - (end - first) - problem.mask.window)
            part = specification(
                q[first:end], k[key_first:key_end], v[key_first:key_end], torch.tensor([0, key_end - key_first]),
                divisor=problem.divisor, scale=problem.scale, activation=problem.activation, mask=problem.mask,
                query_offsets=torch.tensor([0, end - first]),
                bias=dataclasses.replace(
                    bias, query_times=bias.query_times[first:end], key_times=bias.key_times[key_first:key_end]
                ),
            )  # fmt: skip
            part.backward(d_out[first:end])
            out[first:end] = part.detach()
    return {"out": out, **gradients(leaves)}


def gradients(leaves: list[Tensor]) -> dict[str, Tensor]:
    assert all(x.grad is not None for x in leaves)
    return {name: x.grad for name, x in zip(NAMES, leaves)}  # type: ignore[misc]


def moved(problem: AttentionProblem, leaves: list[Tensor]) -> AttentionProblem:
    """The problem on the leaves' device, with their tables."""
    bias, device = problem.bias, leaves[0].device
    assert bias.query_times is not None and bias.key_times is not None
    return dataclasses.replace(
        problem,
        offsets=problem.offsets.to(device),
        query_offsets=None if problem.query_offsets is None else problem.query_offsets.to(device),
        bias=RelativeBias(
            *(leaves[3:] or (None, None)), bias.query_times.to(device), bias.key_times.to(device)
        ),
    )


def check(
    device: torch.device, dtype: torch.dtype, width: int, problem: AttentionProblem, heads: int = 1
) -> None:
    """Within the bound on rounding.  The exact results come from the kernels' device, a block of scores at a time."""
    keys = int(problem.offsets[-1])
    rows = keys if problem.query_offsets is None else int(problem.query_offsets[-1])
    q, k, v, d_out = (
        numbers(n, heads, width, seed=s).to(dtype) for s, n in enumerate((rows, keys, keys, rows))
    )

    def definition() -> dict[str, Tensor]:
        leaves = leaves_of(q, k, v, problem, device, dtype)
        leaves = [x.detach().double().requires_grad_() for x in leaves]
        with device:  # the specification's own tensors
            return exact(leaves, d_out.to(device).double(), moved(problem, leaves))

    wanted, allowed = analysed(definition, dtype)
    leaves = leaves_of(q, k, v, problem, device, dtype)
    there = moved(problem, leaves)
    assert not triton_op.obstacle(*leaves[:3], there)
    out = triton_op.attention(*leaves[:3], there)
    out.backward(d_out.to(device))
    assert_within({"out": out.detach(), **gradients(leaves)}, wanted, allowed, dtype)


@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_few_queries_of_many_keys(
    activation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tile(monkeypatch, 16, 2048)
    problem = problem_of((1, LONG, 0, 1), (1, 5, 0, 0), activation=activation, scale=0.25)
    check(device, torch.float32, 16, problem)


# beyond 2^15 rows; the interpreter takes a minute for twice as many
@pytest.mark.parametrize(
    "longest",
    [5_000, pytest.param(33_000, marks=pytest.mark.slow), pytest.param(LONG, marks=pytest.mark.gpu)],
)
def test_long_sequence_with_a_window(
    longest: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tile(monkeypatch, 512, 512)
    problem = problem_of((0, longest, 1), biased=False, mask=AttentionMask(window=50), scale=0.25)
    check(device, torch.float32, 16, problem)


@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize("longest", [700, pytest.param(LONG, marks=pytest.mark.gpu)])
def test_long_causal_sequence(
    longest: int, activation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tile(monkeypatch, 128, 128)
    dtype = torch.float32 if interpreting() else torch.bfloat16
    check(device, dtype, 64, problem_of((1, longest, 0), activation=activation, scale=0.125), heads=2)


def far_apart(device: torch.device, count: int) -> Tensor:
    """(count,) float32 zeros of which the system commits only what is written; on a GPU all of it."""
    if device.type == "cuda":
        if torch.cuda.mem_get_info(device)[0] < 5 * count:
            pytest.skip(f"the GPU has no {4 * count:,} bytes free")
        return torch.zeros(count, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, 4 * count, flags=flags)
    except OSError as refusal:
        pytest.skip(f"the system gives no {4 * count:,} bytes of addresses: {refusal}")
    return torch.frombuffer(memory, dtype=torch.float32)


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("axis", "apart"), [("rows", 2**30 + 8), ("rows", 2**31 + 24), ("heads", 2**30 + 8)])
def test_rows_and_heads_far_apart(
    axis: str, apart: int, biased: bool, deterministic: bool, device: torch.device
) -> None:
    """Products of a stride with a row of the tile or with the head pass 2^31, though none of them has to."""
    before = resident_bytes()
    rows, heads, width = (4 if apart < 2**31 else 3, 2, 16) if axis == "rows" else (6, 3, 16)
    strides = (apart, 3 * width, 1) if axis == "rows" else (3 * width, apart, 1)
    buffer = far_apart(device, (rows - 1) * strides[0] + (heads - 1) * strides[1] + 3 * width)
    assert buffer.numel() > 2**31
    far = [buffer.as_strided((rows, heads, width), strides, i * width) for i in range(3)]
    near = [numbers(rows, heads, width, seed=i) for i in range(3)]
    for x, values in zip(far, near):
        x.copy_(values)
    d_out = numbers(rows, heads, width, seed=4)
    table = numbers(rows, seed=5) if biased else None

    def run(x: list[Tensor], triton: bool) -> dict[str, Tensor]:
        leaves = [
            each.detach().requires_grad_() for each in (*x, *([] if table is None else [table.to(x[0])]))
        ]
        bias = RelativeBias(position=leaves[3] if biased else None)
        if triton:
            offsets = torch.tensor([0, 1, rows], device=device)
            problem = AttentionProblem(
                offsets=offsets, max_length=rows, divisor=5.0, bias=bias, deterministic=deterministic
            )
            out = triton_op.attention(*leaves[:3], problem)
        else:
            out = specification(*leaves[:3], torch.tensor([0, 1, rows]), divisor=5.0, bias=bias)
        found = torch.autograd.grad(out, leaves, d_out.to(out))
        return {"out": out.detach(), **dict(zip(("q", "k", "v", "position"), found))}

    wanted, allowed = analysed(lambda: run([x.double() for x in near], False), torch.float32)
    assert_within(run(far, True), wanted, allowed, torch.float32)
    if device.type == "cpu":
        assert resident_bytes() - before < 2**28, "the memory between the rows was committed"
