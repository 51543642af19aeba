"""The cross form (queries for the last rows against all keys) and the attention as a traced operator."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gr_kernels import AttentionMask, RelativeBias, explain, hstu_attention, native
from gr_kernels.hstu_attention.problem import Problem as AttentionProblem, TimeBuckets
from gr_kernels.hstu_attention.schema import flatten, unflatten
from tests.kernels.attention_problems import (
    DROPOUT,
    KEY,
    Case,
    assert_close_to_specification,
    make_case,
    run,
)
from tests.precision import tolerance

LENGTHS = (12, 0, 1, 30, 23)
QUERIES = (5, 0, 1, 30, 0)
TARGETS = torch.tensor([3, 0, 0, 6, 2])
MASKS = {
    "causal": AttentionMask(),
    "full": AttentionMask(causal=False),
    "all": AttentionMask(window=6, full_rows=3, contexts=3, targets=TARGETS),
}

needs_cpp = pytest.mark.skipif(
    not native.available(), reason="gr_kernels was built without its C++ operators"
)
IMPLEMENTATIONS = ["blocked", pytest.param("cpp", marks=needs_cpp)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize("name", MASKS)
def test_cached_equals_full(name: str, activation: str, dropout: float) -> None:
    """Rows computed late, against keys computed before, are what the whole sequence gives; dropout too."""
    mask = MASKS[name]
    case = make_case(LENGTHS, 2, 8, 12, "both" if mask.causal else "time")
    settings = {
        "mask": mask, "activation": activation, "divisor": 30.0, "scale": 0.4, "dropout": dropout, "dropout_key": KEY
    }  # fmt: skip
    late = dataclasses.replace(case, query_lengths=QUERIES)
    rows = late.query_rows()
    full = run(case, torch.float64, "blocked", **settings)["out"][rows]
    cached = run(late, torch.float64, "blocked", **settings)["out"]
    torch.testing.assert_close(cached, full, **tolerance(64, stages=4, dtype=torch.float64, size=100.0))


def test_row_by_row_equals_full() -> None:
    """A sequence grown by one row at a time, each attending to the cache so far."""
    case = make_case((17,), 2, 8, 8)
    full = run(case, torch.float64, "blocked", divisor=17.0)["out"]
    assert case.bias.position is not None and case.bias.time is not None
    q, k, v = case.qkv(case.projection.double())
    for n in range(1, 18):
        bias = dataclasses.replace(
            case.bias,
            position=case.bias.position.double(),
            time=case.bias.time.double(),
            query_times=case.bias.query_times[n - 1 : n],
            key_times=case.bias.key_times[:n],
        )
        out = hstu_attention(
            q[n - 1 : n], k[:n], v[:n], torch.tensor([0, n]), query_offsets=torch.tensor([0, 1]),
            max_length=17, divisor=17.0, bias=bias,
        )  # fmt: skip
        torch.testing.assert_close(
            out[0], full[n - 1], **tolerance(64, stages=4, dtype=torch.float64, size=100.0)
        )


@pytest.mark.parametrize(
    ("lengths", "queries"), [((0,), (0,)), ((5,), (0,)), ((1,), (1,)), ((3, 0, 4), (0, 0, 4))]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_and_single_rows(
    implementation: str, lengths: tuple[int, ...], queries: tuple[int, ...]
) -> None:
    masks = [AttentionMask(), AttentionMask(targets=torch.tensor(lengths)), AttentionMask(causal=False)]
    for activation, mask in itertools.product(("silu", "softmax"), masks):
        case = make_case(lengths, 2, 8, 4, "both" if mask.causal else "time")
        case = dataclasses.replace(case, query_lengths=queries)
        settings = {"activation": activation, "divisor": 3.0, "mask": mask}
        assert_close_to_specification(case, implementation, None, settings)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_outside_are_never_read(implementation: str) -> None:
    """Queries and keys start late and end early in poisoned tensors, by different numbers of rows."""
    case = dataclasses.replace(make_case((11, 0, 6), 2, 8, 4), query_lengths=(4, 0, 6))
    rows = case.query_rows()
    q, k, v = (x.detach() for x in case.qkv(case.projection))
    assert case.bias.query_times is not None and case.bias.key_times is not None
    bias = dataclasses.replace(case.bias, query_times=case.bias.query_times[rows])
    query_offsets = case.form()["query_offsets"]
    pad = torch.nn.functional.pad
    poisoned_bias = dataclasses.replace(
        bias,
        query_times=pad(bias.query_times, (2, 3), value=2**61),
        key_times=pad(bias.key_times, (4, 1), value=-7),
    )
    results = []
    for before, after, key_before, key_after, some_bias in ((0, 0, 0, 0, bias), (2, 3, 4, 1, poisoned_bias)):
        leaves = [
            pad(q, (0, 0, 0, 0, before, after), value=math.nan),
            *(pad(x, (0, 0, 0, 0, key_before, key_after), value=math.nan) for x in (k, v)),
        ]
        leaves = [x.requires_grad_() for x in leaves]
        out = hstu_attention(
            *leaves, case.offsets + key_before, query_offsets=query_offsets + before, max_length=11, divisor=9.0,
            bias=some_bias, mask=AttentionMask(targets=torch.tensor([2, 0, 1])), implementation=implementation,
        )  # fmt: skip
        d_out = pad(case.d_out[rows], (0, 0, 0, 0, before, after), value=math.nan)
        gradients = torch.autograd.grad(out, leaves, d_out)
        found = []
        for x, first, last in zip(
            (out, *gradients), (before, before, key_before, key_before), (after, after, key_after, key_after)
        ):
            assert not x[:first].any() and not x[x.shape[0] - last :].any()
            found.append(x[first : x.shape[0] - last])
        results.append(found)
    for clean, padded in zip(*results):
        assert torch.equal(clean, padded)


def call(**changes: Any) -> dict[str, Any]:
    q, kv = torch.randn(5, 2, 4), torch.randn(10, 2, 4)
    arguments = {
        "q_THQ": q, "k_SHQ": kv, "v_SHV": kv, "offsets_B1": torch.tensor([0, 4, 10]), "max_length": 6, "divisor": 6.0,
        "query_offsets": torch.tensor([0, 2, 5]),
    }  # fmt: skip
    return arguments | changes


TIMES = torch.arange(10)
WRONG_CALLS = {
    "k must have q's heads and width": call(k_SHQ=torch.randn(10, 2, 5)),
    "v must have k's rows and heads": call(v_SHV=torch.randn(5, 2, 4)),
    r"query_offsets must be \(B \+ 1,\) int64": call(query_offsets=torch.tensor([0, 2, 5]).int()),
    "query_offsets must have offsets' 3 entries": call(query_offsets=torch.tensor([0, 5])),
    "query_offsets go from 0 to 6": call(query_offsets=torch.tensor([0, 2, 6])),
    "query_offsets must not fall": call(query_offsets=torch.tensor([0, 3, 2])),
    "sequence 0 has 5 query rows": call(query_offsets=torch.tensor([0, 5, 5])),
    "outside the 10 rows of k": call(offsets_B1=torch.tensor([0, 4, 11])),
    r"bias.query_times must be \(5,\)": call(
        bias=RelativeBias(time=torch.zeros(129), query_times=TIMES, key_times=TIMES)
    ),
    r"bias.key_times must be \(10,\)": call(
        bias=RelativeBias(time=torch.zeros(129), query_times=TIMES[:5], key_times=TIMES[:5])
    ),
}


@pytest.mark.parametrize("sentence", WRONG_CALLS)
def test_wrong_calls_are_one_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        hstu_attention(**WRONG_CALLS[sentence])
    assert str(caught.value).startswith("hstu_attention: ") and "\n" not in str(caught.value)


def test_compiled_code_says_what_it_does_not_take() -> None:
    x = torch.randn(10, 1, 4)
    arguments = {"max_length": 6, "divisor": 6.0}
    offsets = torch.tensor([0, 4, 10])
    masks = {
        "without a window": AttentionMask(window=2),
        "without contexts": AttentionMask(contexts=2, targets=torch.tensor([1, 2])),
    }
    for words, mask in masks.items():
        explanation = explain(hstu_attention, x, x, x, offsets, mask=mask, **arguments)
        assert explanation.startswith("blocked") and words in explanation and "\n" not in explanation
        with pytest.raises(ValueError, match=words):
            hstu_attention(x, x, x, offsets, mask=mask, implementation="cpp", **arguments)


@needs_cpp
def test_compiled_code_takes_targets_and_the_cross_form() -> None:
    x = torch.randn(10, 1, 4)
    settings = {"mask": AttentionMask(targets=torch.tensor([1, 2])), "query_offsets": torch.tensor([0, 1, 3])}
    explanation = explain(
        hstu_attention, x[:3], x, x, torch.tensor([0, 4, 10]), max_length=6, divisor=6.0, **settings
    )
    assert explanation.startswith("cpp")


@needs_cpp
@pytest.mark.parametrize(
    ("sentence", "changes"),
    {
        "offsets must ascend within the 10 rows": {"offsets": [0, 4, 11]},
        "offsets must ascend within": {"offsets": [4, 0, 10]},
        "offsets must ascend": {"offsets": [-1, 4, 10]},
        "offsets must be neighbouring int64, one number more": {"offsets": []},
        "query_offsets must ascend within the 5 rows": {"query_offsets": [0, 2, 6]},
        "query_offsets must be neighbouring int64": {"query_offsets": [0, 5]},
        "sequence 0 has 5 query rows, but they are the last of its 4": {"query_offsets": [0, 5, 5]},
        "sequence 1 has 6 rows, of which 7 can't be targets": {"targets": [0, 7]},
        "sequence 0 has 4 rows, of which -1 can't be targets": {"targets": [-1, 0]},
        "targets must be neighbouring int64, one number a sequence": {"targets": [1]},
        "sequence 1 has 6 rows, and the position bias 5 entries": {"position": torch.zeros(5)},
    }.items(),
)
def test_compiled_code_reads_no_row_that_is_not_there(sentence: str, changes: dict[str, Any]) -> None:
    """Of a traced graph nobody has looked at the numbers before."""
    q, kv = torch.randn(5, 2, 4), torch.randn(10, 2, 4)
    given = {"offsets": [0, 4, 10], "query_offsets": [0, 2, 5], "targets": [1, 2]} | changes
    rows = {
        name: torch.tensor(given[name], dtype=torch.int64) for name in ("offsets", "query_offsets", "targets")
    }
    arguments = (q, kv, kv, *rows.values(), given.get("position"), None, None, None, None)
    settings = (1.0, 6.0, False, True, 0.0, 0)
    with pytest.raises(ValueError, match=sentence):
        torch.ops.gr_kernels.hstu_attention(*arguments, *settings)
    with pytest.raises(ValueError, match=sentence):
        torch.ops.gr_kernels.hstu_attention_backward(torch.randn(5, 2, 4), *arguments, *settings)


def test_problems_survive_flattening() -> None:
    """Behind the operator's border a problem is what it was, a key of 64 bits included."""
    case = make_case((3, 2), bias="both")
    bias = dataclasses.replace(case.bias, buckets=TimeBuckets("sqrt", 129, 2.5))
    problem = AttentionProblem(
        offsets=case.offsets, max_length=3, divisor=7.0, scale=0.3, activation="softmax", bias=bias,
        mask=AttentionMask(True, 5, 2, 1, torch.tensor([1, 0])), dropout=0.25, dropout_key=2**64 - 3,
        query_offsets=torch.tensor([0, 1, 2]), order=torch.tensor([1, 0]), deterministic=True,
    )  # fmt: skip
    flat = flatten(problem)
    assert all(-(2**63) <= x < 2**63 for x in flat if isinstance(x, int))
    again = unflatten(*flat)
    assert vars(again.mask) == vars(problem.mask) and vars(again.bias) == vars(problem.bias)
    for name, value in vars(problem).items():
        if name not in ("mask", "bias"):
            assert getattr(again, name) is value or getattr(again, name) == value, name


@dataclasses.dataclass
class Call:
    """A call whose lengths change from batch to batch, and its leaves."""

    case: Case
    masked: bool
    cross: bool
    implementation: str
    activation: str = "silu"
    device: str = "cpu"

    def __call__(self, leaves: list[Tensor], tensors: dict[str, Tensor], max_length: int, key: int) -> Tensor:
        q, k, v, position, time = leaves
        targets = tensors["targets"] if self.masked else None
        mask = AttentionMask(targets=targets)
        if self.masked and self.implementation != "cpp":
            mask = AttentionMask(window=4, contexts=2, targets=targets)
        return hstu_attention(
            q, k, v, tensors["offsets"], query_offsets=tensors["query_offsets"] if self.cross else None,
            max_length=max_length, divisor=9.0, scale=0.5, mask=mask, dropout=0.2, dropout_key=key,
            bias=RelativeBias(position, time, tensors["query_times"], tensors["key_times"]),
            order=tensors["order"], activation=self.activation, implementation=self.implementation,  # type: ignore[arg-type]
        )  # fmt: skip

    def inputs(self, lengths: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
        case = make_case(lengths, 2, 8, 4, "both", max_length=64)
        if self.cross:
            case = dataclasses.replace(case, query_lengths=tuple(n // 2 for n in lengths))
        leaves = [*case.qkv(case.projection), case.bias.position, case.bias.time]
        assert case.bias.query_times is not None and case.bias.key_times is not None
        tensors = {
            "offsets": case.offsets,
            "targets": torch.tensor([n // 3 for n in lengths]),
            "order": torch.tensor(lengths).argsort(descending=True),
            "query_times": case.bias.query_times[case.query_rows()],
            "key_times": case.bias.key_times,
            **case.form(),
        }
        at_device = {name: x.to(self.device) for name, x in tensors.items()}
        copies = [x.detach().to(self.device, copy=True) for x in leaves if x is not None]
        return [x.requires_grad_() for x in copies], at_device


def results(function: Any, leaves: list[Tensor], *rest: Any) -> list[Tensor]:
    out = function(leaves, *rest)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize(
    ("masked", "cross", "implementation", "activation"),
    [
        (True, False, "blocked", "silu"),
        (False, True, "blocked", "softmax"),
        (False, False, "auto", "silu"),
        pytest.param(True, True, "cpp", "silu", marks=needs_cpp),
        pytest.param(True, False, "cpp", "softmax", marks=needs_cpp),
        (True, False, "triton", "silu"),
        (False, True, "triton", "softmax"),
    ],
)
def test_compiles_to_one_graph(
    masked: bool, cross: bool, implementation: str, activation: str, request: pytest.FixtureRequest
) -> None:
    """torch.compile without a break, forward and backward, with other lengths, rows and keys at every call."""
    torch._dynamo.reset()
    place = str(request.getfixturevalue("device")) if implementation == "triton" else "cpu"
    eager = Call(make_case(), masked, cross, implementation, activation, place)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    for lengths, key in (((5, 0, 9), 3), ((20, 1, 2), 2**63 + 5), ((4, 17, 9), 2**64 - 1)):
        leaves, tensors = eager.inputs(lengths)
        arguments = (leaves, tensors, max(lengths), key)
        for found, expected in zip(results(compiled, *arguments), results(eager, *arguments)):
            assert torch.equal(found, expected)


FIRST_USE = """
import sys
import torch
from gr_kernels import RelativeBias, hstu_attention

for implementation, device in zip(sys.argv[1::2], sys.argv[2::2]):
    offsets = torch.tensor([0, 3, 8], device=device)
    times = torch.arange(8, device=device) ** 5

    def attend(x, position, time):
        return hstu_attention(x, x, x, offsets, max_length=5, divisor=5.0, implementation=implementation,
                              bias=RelativeBias(position, time, times, times))

    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((8, 2, 16), (5,), (129,))]
    results = []
    for function in (torch.compile(attend, fullgraph=True, backend="aot_eager"), attend):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *results)), implementation
    print(implementation)
"""


def test_compiles_before_anything_ran(checkout: Path, request: pytest.FixtureRequest) -> None:
    """In a fresh process torch.compile meets every implementation first: its operators are registered while it
    traces."""
    calls = ["blocked", "cpu"]
    if native.available():
        calls += ["cpp", "cpu"]
    if importlib.util.find_spec("triton") is not None:
        calls += ["triton", str(request.getfixturevalue("device"))]
    environment = os.environ | {"PYTHONPATH": f"{checkout}:{checkout / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, *calls], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == calls[::2]


def test_exports() -> None:
    """torch.export of a module with a masked attention gives a program with one operator, and the same numbers."""
    attend = Call(make_case(), True, False, "blocked")

    class Attention(torch.nn.Module):
        def forward(self, leaves: list[Tensor], tensors: dict[str, Tensor]) -> Tensor:
            return attend(leaves, tensors, 20, 5)

    leaves, tensors = attend.inputs((20, 1, 2))
    program = torch.export.export(Attention(), (leaves, tensors))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    operators = [str(target) for target in called if isinstance(target, torch._ops.OpOverload)]
    assert operators == ["gr_kernels.hstu_attention_blocked.default"]
    assert torch.equal(program.module()(leaves, tensors), attend(leaves, tensors, 20, 5))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_operators_are_registered_as_they_behave(activation: str, cross: bool) -> None:
    """Schema, fake shapes, autograd registration and dispatch."""
    attend = Call(make_case(), True, cross, "blocked")
    leaves, tensors = attend.inputs((5, 0, 9))
    attend(leaves, tensors, 9, 3)  # the first use registers
    problem = AttentionProblem(
        offsets=tensors["offsets"], query_offsets=tensors.get("query_offsets"), max_length=9, divisor=3.0,
        activation=activation, mask=AttentionMask(window=4, targets=tensors["targets"]),  # type: ignore[arg-type]
        bias=RelativeBias(leaves[3], leaves[4], tensors["query_times"], tensors["key_times"]), order=tensors["order"],
    )  # fmt: skip
    arguments = (*leaves[:3], *flatten(problem))
    torch.library.opcheck(torch.ops.gr_kernels.hstu_attention_blocked.default, arguments)
    bare = AttentionProblem(offsets=tensors["offsets"], max_length=9, divisor=3.0)
    q, k, v = (x.detach() for x in leaves[:3])
    if not cross:
        torch.library.opcheck(
            torch.ops.gr_kernels.hstu_attention_blocked_backward.default,
            (torch.randn(14, 2, 4), None, None, q, k, v, *flatten(bare)),
        )


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(4, 1, 4, requires_grad=True)
    out = hstu_attention(x, x, x, torch.tensor([0, 4]), max_length=4, divisor=4.0, implementation="blocked")
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.skipif(not native.available(), reason="gr_kernels was built without its C++ operators")
def test_thresholds_operator() -> None:
    x = torch.randn(4, 1, 4)
    hstu_attention(x, x, x, torch.tensor([0, 4]), max_length=4, divisor=4.0, implementation="cpp")
    torch.library.opcheck(torch.ops.gr_kernels.time_thresholds.default, ("log", 129, 0.301))
    assert torch.equal(torch.ops.gr_kernels.time_thresholds("log", 129, 0.301), TimeBuckets().thresholds())


def test_deterministic_is_the_argument_or_torchs() -> None:
    """Both give equal bits on CPU; that they reach the operator is seen in its arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.gr_kernels.hstu_attention_blocked.default:
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    x = torch.randn(6, 1, 4)
    call = {"max_length": 6, "divisor": 6.0, "implementation": "blocked"}
    offsets = torch.tensor([0, 6])
    hstu_attention(x, x, x, offsets, **call)
    with Watch():
        for asked, everywhere in itertools.product((None, True, False), (True, False)):
            torch.set_deterministic_debug_mode("error" if everywhere else "default")
            hstu_attention(x, x, x, offsets, deterministic=asked, **call)
            assert seen[-1] == (everywhere if asked is None else asked)
