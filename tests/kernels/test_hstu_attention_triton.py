"""The Triton attention against the float64 specification, gradients included: on a GPU where there is one, else in
Triton's interpreter with small tiles.

Every pair of (mask, dtype, bias, activation, dropout, cross form, deterministic or not, widths) is in CASES. All
combinations are in test_every_combination, for which a GPU's kernels are compiled some 20,000 times.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gr_kernels.counter_random import philox
from gr_kernels.hstu_attention import AttentionMask, AttentionProblem, RelativeBias, TimeBuckets
from gr_kernels.hstu_attention.mask import allowed
from gr_kernels.hstu_attention.reference import definition as specification
from tests.kernels.attention_problems import session_times
from tests.precision import UNIT, analysed, assert_within

pytest.importorskip("triton")
import triton
import triton.language as tl

from gr_kernels.hstu_attention import schema, triton_mask, triton_op, triton_scores
from gr_kernels.hstu_attention.settings import Settings
from gr_kernels.triton_common import random as triton_random

pytestmark = pytest.mark.usefixtures("poisoned_memory")
triton_op.attention.register()  # it is called here without being chosen

LENGTHS = (21, 0, 1, 41)
TARGETS = (4, 0, 1, 17)
QUERIES = (21, 0, 1, 13)  # of each sequence, in the cross form
# A GPU's tiles are 64 and 128 rows: sequences of several, which end inside one.
LONG: dict[str, Any] = {"lengths": (300, 0, 1, 129), "queries": (300, 0, 1, 70)}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 9},
    "window and full rows": {"window": 5, "full_rows": 11},
    "contexts": {"contexts": 3},
    "targets": {"targets": TARGETS},
    "all": {"window": 7, "full_rows": 4, "contexts": 4, "targets": TARGETS},
    "window and targets": {"window": 12, "targets": TARGETS},
    "contexts and targets": {"contexts": 18, "targets": TARGETS},
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "mask": tuple(MASKS),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "bias": ("none", "position", "time", "both", "sqrt"),
    "activation": ("silu", "softmax"),
    "dropout": (0.0, 0.3),
    "cross": (False, True),
    "deterministic": (False, True),
    "widths": ((25, 25), (16, 50), (32, 8)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    mask: str = "causal"
    dtype: torch.dtype = torch.float32
    bias: str = "none"
    activation: str = "silu"
    dropout: float = 0.0
    cross: bool = False
    deterministic: bool = False
    widths: tuple[int, int] = (16, 16)
    lengths: tuple[int, ...] = LENGTHS
    queries: tuple[int, ...] = QUERIES
    seed: int = 0

    def __str__(self) -> str:
        values = (getattr(self, name) for name in OPTIONS)
        return "-".join(str(value).removeprefix("torch.").replace(" ", "_") for value in values)

    @property
    def heads(self) -> int:
        return 1 + self.seed % 2

    @property
    def possible(self) -> bool:
        return self.mask != "full" or self.bias in ("none", "time", "sqrt")


def pairwise(**sizes: Any) -> list[Case]:
    """Cases of these sizes in which every pair of values of two options occurs, found greedily."""
    generator = random.Random(0)
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(OPTIONS, 2)
        for x in OPTIONS[a]
        for y in OPTIONS[b]
        if Case(**{a: x, b: y}).possible
    }
    cases = []
    while pairs:
        (a, x), (b, y) = min(pairs, key=str)
        best: tuple[int, Case, set[Any]] | None = None
        for _ in range(40):
            values = {name: generator.choice(some) for name, some in OPTIONS.items()} | {a: x, b: y}
            covered = pairs & set(itertools.combinations(values.items(), 2))
            if Case(**values).possible and (best is None or len(covered) > best[0]):
                best = (len(covered), Case(**values, seed=len(cases), **sizes), covered)
        assert best is not None
        cases.append(best[1])
        pairs -= best[2]
    return cases


CASES = pairwise(**(LONG if torch.cuda.is_available() else {}))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one call gets, on the CPU in the case's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    problem: AttentionProblem

    def moved(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """A copy elsewhere, in another dtype (times and offsets keep theirs)."""

        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype if x.is_floating_point() else x.dtype)

        problem, bias, mask = self.problem, self.problem.bias, self.problem.mask
        bias = dataclasses.replace(
            bias, **{n: move(getattr(bias, n)) for n in ("position", "time", "query_times", "key_times")}
        )
        problem = dataclasses.replace(
            problem,
            offsets=move(problem.offsets),
            query_offsets=move(problem.query_offsets),
            bias=bias,
            mask=dataclasses.replace(mask, targets=move(mask.targets)),
        )
        return Inputs(move(self.q), move(self.k), move(self.v), move(self.d_out), problem)


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    width_q, width_v = case.widths
    rows, longest = sum(case.lengths), max((1, *case.lengths))
    offsets, query_rows, query_offsets = offsets_of(case.lengths), torch.arange(rows), None
    if case.cross:
        query_offsets = offsets_of(case.queries)
        last = [torch.arange(int(end) - m, int(end)) for end, m in zip(offsets[1:], case.queries)]
        query_rows = torch.cat(last)
    # one projection, sliced: strides as the layers have them
    projection = torch.randn(rows, case.heads * (2 * width_q + width_v), generator=generator).to(case.dtype)
    q, k, v = torch.split(projection, [case.heads * w for w in (width_q, width_q, width_v)], dim=1)
    q, k, v = (x.unflatten(1, (case.heads, -1)) for x in (q, k, v))
    buckets = TimeBuckets("sqrt", 200, 37.5) if case.bias == "sqrt" else TimeBuckets()
    times = session_times(rows + 1, generator)
    settings = dict(MASKS[case.mask])
    if "targets" in settings:
        settings["targets"] = torch.tensor(settings["targets"])
    problem = AttentionProblem(
        offsets=offsets,
        query_offsets=query_offsets,
        max_length=longest,
        divisor=50.0,
        scale=width_q**-0.5,
        activation=case.activation,  # type: ignore[arg-type]
        mask=AttentionMask(**settings),
        bias=RelativeBias(
            torch.randn(longest, generator=generator).to(case.dtype)
            if case.bias in ("position", "both")
            else None,
            torch.randn(buckets.count, generator=generator).to(case.dtype)
            if case.bias in ("time", "both", "sqrt")
            else None,
            times[1:][query_rows],
            times[:-1],
            buckets,
        ),
        dropout=case.dropout,
        dropout_key=2**63 + 12345,
        deterministic=case.deterministic,
    )
    d_out = torch.randn(len(query_rows), case.heads, width_v, generator=generator).to(case.dtype)
    return Inputs(q[query_rows] if case.cross else q, k, v, d_out, problem)


def dropout_factors(inputs: Inputs) -> list[Tensor] | None:
    """What the specification multiplies weights by, from the plain generator: (heads, n, n) of each sequence."""
    problem = inputs.problem
    if not problem.dropout:
        return None
    factors = []
    for begin, end in itertools.pairwise(problem.offsets.tolist()):
        n = end - begin
        row = torch.arange(begin, end)[None, :, None]
        head = torch.arange(inputs.q.shape[1])[:, None, None]
        quad = torch.arange((n + 3) // 4)
        words = torch.stack(philox(problem.dropout_key, row, head, quad, torch.zeros_like(quad)), -1)
        words = words.flatten(-2)[..., :n]
        factors.append((words >= problem.drop_below).double() * problem.keep_scale)
    return factors


def results(inputs: Inputs, implementation: str = "triton") -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v")}
    bias = inputs.problem.bias
    tables = {
        name: table.detach().requires_grad_()
        for name, table in (("position", bias.position), ("time", bias.time))
        if table is not None
    }
    problem = dataclasses.replace(inputs.problem, bias=dataclasses.replace(bias, **tables))
    if implementation == "specification":
        out = specification(
            *leaves.values(),
            problem.offsets,
            divisor=problem.divisor,
            scale=problem.scale,
            activation=problem.activation,
            mask=problem.mask,
            bias=problem.bias,
            query_offsets=problem.query_offsets,
            factors=dropout_factors(inputs),
        )
    else:
        assert not triton_op.obstacle(*leaves.values(), problem)
        out = triton_op.attention(*leaves.values(), problem)
    out.backward(inputs.d_out)
    gradients = {name: leaf.grad for name, leaf in (leaves | tables).items()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"out": out.detach(), **gradients}  # type: ignore[dict-item]


def check(case: Case, device: torch.device, inputs: Inputs | None = None) -> None:
    inputs = inputs or make_inputs(case)
    cpu = torch.device("cpu")
    double = inputs.moved(cpu, torch.float64)
    exact, allowed = analysed(lambda: results(double, "specification"), case.dtype)
    if inputs.problem.activation == "softmax" and case.dtype.itemsize == 2:
        for name, more in of_rounded_output(double, exact["out"], case.dtype).items():
            allowed[name] = allowed[name] + more
    assert_within(results(inputs.moved(device, case.dtype)), exact, allowed, case.dtype)


def of_rounded_output(inputs: Inputs, out_THV: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What gradients lose by the output's own rounding, S keys in all.

    softmax's ds_ij = p_ij (dp_ij - sum_v out_iv d_out_iv) takes the output as it was stored, in 16 bits: ds_ij is off
    by up to p_ij e_i, e_i = u sum_v |out_iv d_out_iv|; dq, dk and the tables' gradients by its sums.
    """
    problem = inputs.problem
    e_TH = UNIT[dtype] * (out_THV * inputs.d_out).abs().sum(-1)
    one_S1S = torch.eye(len(inputs.k), dtype=torch.float64)[:, None]
    p_THS = specification(  # whose values are unit vectors: its output is p
        inputs.q,
        inputs.k,
        one_S1S.expand(-1, inputs.k.shape[1], -1),
        problem.offsets,
        divisor=problem.divisor,
        scale=problem.scale,
        activation=problem.activation,
        mask=problem.mask,
        bias=problem.bias,
        query_offsets=problem.query_offsets,
    )
    off_THS = e_TH[..., None] * p_THS
    more = {
        "q": problem.scale * torch.einsum("ths,shq->thq", off_THS, inputs.k.abs()),
        "k": problem.scale * torch.einsum("ths,thq->shq", off_THS, inputs.q.abs()),
    }
    bias, edges = problem.bias, problem.offsets.tolist()
    query_edges = edges if problem.query_offsets is None else problem.query_offsets.tolist()
    places: dict[str, list[tuple[Tensor, Tensor]]] = {"position": [], "time": []}
    for begin, end, first, last in zip(edges, edges[1:], query_edges, query_edges[1:]):
        off_mn = off_THS[first:last, :, begin:end].sum(1)
        row_m = end - begin - (last - first) + torch.arange(last - first)
        places["position"].append(((row_m[:, None] - torch.arange(end - begin)).clamp_min(0), off_mn))
        if bias.time is not None:
            times = (bias.query_times[first:last, None], bias.key_times[begin:end])
            places["time"].append((bias.buckets.bucket_between(*times), off_mn))
    for name, table in (("position", bias.position), ("time", bias.time)):
        if table is not None:
            more[name] = torch.zeros_like(table)
            for entry_mn, off_mn in places[name]:
                more[name].index_add_(0, entry_mn.flatten(), off_mn.flatten())
    return more


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_specification(case: Case, device: torch.device) -> None:
    check(case, device)


PIECES = [
    pytest.param(mask, bias, dtype, id=f"{mask}-{bias}-{str(dtype).removeprefix('torch.')}")
    for mask, bias, dtype in itertools.product(*(OPTIONS[name] for name in ("mask", "bias", "dtype")))
    if Case(mask=mask, bias=bias).possible
]


def combinations(mask: str, bias: str, dtype: torch.dtype) -> Iterator[Case]:
    """All of a piece, with the heads that models have. What differs in being deterministic or not alone follows one
    another, on the same inputs: it shares most kernels."""
    names = ("activation", "dropout", "cross")
    widths = ((25, 25), (64, 64), (128, 128), (256, 256), (64, 32))
    every = itertools.product(*(OPTIONS[name] for name in names), widths)
    for seed, (*values, width) in enumerate(every):
        case = Case(mask, dtype, bias, **dict(zip(names, values)), widths=width, seed=seed, **LONG)
        for deterministic in OPTIONS["deterministic"]:
            yield dataclasses.replace(case, deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("mask", "bias", "dtype"), PIECES)
def test_every_combination(mask: str, bias: str, dtype: torch.dtype, device: torch.device) -> None:
    """Hours of compiling in one process; cut into pieces that share no kernel, for several (pytest -n)."""
    for case in combinations(mask, bias, dtype):
        check(case, device)


@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_nothing_and_single_rows(activation: str, device: torch.device) -> None:
    for lengths in ((0,), (0, 0), (1,), (0, 1, 0)):
        check(Case(activation=activation, bias="both", lengths=lengths, queries=lengths), device)


def test_no_sequences(device: torch.device) -> None:
    """An empty batch is differentiable like any other."""
    found = results(make_inputs(Case(bias="both", lengths=(), queries=())).moved(device, torch.float32))
    assert found["out"].shape == (0, 1, 16) and found["q"].shape == (0, 1, 16)
    assert not found["position"].any() and not found["time"].any()


def test_wide_heads(device: torch.device) -> None:
    check(Case(widths=(100, 40), bias="both", deterministic=True), device)


@pytest.mark.parametrize(("activation", "size"), [("silu", 40.0), ("softmax", 4.0)])
def test_large_scores_neither_overflow_nor_vanish(activation: str, size: float, device: torch.device) -> None:
    inputs = make_inputs(Case(activation=activation, bias="position"))
    check(Case(), device, dataclasses.replace(inputs, q=inputs.q * size, k=inputs.k * size))


def test_softmax_of_huge_scores(device: torch.device) -> None:
    inputs = make_inputs(Case(activation="softmax"))
    inputs = dataclasses.replace(inputs, q=inputs.q * 100.0, k=inputs.k * 100.0)
    check(Case(activation="softmax"), device, inputs)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", [c for c in CASES if c.deterministic and c.bias != "none"][:3], ids=str)
def test_deterministic_runs_are_equal(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case).moved(device, case.dtype)
    assert_equal(results(inputs), results(inputs))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_any_order_of_work_gives_the_same_bits(activation: str, cross: bool, device: torch.device) -> None:
    """Longest first, which is what a call without an order finds, and others; the tables' gradients are summed in
    that order, so their last bits may differ."""
    case = Case(mask="all", bias="both", activation=activation, cross=cross, deterministic=True)
    inputs = make_inputs(case).moved(device, torch.float32)
    plain = results(inputs)
    cpu = torch.device("cpu")
    exact, allowed = analysed(
        lambda: results(inputs.moved(cpu, torch.float64), "specification"), torch.float32
    )
    for order in ([3, 0, 2, 1], [0, 1, 2, 3], [1, 3, 0, 2]):
        problem = dataclasses.replace(inputs.problem, order=torch.tensor(order, device=device))
        found = results(dataclasses.replace(inputs, problem=problem))
        assert_within(found, exact, allowed)
        for name in ("position", "time"):
            del found[name]
        assert_equal(found, {name: plain[name] for name in found})


def test_order_is_not_found_again_when_given(device: torch.device) -> None:
    inputs = make_inputs(Case()).moved(device, torch.float32)
    order = torch.tensor([1, 3, 0, 2], device=device)
    launch = triton_op.Launch(inputs.q, inputs.k, inputs.v, dataclasses.replace(inputs.problem, order=order))
    assert launch.order is order
    found = triton_op.Launch(inputs.q, inputs.k, inputs.v, inputs.problem).order
    assert found is not None and found.tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_rows_outside_are_never_read(activation: str, device: torch.device) -> None:
    """Sequences that start late and end early in a poisoned batch: same results, zeros outside."""
    inputs = make_inputs(Case(activation=activation, bias="both", deterministic=True)).moved(
        device, torch.float32
    )
    before, after = 5, 70

    def poisoned(x: Tensor) -> Tensor:
        value = float("nan") if x.is_floating_point() else 2**62
        return torch.nn.functional.pad(x, (*[0, 0] * (x.dim() - 1), before, after), value=value)

    problem, bias = inputs.problem, inputs.problem.bias
    assert bias.query_times is not None and bias.key_times is not None
    bias = dataclasses.replace(
        bias, query_times=poisoned(bias.query_times), key_times=poisoned(bias.key_times)
    )
    problem = dataclasses.replace(problem, offsets=problem.offsets + before, bias=bias)
    surrounded = Inputs(*(poisoned(x) for x in (inputs.q, inputs.k, inputs.v, inputs.d_out)), problem)
    clean, found = results(inputs), results(surrounded)
    for name in ("out", "q", "k", "v"):
        assert not found[name][:before].any() and not found[name][-after:].any(), name
        found[name] = found[name][before:-after]
    assert_equal(found, clean)


def test_companions_change_no_bit(device: torch.device) -> None:
    """A sequence's output and gradients, alone and among others."""
    inputs = make_inputs(Case(mask="all", bias="both", deterministic=True)).moved(device, torch.float32)
    together = results(inputs)
    problem = inputs.problem
    for b, (begin, end) in enumerate(itertools.pairwise(problem.offsets.tolist())):
        times = {name: getattr(problem.bias, name)[begin:end] for name in ("query_times", "key_times")}
        assert problem.mask.targets is not None
        alone = dataclasses.replace(
            problem,
            offsets=torch.tensor([0, end - begin], device=device),
            bias=dataclasses.replace(problem.bias, **times),
            mask=dataclasses.replace(problem.mask, targets=problem.mask.targets[b : b + 1]),
        )
        rows = (x[begin:end] for x in (inputs.q, inputs.k, inputs.v, inputs.d_out))
        found = results(Inputs(*rows, alone))
        for name in ("out", "q", "k", "v"):
            assert torch.equal(found[name], together[name][begin:end]), name


def test_targets_do_not_see_each_other(device: torch.device) -> None:
    """Another target changes its own output and none else."""
    inputs = make_inputs(Case(mask="targets", bias="both")).moved(device, torch.float32)
    row = sum(LENGTHS) - 3
    changed = inputs.moved(device, torch.float64).moved(device, torch.float32)
    for x in (changed.q, changed.k, changed.v):
        x[row] += 1.0
    difference = (results(inputs)["out"] != results(changed)["out"]).flatten(1).any(1)
    assert difference.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_cached_equals_full(activation: str, device: torch.device) -> None:
    """The cross form computes what the last rows of the whole have, dropout included."""
    case = Case(mask="all", bias="both", activation=activation, dropout=0.3)
    full = make_inputs(case).moved(device, torch.float32)
    cross = make_inputs(dataclasses.replace(case, cross=True)).moved(device, torch.float32)
    ends = full.problem.offsets[1:].tolist()
    rows = torch.cat([torch.arange(end - m, end) for end, m in zip(ends, QUERIES)])
    cpu = torch.device("cpu")
    exact, allowed = analysed(lambda: results(full.moved(cpu, torch.float64), "specification"), torch.float32)
    last, bound = ({"out": x["out"][rows]} for x in (exact, allowed))
    for found in (results(cross)["out"], results(full)["out"][rows.to(device)]):
        assert_within({"out": found}, last, bound)


def test_strides_are_taken_as_they_come(device: torch.device) -> None:
    """Transposed heads and a last dimension with gaps give what contiguous copies give."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 30, 32, generator=generator).to(device).transpose(0, 1).split(16, dim=-1)
    v = torch.randn(30, 2, 20, generator=generator).to(device)[..., ::2]
    problem = AttentionProblem(offsets=torch.tensor([0, 12, 30], device=device), max_length=18, divisor=9.0)
    dense = triton_op.attention(q.contiguous(), k.contiguous(), v.contiguous(), problem)
    assert torch.equal(triton_op.attention(q, k, v, problem), dense)


def slices(dtype: torch.dtype, heads: int, width: int) -> list[Tensor]:
    """v, q and k as the layers have them, behind u in one projection."""
    projection = torch.empty(10, 4 * heads * width, dtype=dtype)
    return [x.unflatten(1, (heads, width)) for x in projection.split(heads * width, dim=1)[1:]]


def test_addresses_are_known_as_they_are() -> None:
    """ALIGNED divides every row's address in bytes; FAR is set when 32 bits can't count within a tile."""
    settings = Settings(ROWS=128, KEYS=64, WIDTH_Q=16, WIDTH_V=16, BLOCK_Q=16, BLOCK_V=16)
    expected = {
        (torch.bfloat16, 1, 50): 4,
        (torch.bfloat16, 2, 25): 2,
        (torch.bfloat16, 2, 64): 16,
        (torch.bfloat16, 3, 20): 8,
        (torch.float32, 1, 50): 8,
        (torch.float32, 2, 25): 4,
    }
    for (dtype, heads, width), aligned in expected.items():
        found = triton_op.addressed(settings, *slices(dtype, heads, width))
        assert (found.ALIGNED, found.FAR) == (aligned, False)
    shifted = torch.empty(20, 2, 64, dtype=torch.bfloat16)[..., 3:]
    assert triton_op.addressed(settings, shifted).ALIGNED == 2
    one_row = torch.empty(64, dtype=torch.bfloat16).as_strided((1, 1, 64), (3, 5, 1))
    assert triton_op.addressed(settings, one_row).ALIGNED == 16  # a stride that is never taken says nothing
    for stride, far in ((2**24 - 1, False), (2**24, True)):
        rows = torch.empty(2**24 + 64, device="meta").as_strided((2, 1, 64), (stride, 64, 1))
        assert triton_op.addressed(settings, rows).FAR is far
        heads = torch.empty(2**24 + 64, device="meta").as_strided((1, 128, 64), (64, stride, 1))
        assert triton_op.addressed(settings, heads).FAR is far


def test_sums_of_d_q_need_no_far_addresses(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are (heads, rows, width) and addressed from a 64-bit start: their strides make no kernel FAR."""
    looked_at: list[Tensor] = []

    def spy(settings: Settings, *tensors: Tensor) -> Settings:
        looked_at.extend(tensors)
        return addressed(settings, *tensors)

    addressed = triton_op.addressed
    monkeypatch.setattr(triton_op, "addressed", spy)
    inputs = make_inputs(Case(seed=1)).moved(device, torch.float32)
    assert triton_op.Launch(inputs.q, inputs.k, inputs.v, inputs.problem).atomic
    results(inputs)
    assert looked_at and {x.shape[:2] for x in looked_at} == {(sum(LENGTHS), 2)}


COUNT_COPIES = """
import triton
from benchmarks.kernels import resources
from benchmarks.kernels.compile_cases.hstu_attention import CASES
compile, kernels = triton.compile, []
triton.compile = lambda *a, **k: kernels.append(compile(*a, **k)) or kernels[-1]
for name in ("forward", "d_q", "d_kv"):
    case = next(c for c in CASES if c.name == name + ".bf16.d50.short.both" and 90 in c.architectures)
    resources.compile_case(case, 90)
print(*(kernel.asm["ptx"].count("cp.async.ca.shared.global") for kernel in kernels))
"""


def test_unaligned_rows_are_copied_ahead_of_their_use(checkout: Path, tmp_path: Path) -> None:
    """A model's default, heads of 50 in bfloat16: no 16-byte pieces, but keys and values are still pipelined."""
    from benchmarks.kernels.resources import missing_compiler

    if reason := missing_compiler():
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{checkout}:{checkout / 'kernels'}", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_COPIES], env=environment, cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    copies = [int(count) for count in done.stdout.split()]
    assert len(copies) == 3 and min(copies) >= 40, copies


def test_operator_traces(device: torch.device) -> None:
    """Schema, fake shapes and autograd registration, as torch.compile uses them."""
    inputs = make_inputs(Case(mask="all", bias="both", lengths=(9, 0, 5, 7))).moved(device, torch.float32)
    for activation, order in (("silu", None), ("softmax", torch.tensor([0, 3, 2, 1], device=device))):
        problem = dataclasses.replace(inputs.problem, activation=activation, order=order)
        q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        triton_op.attention(q, k, v, problem)  # registers
        operator = torch.ops.gr_kernels.hstu_attention_triton.default
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, (q, k, v, *schema.flatten(problem)), test_utils=checks)


def test_what_it_cannot_take(device: torch.device) -> None:
    inputs = make_inputs(Case()).moved(device, torch.float64)
    assert "float64" in triton_op.obstacle(inputs.q, inputs.k, inputs.v, inputs.problem)
    wide = torch.zeros(63, 1, 257, device=device)
    assert "257 wide" in triton_op.obstacle(wide, wide, wide, inputs.problem)


@pytest.mark.gpu
def test_never_waits_for_the_device(device: torch.device) -> None:
    inputs = make_inputs(Case(mask="all", bias="both", activation="softmax")).moved(device, torch.bfloat16)
    results(inputs)  # compiles, and uploads the thresholds
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@triton.jit
def bucket_kernel(
    a, b, out, thresholds, count, per_unit, margin, last: tl.int32, SQRT: tl.constexpr, ASSEMBLY: tl.constexpr
):
    index = tl.program_id(0) * 256 + tl.arange(0, 256)
    buckets = (thresholds, per_unit, margin, last)
    a_time, b_time = tl.load(a + index, mask=index < count), tl.load(b + index, mask=index < count)
    found = triton_scores.time_bucket(a_time, b_time, buckets, SQRT, ASSEMBLY)
    tl.store(out + index, found, mask=index < count)


@pytest.mark.parametrize(
    "buckets",
    [
        TimeBuckets(),
        TimeBuckets("log", 9000, 0.0045),
        TimeBuckets("log", 40, 0.05),
        TimeBuckets("log", 3000, 1e-4),
        TimeBuckets("sqrt", 300, 3.7),
        TimeBuckets("sqrt", 65536, 46000.5),
        TimeBuckets(count=1),
        TimeBuckets("sqrt", 65536, 1e-3),
    ],
    ids=str,
)
def test_time_buckets_are_exact(buckets: TimeBuckets, device: torch.device) -> None:
    """Around thresholds, at random in every range, with either sign, up to 2^63 - 2."""
    generator = torch.Generator().manual_seed(0)
    thresholds = buckets.thresholds()
    some = thresholds[torch.randperm(len(thresholds), generator=generator)[:2000]]
    near = (some[:, None] + torch.tensor([-1, 0, 1])).flatten()
    shift = torch.randint(1, 63, (2000,), generator=generator)
    anywhere = torch.randint(2**62, 2**63 - 1, (2000,), generator=generator) >> shift
    dt = torch.cat([near, anywhere, torch.tensor([0, 1, 2, 3, 2**31, 2**32, 2**53 + 1, 2**63 - 2])])
    dt = dt.clamp(0, 2**63 - 2) * torch.where(torch.arange(len(dt)) % 2 == 0, 1, -1)
    a = dt >> 1  # two times that far apart, around 0
    b = a - dt
    inputs = make_inputs(Case(bias="time"))
    bias = dataclasses.replace(inputs.problem.bias, buckets=buckets)
    problem = dataclasses.replace(inputs.problem, bias=bias)
    arguments = triton_op.Launch(inputs.q, inputs.k, inputs.v, problem).arguments
    out = torch.empty(len(dt), dtype=torch.int32, device=device)
    bucket_kernel[(-(-len(dt) // 256),)](
        a.to(device), b.to(device), out, thresholds.to(device), len(dt),
        arguments["buckets_per_unit"], arguments["bucket_margin"], arguments["last_bucket"], buckets.kind == "sqrt",
        device.type == "cuda",
    )  # fmt: skip
    expected = np.searchsorted(thresholds.numpy(), dt.abs().numpy(), side="right")
    assert torch.equal(out.cpu().long(), torch.from_numpy(expected))


@triton.jit
def kept_kernel(out, row, key_low: tl.uint32, key_high: tl.uint32, head, first, drop_last: tl.uint32):
    rows = (tl.load(row) + tl.arange(0, 16)).to(tl.uint32)
    keep = triton_random.kept(key_low, key_high, rows, head, tl.load(first).to(tl.int32), drop_last, 32)
    tl.store(out + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("row", [0, 2**31 - 8, 2**32 - 8])
@pytest.mark.parametrize(("key", "dropout"), [(0, 0.5), (2**64 - 1, 0.1), (2**63 + 5, 1 - 2**-40)])
def test_dropout_decisions_are_the_references(
    row: int, key: int, dropout: float, device: torch.device
) -> None:
    head, first = 3, 64
    drop_below = AttentionProblem(
        offsets=torch.zeros(1), max_length=1, divisor=1.0, dropout=dropout
    ).drop_below
    out = torch.empty((16, 32), dtype=torch.int8, device=device)
    scalars = (torch.tensor(x, device=device) for x in (row, first))
    kept_kernel[(1,)](out, next(scalars), key & 0xFFFFFFFF, key >> 32, head, next(scalars), drop_below - 1)
    rows = ((row + torch.arange(16)) & 0xFFFFFFFF)[:, None]
    quads = torch.arange(first // 4, first // 4 + 8)
    words = torch.stack(philox(key, rows, torch.tensor(head), quads, torch.zeros_like(quads)), -1).flatten(-2)
    assert torch.equal(out.cpu().bool(), words >= drop_below)


@triton.jit
def blocks_kernel(cases, out, S: tl.constexpr):
    """Blocks that key_blocks (of rows) and row_blocks (of keys) walk for a case: how often, and whether whole."""
    case = tl.program_id(0)
    cases += case * 10
    n, o = tl.load(cases), tl.load(cases + 1)
    sequence = (n, o, tl.load(cases + 2), tl.load(cases + 3), tl.load(cases + 4), n)
    numbers = (tl.load(cases + 5), tl.load(cases + 6), tl.load(cases + 7))
    first = tl.load(cases + 8)
    if tl.load(cases + 9) == 0:
        whole, whole_end, runs = triton_mask.key_blocks(
            first, tl.minimum(first + S.ROWS, n), sequence, numbers, S
        )
    else:
        whole, whole_end, runs = triton_mask.row_blocks(
            first, tl.minimum(first + S.KEYS, n), sequence, numbers, S
        )
    out += case * 64
    for block in range(whole, whole_end):
        tl.store(out + block, tl.load(out + block) + 1000)
    for index in range(triton_mask.count_blocks(runs)):
        block = triton_mask.nth_block(index, runs)
        tl.store(out + block, tl.load(out + block) + 1)


@pytest.mark.parametrize("mask", MASKS)
def test_blocks_are_those_that_are_seen(mask: str, device: torch.device) -> None:
    """Every block with a visible score once; as whole only those seen whole; and hardly any other."""
    generator = random.Random(mask)
    rows_of_tile, keys_of_tile = 8, 4
    flags = {"CAUSAL": mask != "full", "TARGETS": "targets" in MASKS[mask], "WINDOW": "window" in MASKS[mask]}
    flags["CONTEXTS"] = "contexts" in MASKS[mask]
    settings = Settings(
        ROWS=rows_of_tile, KEYS=keys_of_tile, WIDTH_Q=16, WIDTH_V=16, BLOCK_Q=16, BLOCK_V=16, **flags
    )
    cases, masks = [], []
    for _ in range(25):
        n = generator.randint(1, 60)
        m = generator.choice([n, generator.randint(1, n)])
        targets = generator.choice([0, 1, generator.randint(0, n)]) if flags["TARGETS"] else 0
        window = generator.choice([1, 5, generator.randint(1, 70)]) if flags["WINDOW"] else 0
        full = generator.choice([0, 3, generator.randint(0, n)]) if flags["WINDOW"] else 0
        contexts = generator.choice([1, 2, generator.randint(1, n + 2)]) if flags["CONTEXTS"] else 0
        attention_mask = AttentionMask(flags["CAUSAL"], window, full, contexts)
        i, j = torch.arange(n - m, n)[:, None], torch.arange(n)
        seen = allowed(attention_mask, i, j, n, targets).expand(m, n)
        history, ahead = n - targets, max(contexts - 1, 0)
        sequence = [n, n - m, history, ahead, max(history - ahead, 0), window, full, contexts]
        by_row = generator.random() < 0.5
        first = generator.randrange(0, m, rows_of_tile) if by_row else generator.randrange(0, n, keys_of_tile)
        cases.append([*sequence, n - m + first if by_row else first, 0 if by_row else 1])
        strip = seen[first : first + rows_of_tile] if by_row else seen[:, first : first + keys_of_tile].T
        masks.append(
            (strip, keys_of_tile if by_row else rows_of_tile, keys_of_tile if not by_row else rows_of_tile)
        )
    out = torch.zeros((len(cases), 64), dtype=torch.int32, device=device)
    blocks_kernel[(len(cases),)](torch.tensor(cases, dtype=torch.int32, device=device), out, settings)
    extra = 0
    for case, walked, (strip, width, _) in zip(cases, out.tolist(), masks):
        for block, count in enumerate(walked):
            part = strip[:, block * width : (block + 1) * width]
            if not part.numel():
                assert count == 0, case
            elif count == 1000:
                # past the end of a walk over keys a row is harmless, a key never is
                assert part.all() and part.shape[1] == width, (case, block)
            else:
                assert count == 1 if part.any() else count <= 1, (case, block, count)
                extra += int(count == 1 and not part.any())
    assert extra <= len(cases), extra
