"""Time differences at the ends of int64: every implementation has the same bucket, in the forward pass and the
gradients, for any two times and any difference, and none reads past a table."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from gr_kernels import (
    AttentionMask,
    RelativeBias,
    TimeBuckets,
    add_positions_and_times,
    hstu_attention,
    native,
)

LEAST, MOST = -(2**63), 2**63 - 1
LONGEST = MOST - 1  # what is further apart counts as this
triton = pytest.param(
    "triton",
    marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton isn't installed"),
)
cpp = pytest.param(
    "cpp", marks=pytest.mark.skipif(not native.available(), reason="the C++ operators aren't built")
)

TIMES = {
    "all": [LEAST, LEAST + 1, -(2**62), -1, 0, 1, 2**62, MOST - 1, MOST],
    "LONGEST apart": [-1, MOST - 2],
    "one more": [0, MOST],
    "two more": [MOST, -1],
    "as far as can be": [LEAST, MOST],
    "of one sign": [LEAST, LEAST, -1, -1],
}
BUCKETS = [
    TimeBuckets(),
    TimeBuckets("log", 200, 0.301),  # whose last buckets no difference reaches
    TimeBuckets("sqrt", 300, 3.7),
    TimeBuckets("sqrt", 120, 25e6),  # whose last some reach
    TimeBuckets(count=1),
]


def bucket_of(dt: int, buckets: TimeBuckets) -> int:
    """By the formula; no size here is within float64's rounding of a border."""
    size = min(abs(dt), LONGEST)
    exact = math.log(max(size, 1)) if buckets.kind == "log" else math.sqrt(size)
    return min(int(exact / buckets.width), buckets.count - 1)


def counts(found: list[int], buckets: TimeBuckets) -> Tensor:
    return torch.bincount(torch.tensor(found), minlength=buckets.count).float()


@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("implementation", ["reference", cpp, triton])
def test_attention(implementation: str, times: str, buckets: TimeBuckets, device: torch.device) -> None:
    """Scores are entries of the time table alone, and values are rows of the identity: outputs name the buckets."""
    at = device if implementation == "triton" else torch.device("cpu")
    time_n = torch.tensor(TIMES[times], device=at)
    n = len(time_n)
    expected = [bucket_of(q - k, buckets) for q in TIMES[times] for k in TIMES[times]]

    def attend(table: Tensor, values: Tensor) -> Tensor:
        bias = RelativeBias(time=table, query_times=time_n, key_times=time_n, buckets=buckets)
        zeros = torch.zeros(n, 1, 4, device=at)
        return hstu_attention(
            zeros, zeros, values, torch.tensor([0, n], device=at), max_length=n, divisor=1.0,
            mask=AttentionMask(causal=False), bias=bias, implementation=implementation,
        )  # fmt: skip

    table = torch.arange(buckets.count, dtype=torch.float32, device=at)
    out = attend(table, torch.eye(n, device=at)[:, None, :])
    weights = torch.nn.functional.silu(table)
    found = torch.searchsorted((weights[1:] + weights[:-1]) / 2, out[:, 0].contiguous())
    assert found.flatten().tolist() == expected

    zero = torch.zeros_like(table).requires_grad_()  # SiLU'(0) = 1/2 for every score
    attend(zero, torch.ones(n, 1, 1, device=at)).sum().backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad.cpu(), counts(expected, buckets) / 2)


DIFFERENCES = [LEAST, LEAST + 1, LEAST + 2, -(2**62), -1, 0, 1, 2**62, LONGEST, MOST]


@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
@pytest.mark.parametrize("implementation", ["reference", triton])
def test_add_positions_and_times(implementation: str, buckets: TimeBuckets, device: torch.device) -> None:
    at = device if implementation == "triton" else torch.device("cpu")
    expected = [bucket_of(dt, buckets) for dt in DIFFERENCES]
    n = len(DIFFERENCES)
    table = torch.arange(buckets.count, dtype=torch.float32, device=at)[:, None].requires_grad_()
    out = add_positions_and_times(
        torch.zeros(n, 1, device=at), torch.tensor([0, n], device=at), max_length=n, time_ED=table,
        time_differences_T=torch.tensor(DIFFERENCES, device=at), buckets=buckets, implementation=implementation,
    )  # fmt: skip
    assert out.flatten().tolist() == expected
    out.sum().backward()
    assert table.grad is not None
    assert torch.equal(table.grad[:, 0].cpu(), counts(expected, buckets))


@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
def test_buckets(buckets: TimeBuckets, device: torch.device) -> None:
    for at in {torch.device("cpu"), device}:
        assert buckets.bucket(torch.tensor(DIFFERENCES, device=at)).tolist() == [
            bucket_of(dt, buckets) for dt in DIFFERENCES
        ]
        for times in TIMES.values():
            time_n = torch.tensor(times, device=at)
            assert buckets.bucket_between(time_n[:, None], time_n).tolist() == [
                [bucket_of(q - k, buckets) for k in times] for q in times
            ]


def test_thresholds_that_none_reaches() -> None:
    """Thresholds are the formula's as far as int64 goes; those beyond are 2^63 - 1, above every difference."""
    thresholds = TimeBuckets("log", 200, 0.301).thresholds().tolist()
    assert bucket_of(MOST, TimeBuckets("log", 200, 0.301)) == sum(t < MOST for t in thresholds) == 145
    assert thresholds[145:] == [MOST] * 54
