"""The attention operator: both implementations against the float64 specification, gradients included.

An implementation may be at most twice (forward) or five times (gradients) as far from float64 as plain PyTorch in
float32 is. Inputs are of unit scale.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gr_kernels import AttentionMask, RelativeBias, TimeBuckets, explain, hstu_attention, native
from gr_kernels.hstu_attention import blocked
from tests.kernels.attention_problems import (
    LENGTHS,
    assert_close_to_specification,
    dropout_factors,
    make_case,
    philox,
    run,
)
from tests.precision import analysed, assert_within

needs_cpp = pytest.mark.skipif(
    not native.available(), reason="gr_kernels was built without its C++ operators"
)
IMPLEMENTATIONS = [
    pytest.param("cpp", marks=needs_cpp),
    "blocked",
    "reference",
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_package_exports_functions() -> None:
    """A folder and its function share a name; from the package it is the function, whoever imported the folder."""
    import gr_kernels
    from gr_kernels.hstu_attention import op

    assert gr_kernels.hstu_attention is op.hstu_attention
    assert "explain" in dir(gr_kernels) and not hasattr(gr_kernels, "no_such_operator")


def test_philox_known_answers() -> None:
    """The generator's published test vectors."""
    answers = philox(0, np.zeros(4, dtype=np.uint64)).tolist()
    assert answers == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counter = np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], dtype=np.uint64)
    assert philox(0x299F31D0A4093822, counter).tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


# (heads, Q, V, dropout): every width and number of heads with and without dropout over the list.
SHAPES = [
    (1, 50, 50, False),
    (2, 25, 25, True),
    (4, 8, 64, False),
    (1, 64, 8, True),
    (2, 50, 25, False),
    (4, 25, 50, True),
]
BIASES = [(True, name) for name in ("none", "position", "time", "both")] + [(False, "none"), (False, "time")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("causal", "bias"), BIASES)
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_matches_specification(activation: str, causal: bool, bias: str, implementation: str) -> None:
    for seed, (heads, query_width, value_width, dropout) in enumerate(SHAPES):
        case = make_case(LENGTHS, heads, query_width, value_width, bias, seed)
        factors = dropout_factors(case) if dropout else None
        settings = {
            "activation": activation,
            "mask": AttentionMask(causal=causal),
            "scale": query_width**-0.5,
            "divisor": 50.0,
        }
        assert_close_to_specification(case, implementation, factors, settings)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_long_sequence(activation: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,500 rows; the reference in many blocks of rows."""
    monkeypatch.setattr(blocked, "BLOCK_SCORES", 2**18)
    case = make_case((1500, 40, 90), 1, 32, 16, "both")
    settings = {"activation": activation, "scale": 0.2, "divisor": 1500.0}
    assert_close_to_specification(case, implementation, None, settings)


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), (1,), (0, 1, 0)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_and_single_rows(lengths: tuple[int, ...], implementation: str) -> None:
    for activation in ("silu", "softmax"):
        case = make_case(lengths, 2, 8, 8, "both")
        settings = {"activation": activation, "divisor": 3.0}
        assert_close_to_specification(case, implementation, None, settings)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_sequences(implementation: str) -> None:
    """An empty batch is differentiable like any other."""
    results = run(make_case((), 2, 8, 4, "both"), torch.float32, implementation, divisor=3.0)
    assert results["out"].shape == (0, 2, 4) and results["projection"].shape == (0, 48)
    assert not results["position"].any() and not results["time"].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_outside_are_never_read(implementation: str) -> None:
    """Sequences that start late and end early in a poisoned batch: same results, zeros outside."""
    case = make_case((50, 0, 31), 2, 25, 8)
    before, after = 5, 9
    poisoned_bias = dataclasses.replace(
        case.bias,
        query_times=torch.cat(
            [torch.full((before,), -1), case.bias.query_times, torch.full((after,), 2**62)]
        ),
        key_times=torch.cat(
            [torch.full((before,), 2**62), case.bias.key_times, torch.full((after,), -(2**62))]
        ),
    )
    poisoned = dataclasses.replace(
        case,
        projection=torch.nn.functional.pad(case.projection, (0, 0, before, after), value=math.nan),
        d_out=torch.nn.functional.pad(case.d_out, (0, 0, 0, 0, before, after), value=math.nan),
        offsets=case.offsets + before,
        bias=poisoned_bias,
    )
    for activation in ("silu", "softmax"):
        clean = run(case, torch.float32, implementation, activation=activation, divisor=20.0)
        found = run(poisoned, torch.float32, implementation, activation=activation, divisor=20.0)
        for name in ("out", "projection"):
            inside = found[name][before:-after]
            assert torch.equal(inside, clean[name])
            assert not found[name][:before].any() and not found[name][-after:].any()
        for name in ("position", "time"):
            assert torch.equal(found[name], clean[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_in_its_sequence(implementation: str) -> None:
    case = make_case((20, 30, 10), 1, 8, 8)
    rows = slice(20, 50)
    case.projection[25] = math.nan
    for activation in ("silu", "softmax"):
        found = run(case, torch.float32, implementation, activation=activation, divisor=20.0)
        finite = found["out"].flatten(1).isfinite().all(1)
        assert finite[:20].all() and finite[50:].all()
        assert not finite[25:50].any()  # rows from the NaN on see it, and it must show
        outside = torch.cat([found["projection"][: rows.start], found["projection"][rows.stop :]])
        assert outside.isfinite().all()


@pytest.mark.parametrize("activation", ["silu", "softmax"])
@needs_cpp
def test_companions_change_no_bit(activation: str) -> None:
    case = make_case(LENGTHS, 2, 50, 25)
    together = run(case, torch.float32, "cpp", activation=activation, divisor=200.0)
    for begin, end in itertools.pairwise(case.offsets.tolist()):
        times = {name: getattr(case.bias, name)[begin:end] for name in ("query_times", "key_times")}
        alone = dataclasses.replace(
            case,
            projection=case.projection[begin:end],
            d_out=case.d_out[begin:end],
            offsets=torch.tensor([0, end - begin]),
            bias=dataclasses.replace(case.bias, **times),
        )
        found = run(alone, torch.float32, "cpp", activation=activation, divisor=200.0)
        for name in ("out", "projection"):
            assert torch.equal(found[name], together[name][begin:end])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_companions_change_rounding_at_most(implementation: str) -> None:
    """The same sequence among others of nearly its length, where the reference pads."""
    case = make_case((90, 100, 97), 1, 16, 16, "none")
    exact, allowed = analysed(lambda: run(case, torch.float64, "specification", divisor=50.0), torch.float32)
    assert_within(run(case, torch.float32, implementation, divisor=50.0), exact, allowed)
    alone = dataclasses.replace(
        case, projection=case.projection[:90], d_out=case.d_out[:90], offsets=torch.tensor([0, 90])
    )
    found = run(alone, torch.float32, implementation, divisor=50.0)
    first, bound = ({name: value[:90] for name, value in x.items()} for x in (exact, allowed))
    assert_within(found, first, bound)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@needs_cpp
def test_runs_and_threads_change_no_bit(dropout: float) -> None:
    case = make_case(LENGTHS, 2, 50, 50)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, "cpp", divisor=200.0, dropout=dropout, dropout_key=9))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradcheck_in_double(activation: str, dropout: float) -> None:
    case = make_case((3, 0, 1, 4), 2, 2, 2)
    position, time = case.bias.position, case.bias.time
    assert position is not None and time is not None

    def attend(projection: Tensor, position: Tensor, time: Tensor) -> Tensor:
        bias = dataclasses.replace(case.bias, position=position, time=time)
        q, k, v = case.qkv(projection)
        return hstu_attention(
            q, k, v, case.offsets, max_length=4, divisor=2.0, scale=0.7, activation=activation, bias=bias,  # type: ignore[arg-type]
            dropout=dropout, dropout_key=4, implementation="blocked",
        )  # fmt: skip

    leaves = [x.double().requires_grad_() for x in (case.projection, position, time)]
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_keeps_the_mean_and_moves_with_the_key(implementation: str) -> None:
    case = make_case((200, 150), 2, 8, 8, "none")
    ones = dataclasses.replace(case, projection=torch.ones_like(case.projection))
    plain = run(ones, torch.float32, implementation, activation="softmax", divisor=1.0)["out"]
    first, again, other = (
        run(
            ones,
            torch.float32,
            implementation,
            activation="softmax",
            divisor=1.0,
            dropout=0.5,
            dropout_key=key,
        )["out"]
        for key in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Every output is the mean of n kept-or-dropped weights: about 350 x 2 draws of mean 1.
    assert abs(float(first.mean() / plain.mean()) - 1) < 0.05


def bucket_case(query_times: Tensor, key_times: Tensor, buckets: TimeBuckets, implementation: str) -> Tensor:
    """The buckets an implementation uses, read off its outputs: q = 0, v = identity, table[b] = b, no mask."""
    n = query_times.shape[0]
    zeros, identity = torch.zeros(n, 1, 4), torch.eye(n)[:, None, :]
    table = torch.arange(buckets.count, dtype=torch.float32)
    bias = RelativeBias(time=table, query_times=query_times, key_times=key_times, buckets=buckets)
    out = hstu_attention(
        zeros, zeros, identity, torch.tensor([0, n]), max_length=n, divisor=1.0, mask=AttentionMask(causal=False),
        bias=bias, implementation=implementation,
    )  # fmt: skip
    weights = torch.nn.functional.silu(table)
    halfway = (weights[1:] + weights[:-1]) / 2
    return torch.searchsorted(halfway, out[:, 0, :].contiguous())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "buckets",
    [TimeBuckets(), TimeBuckets("sqrt", 300, 3.7), TimeBuckets("log", 40, 0.05), TimeBuckets(count=1)],
)
def test_time_buckets_are_exact(buckets: TimeBuckets, implementation: str) -> None:
    """Around every threshold, with ties, unsorted and huge differences, in the 32-bit and the 64-bit range."""
    thresholds = buckets.thresholds()
    steps = torch.tensor([-1, 0, 1])
    for limit in (2**31 - 2, 2**31 - 1, 2**62, 2**63 - 2):
        near = (thresholds[:, None] + steps).flatten()
        near = near[(near >= 0) & (near <= limit)]
        key_times = torch.cat([near, torch.tensor([0, 0, 1, 2, limit])])
        key_times = key_times[torch.randperm(len(key_times), generator=torch.Generator().manual_seed(0))]
        query_times = torch.zeros_like(key_times)
        query_times[1::3] = 5
        found = bucket_case(query_times, key_times, buckets, implementation)
        dt = (query_times[:, None] - key_times).abs()
        expected = np.searchsorted(thresholds.numpy(), dt.numpy(), side="right")
        assert torch.equal(found, torch.from_numpy(expected))


def test_thresholds_are_the_logarithm() -> None:
    buckets = TimeBuckets()
    assert buckets.thresholds().shape == (128,) and bool((buckets.thresholds().diff() >= 0).all())
    assert buckets.thresholds()[:6].tolist() == [2, 2, 3, 4, 5, 7]
    dt = torch.from_numpy(np.random.default_rng(0).integers(0, 2**62, 100_000) >> np.arange(100_000) % 62)
    exact = dt.clamp_min(1).double().log() / 0.301
    clear = (exact - exact.round()).abs() > 1e-9  # where float64 can't be on the wrong side
    assert clear.sum() > 80_000
    expected = exact.floor().long().clamp_max(128)
    assert torch.equal(buckets.bucket(dt)[clear], expected[clear])
    assert torch.equal(buckets.bucket(-dt)[clear], expected[clear])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unsorted_times(implementation: str) -> None:
    case = make_case((80, 43), 1, 16, 16)
    assert case.bias.query_times is not None and case.bias.key_times is not None
    order = torch.randperm(123, generator=torch.Generator().manual_seed(1))
    times = {
        "query_times": case.bias.query_times[order],
        "key_times": case.bias.key_times[order.flip(0)] - 2**40,
    }
    shuffled = dataclasses.replace(case, bias=dataclasses.replace(case.bias, **times))
    assert_close_to_specification(shuffled, implementation, None, {"divisor": 50.0, "scale": 0.25})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_neither_overflow_nor_vanish(implementation: str) -> None:
    case = make_case((60,), 1, 8, 8, "position")
    case.projection.mul_(40.0)
    for activation in ("silu", "softmax"):
        settings = {"activation": activation, "divisor": 60.0}
        assert_close_to_specification(case, implementation, None, settings)


def test_strides_are_taken_as_they_come() -> None:
    """Slices, transposed heads and a last dimension with gaps give what contiguous copies give."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 70, 16, generator=generator)
    q, k = wide.transpose(0, 1)[..., :8], wide.transpose(0, 1)[..., 8:]
    v = torch.randn(70, 3, 20, generator=generator)[..., ::2]
    offsets = torch.tensor([0, 30, 70])
    for implementation in ("auto", "blocked"):
        strided = hstu_attention(q, k, v, offsets, max_length=40, divisor=9.0, implementation=implementation)
        dense = hstu_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), offsets, max_length=40, divisor=9.0,
            implementation=implementation,
        )  # fmt: skip
        assert torch.equal(strided, dense)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_order_of_work_changes_nothing(implementation: str) -> None:
    case = make_case((9, 0, 20, 3), 2, 8, 8)
    plain = run(case, torch.float32, implementation, divisor=9.0)
    ordered = run(case, torch.float32, implementation, divisor=9.0, order=torch.tensor([2, 3, 0, 1]))
    assert plain.keys() == ordered.keys()
    assert all(torch.equal(ordered[name], value) for name, value in plain.items())


def test_lower_precision_goes_to_the_reference() -> None:
    case = make_case((30, 12), 2, 16, 16, "none")
    q, k, v = case.qkv(case.projection)
    arguments = {"max_length": 30, "divisor": 30.0, "scale": 0.25}
    half = [x.bfloat16() for x in (q, k, v)]
    assert explain(hstu_attention, *half, case.offsets, **arguments).startswith("blocked")  # type: ignore[arg-type]
    out = hstu_attention(*half, case.offsets, **arguments)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    assert_close_to_specification(case, "auto", None, {"divisor": 30.0, "scale": 0.25}, torch.bfloat16)


@needs_cpp
def test_compiled_operator_traces() -> None:
    """Schema, fake shapes, autograd registration and dispatch as torch.compile uses them."""
    case = make_case((5, 0, 9), 2, 8, 4)
    q, k, v = (x.detach().requires_grad_() for x in case.qkv(case.projection))
    assert "cpp" in explain(hstu_attention, q, k, v, case.offsets, max_length=9, divisor=9.0)
    hstu_attention(q, k, v, case.offsets, max_length=9, divisor=9.0)
    bias = case.bias
    forms: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = [
        (q, bias.query_times, None, None),
        (q[4:9].detach().requires_grad_(), bias.query_times[4:9], torch.tensor([0, 1, 1, 5]), torch.tensor([2, 0, 3])),
    ]  # fmt: skip
    for softmax, (queries, times, query_offsets, targets) in itertools.product((False, True), forms):
        arguments = (queries, k, v, case.offsets, query_offsets, targets, bias.position, bias.time, times,
                     bias.key_times, bias.buckets.thresholds(), 0.5, 9.0, softmax, True, 0.0, 0)  # fmt: skip
        torch.library.opcheck(torch.ops.gr_kernels.hstu_attention.default, arguments)


ROWS = 10


def wrong(**changes: object) -> dict[str, object]:
    x = torch.randn(ROWS, 2, 4)
    call: dict[str, object] = {
        "q_THQ": x, "k_SHQ": x, "v_SHV": x, "offsets_B1": torch.tensor([0, 4, ROWS]), "max_length": 6, "divisor": 6.0
    }  # fmt: skip
    return call | changes


TIMES = torch.arange(ROWS)
WRONG_CALLS = {
    "q must have 3 dimensions": wrong(q_THQ=torch.randn(ROWS, 4)),
    "k must have q's shape": wrong(k_SHQ=torch.randn(ROWS, 2, 5)),
    "v must have q's rows and heads": wrong(v_SHV=torch.randn(ROWS, 1, 4)),
    "v is torch.float64": wrong(v_SHV=torch.randn(ROWS, 2, 4).double()),
    "q must be floating point": wrong(q_THQ=torch.ones(ROWS, 2, 4, dtype=torch.int64)),
    "offsets must be": wrong(offsets_B1=torch.tensor([0, 4, ROWS], dtype=torch.int32)),
    "outside the 10 rows": wrong(offsets_B1=torch.tensor([0, 4, ROWS + 1])),
    "offsets must not fall": wrong(offsets_B1=torch.tensor([0, 5, 4, ROWS])),
    "more than max_length 5": wrong(max_length=5),
    "activation is": wrong(activation="gelu"),
    "divisor must be positive": wrong(divisor=0.0),
    "dropout must be": wrong(dropout=1.0),
    "dropout_key must be": wrong(dropout_key=-1),
    "fewer than max_length": wrong(bias=RelativeBias(position=torch.zeros(5))),
    "causal attention only": wrong(
        bias=RelativeBias(position=torch.zeros(9)), mask=AttentionMask(causal=False)
    ),
    "must have 129 entries": wrong(
        bias=RelativeBias(time=torch.zeros(9), query_times=TIMES, key_times=TIMES)
    ),
    "needs bias.query_times": wrong(bias=RelativeBias(time=torch.zeros(129), key_times=TIMES)),
    "bias.key_times must be": wrong(
        bias=RelativeBias(time=torch.zeros(129), query_times=TIMES, key_times=TIMES.float())
    ),
    r"order must be \(2,\) int64, not \(3,\)": wrong(order=torch.arange(3)),
    r"order must be \(2,\) int64, not .* torch.int32": wrong(order=torch.arange(2).int()),
    "order is on meta, but q is on cpu": wrong(order=torch.empty(2, dtype=torch.int64, device="meta")),
    "order must name each of the 2 sequences once": wrong(order=torch.zeros(2, dtype=torch.int64)),
    "implementation must be 'auto'": wrong(implementation="fast"),
}


@pytest.mark.parametrize("sentence", WRONG_CALLS)
def test_wrong_calls_are_one_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        hstu_attention(**WRONG_CALLS[sentence])  # type: ignore[arg-type]
    assert str(caught.value).startswith("hstu_attention: ") and "\n" not in str(caught.value)


def test_asking_for_what_cannot_run_says_why() -> None:
    x = torch.randn(4, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'cpp' can't run here: it computes in float32, not torch.float64"):
        hstu_attention(x, x, x, torch.tensor([0, 4]), max_length=4, divisor=4.0, implementation="cpp")


def test_wrong_time_buckets() -> None:
    for settings in ({"kind": "linear"}, {"count": 0}, {"width": 0.0}):
        with pytest.raises(ValueError, match="TimeBuckets"):
            TimeBuckets(**settings)  # type: ignore[arg-type]
