"""The attention in parts: stretches of queries against stretches of keys add up to the attention of whole sequences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gr_kernels.dispatch import CannotRun
from gr_kernels.hstu_attention import (
    AttentionMask,
    AttentionPart,
    AttentionProblem,
    RelativeBias,
    add_part,
    attend_part,
    attend_part_backward,
)
from gr_kernels.hstu_attention.reference import definition as specification
from tests.kernels.attention_problems import DROPOUT, KEY, Case, dropout_factors, make_case
from tests.precision import UNIT, analysed, assert_within, growth

LENGTHS = (21, 0, 1, 47, 8, 5)
STRETCHES = 4

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclasses.dataclass(frozen=True)
class Stretches:
    """The p-th stretch of every sequence: its rows in the batch, offsets among themselves, and where it begins."""

    rows: Tensor
    offsets: Tensor
    starts: Tensor

    @staticmethod
    def of(case: Case, number: int, stretches: int) -> Stretches:
        starts, rows, counts = [], [], [0]
        for begin, end in itertools.pairwise(case.offsets.tolist()):
            width = -(-(end - begin) // (4 * stretches)) * 4
            first, behind = (min(p * width, end - begin) for p in (number, number + 1))
            starts.append(number * width)
            rows += range(begin + first, begin + behind)
            counts.append(counts[-1] + behind - first)
        return Stretches(torch.tensor(rows, dtype=torch.int64), torch.tensor(counts), torch.tensor(starts))


def pairs(
    case: Case, bias: RelativeBias, settings: dict[str, Any], stretches: int
) -> Iterator[tuple[Stretches, Stretches, AttentionProblem]]:
    """All that see something of each other."""
    cut = [Stretches.of(case, number, stretches) for number in range(stretches)]
    causal = settings["mask"].causal
    for (a, queries), (b, keys) in itertools.product(enumerate(cut), enumerate(cut)):
        if causal and b > a:
            continue
        part = AttentionPart(queries.starts, keys.starts, case.offsets[:-1])
        times = {}
        if bias.time is not None:
            assert bias.query_times is not None and bias.key_times is not None
            times = {
                "query_times": bias.query_times[queries.rows],
                "key_times": bias.key_times[keys.rows],
            }
        problem = AttentionProblem(
            offsets=keys.offsets, query_offsets=queries.offsets, max_length=case.max_length, part=part,
            bias=dataclasses.replace(bias, **{"query_times": None, "key_times": None, **times}), **settings,
        )  # fmt: skip
        yield queries, keys, problem


def run(
    case: Case,
    dtype: torch.dtype,
    implementation: str,
    settings: dict[str, Any],
    stretches: int = STRETCHES,
    device: torch.device = torch.device("cpu"),
) -> dict[str, Tensor]:
    """Output and gradients out of all pairs of stretches."""

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    def on_device(problem: AttentionProblem) -> AttentionProblem:
        bias, part = problem.bias, problem.part
        return dataclasses.replace(
            problem,
            offsets=moved(problem.offsets),
            query_offsets=moved(problem.query_offsets),
            part=AttentionPart(*(moved(getattr(part, f.name)) for f in dataclasses.fields(AttentionPart))),
            bias=dataclasses.replace(
                bias, **{name: moved(getattr(bias, name)) for name in ("query_times", "key_times")}
            ),
        )

    q, k, v = (x.to(device) for x in case.qkv(case.projection.to(dtype)))
    tables = {
        name: None if table is None else table.to(device, dtype)
        for name, table in (("position", case.bias.position), ("time", case.bias.time))
    }
    bias = dataclasses.replace(case.bias, **tables)
    wide = torch.promote_types(dtype, torch.float32)
    d_out = case.d_out.to(device, dtype)
    out = torch.zeros(d_out.shape, dtype=wide, device=device)
    lse = None
    if settings["activation"] == "softmax":
        lse = torch.full((case.heads, d_out.shape[0]), -math.inf, dtype=wide, device=device)
    every = [
        (queries.rows.to(device), keys.rows.to(device), on_device(problem))
        for queries, keys, problem in pairs(case, bias, settings, stretches)
    ]
    for rows, keys, problem in every:
        part = attend_part(q[rows], k[keys], v[keys], problem, implementation)
        assert part[0].dtype == dtype
        so_far = (out[rows], None if lse is None else lse[:, rows])
        out[rows], sums = add_part(so_far, part)
        if lse is not None:
            lse[:, rows] = sums
    results = {"out": out.to(dtype)}
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    d_tables = {name: torch.zeros_like(x) for name, x in tables.items() if x is not None}
    for rows, keys, problem in every:
        whole = (None, None) if lse is None else (results["out"][rows], lse[:, rows].contiguous())
        found = attend_part_backward(d_out[rows], *whole, q[rows], k[keys], v[keys], problem, implementation)
        for sums, at, gradient in zip((d_q, d_k, d_v), (rows, keys, keys), found):
            sums[at] += gradient
        for name, gradient in zip(("position", "time"), found[3:]):
            assert (gradient is None) == (tables[name] is None)
            if gradient is not None:
                d_tables[name] += gradient
    gradients = {"d_q": d_q, "d_k": d_k, "d_v": d_v, **d_tables}
    return results | {name: x.to(dtype) for name, x in gradients.items()}


def exact(case: Case, settings: dict[str, Any], factors: list[Tensor] | None) -> dict[str, Tensor]:
    """The same of whole sequences, by the definition."""
    leaves = {
        name: x.double().requires_grad_() for name, x in zip(("d_q", "d_k", "d_v"), case.qkv(case.projection))
    }
    leaves |= {
        name: table.double().requires_grad_()
        for name, table in (("position", case.bias.position), ("time", case.bias.time))
        if table is not None
    }
    bias = dataclasses.replace(case.bias, **{name: leaves.get(name) for name in ("position", "time")})
    kept = {
        name: value
        for name, value in settings.items()
        if name.partition("_")[0] not in ("dropout", "deterministic")
    }
    q, k, v = (leaves[name] for name in ("d_q", "d_k", "d_v"))
    out = specification(q, k, v, case.offsets, bias=bias, factors=factors, **kept)
    out.backward(case.d_out.double())
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def check(case: Case, dtype: torch.dtype, settings: dict[str, Any], *arguments: Any, stretches: int) -> None:
    """Within the bound on one computation's rounding, plus that of a sum of so many parts."""
    factors = dropout_factors(case) if settings["dropout"] else None
    bias = dataclasses.replace(
        case.bias,
        **{
            name: None if getattr(case.bias, name) is None else getattr(case.bias, name).to(dtype).float()
            for name in ("position", "time")
        },
    )
    case = dataclasses.replace(
        case,
        projection=case.projection.to(dtype).float(),
        d_out=case.d_out.to(dtype).float(),
        bias=bias,
    )
    found = run(case, dtype, arguments[0], settings, stretches, *arguments[1:])
    want, allowed = analysed(lambda: exact(case, settings, factors), dtype)
    # each part is rounded when it is written: parts of a number may be larger than it, at most by the largest of all
    parts = {
        name: float(growth(stretches)) * UNIT[dtype] * value.abs().amax() if value.numel() else 0.0
        for name, value in want.items()
    }
    allowed = {name: value + parts[name] for name, value in allowed.items()}
    assert_within(found, want, allowed, dtype)


def settings_of(activation: str, causal: bool = True, dropout: float = 0.0) -> dict[str, Any]:
    return {
        "activation": activation, "divisor": 30.0, "scale": 0.4, "mask": AttentionMask(causal=causal),
        "dropout": dropout, "dropout_key": KEY,
    }  # fmt: skip


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_parts_add_up(activation: str, causal: bool, dropout: float, implementation: str) -> None:
    case = make_case(LENGTHS, 2, 8, 12, "both" if causal else "time")
    check(
        case,
        torch.float64,
        settings_of(activation, causal, dropout),
        implementation,
        stretches=STRETCHES,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_blocks_of_rows_and_lower_precisions(activation: str, dtype: torch.dtype) -> None:
    """Long stretches, which are cut into blocks of rows."""
    case = make_case((150, 3), 2, 8, 8)
    check(case, dtype, settings_of(activation, dropout=DROPOUT), "blocked", stretches=2)


@pytest.mark.parametrize(
    ("activation", "causal", "dtype", "bias", "dropout"),
    [
        ("silu", True, torch.float32, "both", DROPOUT),
        ("softmax", True, torch.float32, "both", DROPOUT),
        ("silu", True, torch.float32, "none", 0.0),
        ("softmax", False, torch.bfloat16, "time", DROPOUT),
        ("silu", False, torch.float32, "time", 0.0),
    ],
)
def test_triton(
    activation: str, causal: bool, dtype: torch.dtype, bias: str, dropout: float, device: torch.device
) -> None:
    """Deterministic, and without a bias also in the pass that adds d_q up atomically."""
    lengths = (45, 0, 1, 70) if device.type == "cpu" else (300, 0, 1, 640)
    case = make_case(lengths, 2, 16, 24, bias)
    for deterministic in (True, False) if bias == "none" else (True,):
        settings = settings_of(activation, causal, dropout) | {"deterministic": deterministic}
        check(case, dtype, settings, "triton", device, stretches=2)


def test_nobody_and_no_keys() -> None:
    """A row without a key here has no output, and no weight among the parts."""
    none, one = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 2])
    q = torch.randn(2, 1, 4)
    for implementation in ("blocked", "reference"):
        for activation in ("silu", "softmax"):
            problem = AttentionProblem(
                offsets=torch.tensor([0, 0]), query_offsets=one, max_length=8, divisor=3.0,
                activation=activation, part=AttentionPart(none + 4, none, none),  # type: ignore[arg-type]
            )  # fmt: skip
            out, lse = attend_part(q, q[:0], q[:0], problem, implementation)
            assert not out.any() and (lse is None) == (activation == "silu")
            with torch.no_grad():
                whole = (None, None) if lse is None else (out, lse + 1.0)
                gradients = attend_part_backward(q, *whole, q, q[:0], q[:0], problem, implementation)
            assert [x.shape[0] for x in gradients[:3] if x is not None] == [2, 0, 0]
            assert not any(x.any() for x in gradients if x is not None)
            assert lse is None or bool((lse == -math.inf).all())
            total, sums = add_part((torch.ones(2, 1, 4), None if lse is None else lse + 0.0), (out, lse))
            assert bool(total.isfinite().all()) and (sums is None or bool((sums == -math.inf).all()))


def problem(**changes: Any) -> AttentionProblem:
    """Rows 4 to 6 of a sequence against its rows 0 to 3."""
    start = torch.tensor([0])
    arguments = {
        "offsets": torch.tensor([0, 4]), "query_offsets": torch.tensor([0, 3]), "max_length": 8, "divisor": 8.0,
        "part": AttentionPart(start + 4, start, start),
    }  # fmt: skip
    return AttentionProblem(**(arguments | changes))


START = torch.tensor([0])
WRONG = {
    "needs part and query_offsets": problem(part=None),
    "without a window": problem(mask=AttentionMask(window=3)),
    r"part.query_starts must be \(1,\) int64": problem(part=AttentionPart(START.int(), START, START)),
    "which 4 doesn't divide": problem(part=AttentionPart(START + 8, START + 2, START)),
    "before its keys at 8": problem(part=AttentionPart(START + 4, START + 8, START)),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_calls_are_one_sentence(sentence: str) -> None:
    q, k = torch.randn(3, 1, 4), torch.randn(4, 1, 4)
    with pytest.raises(ValueError, match=sentence) as caught:
        attend_part(q, k, k, WRONG[sentence])
    assert "\n" not in str(caught.value)


def test_choice() -> None:
    q, k = torch.randn(3, 1, 4).double(), torch.randn(4, 1, 4).double()
    with pytest.raises(CannotRun, match="float16 or bfloat16"):
        attend_part(q, k, k, problem(), "triton")
    with pytest.raises(ValueError, match="one of 'triton', 'blocked', 'reference'"):
        attend_part(q, k, k, problem(), "cpp")
