"""The gradient of a table added to scores: every implementation against float64 sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gr_kernels import native
from gr_kernels.bias_table_gradient import bias_table_gradient, triton_op
from gr_kernels.dispatch import explain
from gr_kernels.triton_common import sums_by_entry
from gr_kernels.triton_common.available import why_unavailable
from tests.precision import analysed, assert_within

IMPLEMENTATIONS = ["reference", "cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
# Values, entries, type of the buckets.
SHAPES = [
    (0, 5, torch.int64),
    (1, 1, torch.int32),
    (1001, 129, torch.int32),
    (5003, 2, torch.int64),
    (150, 300, torch.int64),
    (10, 0, torch.int64),
]
# Too many programs for Triton's interpreter.
LARGE = [
    (300_000, 129, torch.int64),
    (300_000, 1, torch.int32),
    (70_003, 4096, torch.int32),
    (9_999, 65_536, torch.int64),
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def place(device: torch.device) -> Callable[[str], torch.device]:
    """The device on which an implementation is tested; the test is skipped where it can't run."""

    def place(implementation: str) -> torch.device:
        at = device if implementation in ("triton", "cuda") else torch.device("cpu")
        reasons = {
            "cpp": native.why_unavailable(),
            "cuda": native.why_no_cuda(),
            "triton": why_unavailable(at),
        }
        if reasons.get(implementation):
            pytest.skip(reasons[implementation])
        return at

    return place


def scores(count: int, entries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values, and buckets in runs as neighbouring times have them, a tenth of them masked."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    start = torch.randint(0, max(entries, 1), (count // 5 + 1,), generator=generator)
    buckets = start.repeat_interleave(5)[:count]
    return values, torch.where(torch.rand(count, generator=generator) < 0.1, -1, buckets)


def check(found: Tensor, values: Tensor, buckets: Tensor, entries: int) -> None:
    """Within the bound on rounding of float32 sums, whatever the values' dtype."""

    def sums() -> dict[str, Tensor]:
        kept = (buckets >= 0) & (buckets < entries)
        zeros = torch.zeros(entries, dtype=torch.float64)
        return {"sums": zeros.index_add(0, buckets[kept].long(), values[kept].double())}

    exact, allowed = analysed(sums, torch.float32)
    assert_within({"sums": found}, exact, allowed, torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_buckets_at_the_ends_of_int64(implementation: str, place: Callable[[str], torch.device]) -> None:
    at = place(implementation)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], device=at)
    least, most = -(2**63), 2**63 - 1
    masked = torch.tensor([least, 1, 0, least + 1], device=at)
    found = bias_table_gradient(values, masked, 2, implementation=implementation)
    assert found.tolist() == [4.0, 2.0]
    past = torch.tensor([most, 1, 0, least], device=at)
    if implementation in ("reference", "cpp"):
        with pytest.raises(IndexError, match=f"bucket {most} of value 0 is outside the table of 2 entries"):
            bias_table_gradient(values, past, 2, implementation=implementation)
    else:
        assert bias_table_gradient(values, past, 2, implementation=implementation).tolist() == [4.0, 2.0]


def sizes_and_implementations() -> Iterator[object]:
    for shape in SHAPES + LARGE:
        for implementation in ("reference", "cpp", "triton", "cuda"):
            on_gpu = implementation == "cuda" or (implementation == "triton" and shape in LARGE)
            yield pytest.param(*shape, implementation, marks=pytest.mark.gpu if on_gpu else ())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("count", "entries", "index", "implementation"), list(sizes_and_implementations()))
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
    check(found, values, buckets, entries)
    if deterministic or implementation in ("cpp", "triton"):
        again = bias_table_gradient(*arguments, entries, deterministic=True, implementation=implementation)
        assert torch.equal(found, again)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_scores_as_they_come(implementation: str, place: Callable[[str], torch.device]) -> None:
    device = place(implementation)
    values, buckets = scores(6 * 7 * 8, 11)
    block = values.to(torch.bfloat16).view(6, 7, 8).to(device).transpose(0, 2)
    bucket_block = buckets.view(6, 7, 8).to(device).transpose(0, 2)
    found = bias_table_gradient(block, bucket_block, 11, implementation=implementation)
    check(found, values.to(torch.bfloat16), buckets, 11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_reads_sixteen_bits(dtype: torch.dtype, place: Callable[[str], torch.device]) -> None:
    device = place("triton")
    values, buckets = scores(2500, 3)
    values = values.to(dtype)
    found = bias_table_gradient(values.to(device), buckets.to(device), 3, implementation="triton")
    check(found, values, buckets, 3)


def test_triton_sums_in_pieces_and_parts(
    place: Callable[[str], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More values than are sorted at once, and an entry with most of them; buckets past the table count nowhere."""
    device = place("triton")
    values, _ = scores(12_001, 3)
    buckets = torch.where(torch.arange(12_001) % 10 < 8, 1, torch.arange(12_001) % 5)
    monkeypatch.setattr(triton_op, "PIECE", 5000)
    assert sums_by_entry.parts(5000, 3, 1) > 1
    arguments = values.to(device), buckets.to(device), 3
    found = bias_table_gradient(*arguments, implementation="triton")
    inside = buckets < 3
    assert 0 < int((~inside).sum())
    check(found, values, buckets, 3)
    assert torch.equal(found, bias_table_gradient(*arguments, implementation="triton"))


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


@pytest.mark.parametrize("implementation", ["cpp", "triton"])
def test_registration(implementation: str, place: Callable[[str], torch.device]) -> None:
    device = place(implementation)
    values, buckets = (x.to(device) for x in scores(100, 7))
    choice = {"implementation": implementation}
    plain = bias_table_gradient(values, buckets, 7, **choice)  # registers
    ops = torch.ops.gr_kernels
    operator, more = (
        (ops.bias_table_gradient, (7, True))
        if implementation == "cpp"
        else (ops.bias_table_gradient_triton, (7,))
    )
    torch.library.opcheck(operator, (values, buckets, *more))
    call = torch.compile(bias_table_gradient, backend="aot_eager", fullgraph=True)
    assert torch.equal(call(values, buckets, 7, **choice), plain)


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
    with pytest.raises(ValueError, match="'triton' can't run here: it takes float32, float16 or bfloat16"):
        bias_table_gradient(values.double(), buckets, 3, implementation="triton")
    with pytest.raises(ValueError, match="they must be alike"):
        bias_table_gradient(values, buckets[:3], 3)
    with pytest.raises(ValueError, match="int32 or int64 buckets"):
        bias_table_gradient(values, values, 3)


def test_choice_on_a_gpu(place: Callable[[str], torch.device]) -> None:
    """The compiled operator where it was built, else Triton's; asked with tensors that have no memory."""
    place("triton")
    with FakeTensorMode():
        values = torch.empty(10, device="cuda")
        buckets = torch.empty(10, dtype=torch.int64, device="cuda")
        chosen = explain(bias_table_gradient, values, buckets, 3)
    if native.why_no_cuda():
        assert chosen.startswith("triton (values sorted by bucket; deterministic); cuda can't: ")
    else:
        assert chosen.startswith("cuda (")
