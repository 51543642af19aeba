"""The gradient of a table added to scores: every implementation against float64 sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.bias_table_gradient import bias_table_gradient
from gr_kernels.dispatch import explain
from tests.kernels.precision import assert_precise

IMPLEMENTATIONS = ["reference", "cpp", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(poisoned_memory: None) -> Iterator[None]:
    yield


@pytest.fixture
def place() -> Callable[[str], torch.device]:
    def place(implementation: str) -> torch.device:
        reasons = {"reference": "", "cpp": native.why_unavailable(), "cuda": native.why_no_cuda()}
        if reasons[implementation]:
            pytest.skip(reasons[implementation])
        return torch.device("cuda" if implementation == "cuda" else "cpu")

    return place


def scores(count: int, entries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values, and buckets in runs as neighbouring times have them, a tenth of them masked."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    start = torch.randint(0, max(entries, 1), (count // 5 + 1,), generator=generator)
    buckets = start.repeat_interleave(5)[:count]
    return values, torch.where(torch.rand(count, generator=generator) < 0.1, -1, buckets)


def exact(values: Tensor, buckets: Tensor, entries: int) -> Tensor:
    kept = buckets >= 0
    sums = torch.zeros(entries, dtype=torch.float64)
    return sums.index_add(0, buckets[kept].long(), values[kept].double())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("count", "entries", "index"),
    [
        (0, 5, torch.int64),
        (1, 1, torch.int32),
        (1001, 129, torch.int32),
        (300_000, 129, torch.int64),
        (300_000, 1, torch.int32),
        (70_003, 4096, torch.int32),
        (9_999, 65_536, torch.int64),
        (10, 0, torch.int64),
    ],
)
def test_sums(
    count: int,
    entries: int,
    index: torch.dtype,
    implementation: str,
    deterministic: bool,
    place: Callable[[str], torch.device],
) -> None:
    values, buckets = scores(count, entries)
    if entries == 0:
        buckets = torch.full_like(buckets, -1)
    device = place(implementation)
    arguments = values.to(device), buckets.to(index).to(device)
    found = bias_table_gradient(
        *arguments, entries, deterministic=deterministic, implementation=implementation
    )
    plain = torch.zeros(entries + 1).index_add(0, torch.where(buckets < 0, entries, buckets), values)[
        :entries
    ]
    assert_precise({"out": found}, {"out": plain}, {"out": exact(values, buckets, entries)})
    if deterministic:
        again = bias_table_gradient(*arguments, entries, deterministic=True, implementation=implementation)
        assert torch.equal(found, again)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_scores_as_they_come(implementation: str, place: Callable[[str], torch.device]) -> None:
    device = place(implementation)
    values, buckets = scores(6 * 7 * 8, 11)
    block = values.to(torch.bfloat16).view(6, 7, 8).to(device).transpose(0, 2)
    bucket_block = buckets.view(6, 7, 8).to(device).transpose(0, 2)
    found = bias_table_gradient(block, bucket_block, 11, implementation=implementation)
    expected = exact(values.to(torch.bfloat16), buckets, 11).float()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_threads() -> None:
    if native.why_unavailable():
        pytest.skip(native.why_unavailable())
    values, buckets = scores(400_000, 129)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(bias_table_gradient(values, buckets, 129, implementation="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_registration(place: Callable[[str], torch.device]) -> None:
    place("cpp")
    values, buckets = scores(100, 7)
    bias_table_gradient(values, buckets, 7, implementation="cpp")  # loads
    torch.library.opcheck(torch.ops.gr_kernels.bias_table_gradient, (values, buckets, 7, True))
    call = torch.compile(bias_table_gradient, backend="aot_eager", fullgraph=True)
    assert torch.equal(call(values, buckets, 7), bias_table_gradient(values, buckets, 7))


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_bucket_outside_the_table(implementation: str, place: Callable[[str], torch.device]) -> None:
    place(implementation)
    values, buckets = scores(5000, 7)
    buckets[4321] = 7
    with pytest.raises(IndexError, match="bucket 7 of value 4321 is outside the table of 7 entries"):
        bias_table_gradient(values, buckets, 7, implementation=implementation)


def test_choice_and_errors() -> None:
    values, buckets = scores(10, 3)
    assert explain(bias_table_gradient, values, buckets, 3).startswith(
        "reference (" if native.why_unavailable() else "cpp ("
    )
    assert explain(bias_table_gradient, values.double(), buckets, 3).startswith("reference (")
    with pytest.raises(ValueError, match="they must be alike"):
        bias_table_gradient(values, buckets[:3], 3)
    with pytest.raises(ValueError, match="int32 or int64 buckets"):
        bias_table_gradient(values, values, 3)
