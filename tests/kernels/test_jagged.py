"""The jagged operators: every implementation against plain loops over sequences, gradients included.

What moves rows must be exact. What computes is held to the bound of tests/precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gr_kernels import native
from gr_kernels.counter_random import uniform_integers
from gr_kernels.dispatch import explain
from gr_kernels.hstu_attention.buckets import TimeBuckets
from gr_kernels.jagged import (
    add_positions_and_times,
    concat_jagged,
    dense_to_jagged,
    jagged_dropout,
    jagged_to_dense,
    split_jagged,
)
from gr_kernels.triton_common import sums_by_entry
from gr_kernels.triton_common.available import why_unavailable
from tests.precision import analysed, assert_within, tolerance

MOVING = ["reference", "cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
COMPUTING = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Sequences of length 0, 1, odd, and one longer than a tile has rows.
HISTORY, TARGETS = (3, 0, 1, 70, 0, 17), (2, 5, 0, 1, 0, 33)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def place(device: torch.device) -> Callable[[str], torch.device]:
    """The device on which an implementation is tested; the test is skipped where it can't run."""

    def place(implementation: str) -> torch.device:
        if implementation == "cpp":
            if native.why_unavailable():
                pytest.skip(native.why_unavailable())
            return torch.device("cpu")
        if implementation == "triton" and why_unavailable(device):
            pytest.skip(why_unavailable(device))
        if implementation == "cuda" and native.why_no_cuda():
            pytest.skip(native.why_no_cuda())
        return device

    return place


def edges(lengths: tuple[int, ...], before: int = 0) -> Tensor:
    return torch.tensor([before, *(before + n for n in itertools.accumulate(lengths))])


def numbers(rows: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 100, (rows, *shape), generator=generator).to(
            dtype
        )
    return torch.randn(rows, *shape, generator=generator).to(dtype)


def to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


# ---- concat and split -------------------------------------------------------------------------------------------


def joined_by_loop(parts: list[Tensor], offsets: list[Tensor]) -> Tensor:
    out = torch.zeros(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype)
    row = int(sum(o[0] for o in offsets))
    for b in range(len(offsets[0]) - 1):
        for part, o in zip(parts, offsets):
            rows = part[int(o[b]) : int(o[b + 1])]
            out[row : row + len(rows)] = rows
            row += len(rows)
    return out


def parts_by_loop(joined: Tensor, offsets: list[Tensor], rows: list[int]) -> list[Tensor]:
    parts = [torch.zeros(count, *joined.shape[1:], dtype=joined.dtype) for count in rows]
    row = int(sum(o[0] for o in offsets))
    for b in range(len(offsets[0]) - 1):
        for part, o in zip(parts, offsets):
            count = int(o[b + 1] - o[b])
            part[int(o[b]) : int(o[b + 1])] = joined[row : row + count]
            row += count
    return parts


CONCAT_CASES = {
    "history and targets": ((HISTORY, TARGETS), (0, 0), (0, 0), (24,)),
    "three parts": ((HISTORY, TARGETS, (1, 1, 1, 1, 1, 1)), (0, 0, 0), (0, 0, 0), (3, 5)),
    "one part": ((HISTORY,), (0,), (0,), (8,)),
    "rows of no sequence": ((HISTORY, TARGETS), (2, 1), (3, 2), (7,)),
    "single numbers": ((HISTORY, TARGETS), (0, 0), (0, 0), ()),
    "an empty part": ((HISTORY, (0,) * 6), (0, 0), (0, 0), (4,)),
    "no sequences": (((), ()), (1, 0), (2, 0), (4,)),
    "rows wider than a tile": (((2, 3), (1, 0)), (0, 0), (0, 0), (5000,)),
}


@pytest.mark.parametrize("implementation", MOVING)
@pytest.mark.parametrize("case", CONCAT_CASES)
def test_concat_and_its_gradient(
    case: str, implementation: str, place: Callable[[str], torch.device]
) -> None:
    lengths, before, after, shape = CONCAT_CASES[case]
    device = place(implementation)
    offsets = [edges(n, b) for n, b in zip(lengths, before)]
    parts = [
        numbers(int(o[-1]) + a, *shape, seed=seed)
        for seed, (o, a) in enumerate(zip(offsets, after, strict=True))
    ]
    leaves = [part.to(device).requires_grad_() for part in parts]
    found, found_offsets = concat_jagged(leaves, to(device, *offsets), implementation=implementation)
    assert torch.equal(found.detach().cpu(), joined_by_loop(parts, offsets))
    assert torch.equal(found_offsets.cpu(), torch.stack(offsets).sum(0))
    d_out = numbers(found.shape[0], *shape, seed=9)
    gradients = torch.autograd.grad(found, leaves, d_out.to(device))
    expected = parts_by_loop(d_out, offsets, [len(part) for part in parts])
    assert all(torch.equal(g.cpu(), e) for g, e in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("implementation", MOVING)
@pytest.mark.parametrize("before", [0, 2])
def test_split_is_the_inverse(implementation: str, before: int, place: Callable[[str], torch.device]) -> None:
    device = place(implementation)
    lengths = tuple(h + t for h, t in zip(HISTORY, TARGETS))
    offsets, tails = edges(lengths, before), torch.tensor(TARGETS, dtype=torch.int32)
    joined = numbers(int(offsets[-1]) + before, 6)
    leaf = joined.to(device).requires_grad_()
    head, head_offsets, tail, tail_offsets = split_jagged(
        leaf, *to(device, offsets, tails), tail_rows=sum(TARGETS), implementation=implementation
    )
    parts = [edges(HISTORY, before), edges(TARGETS)]
    assert torch.equal(head_offsets.cpu(), parts[0]) and torch.equal(tail_offsets.cpu(), parts[1])
    expected = parts_by_loop(joined, parts, [len(joined) - sum(TARGETS), sum(TARGETS)])
    assert torch.equal(head.detach().cpu(), expected[0]) and torch.equal(tail.detach().cpu(), expected[1])
    d_head, d_tail = numbers(len(head), 6, seed=1), numbers(len(tail), 6, seed=2)
    (gradient,) = torch.autograd.grad([head, tail], leaf, to(device, d_head, d_tail))
    assert torch.equal(gradient.cpu(), joined_by_loop([d_head, d_tail], parts))
    again, again_offsets = concat_jagged(
        [head, tail], [head_offsets, tail_offsets], implementation=implementation
    )
    inside = slice(int(offsets[0]), int(offsets[-1]))
    assert torch.equal(again[inside].detach().cpu(), joined[inside]) and torch.equal(
        again_offsets.cpu(), offsets
    )


@pytest.mark.parametrize("implementation", MOVING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_concat_moves_any_dtype(
    implementation: str, dtype: torch.dtype, place: Callable[[str], torch.device]
) -> None:
    device = place(implementation)
    offsets = [edges((2, 0, 3)), edges((1, 4, 0))]
    parts = [numbers(5, 3, dtype=dtype), numbers(5, 3, dtype=dtype, seed=1)]
    # columns of something wider: neither contiguous nor aligned
    views = [torch.cat([part, part], 1).to(device)[:, 3:] for part in parts]
    found, _ = concat_jagged(views, to(device, *offsets), implementation=implementation)
    assert torch.equal(found.cpu(), joined_by_loop(parts, offsets))


def test_concat_does_not_depend_on_threads() -> None:
    if native.why_unavailable():
        pytest.skip(native.why_unavailable())
    lengths = tuple(int(n) for n in torch.randint(0, 90, (200,), generator=torch.Generator().manual_seed(0)))
    offsets = [edges(lengths), edges(lengths[::-1])]
    parts = [numbers(sum(lengths), 33), numbers(sum(lengths), 33, seed=1)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found, _ = concat_jagged(parts, offsets, implementation="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, joined_by_loop(parts, offsets))


# ---- padded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", COMPUTING)
@pytest.mark.parametrize(
    ("dtype", "fill", "shape"),
    [
        (torch.float32, -math.inf, ()),
        (torch.float32, 0.0, (7, 3)),
        (torch.bfloat16, -math.inf, (5,)),
        (torch.float16, 2.5, (5,)),
        (torch.int64, -1, ()),
        (torch.float64, math.nan, (2,)),
    ],
)
def test_padded_and_back(
    implementation: str,
    dtype: torch.dtype,
    fill: float,
    shape: tuple[int, ...],
    place: Callable[[str], torch.device],
) -> None:
    device = place(implementation)
    offsets, longest = edges(HISTORY, 2), max(HISTORY) + 3
    x = numbers(int(offsets[-1]) + 1, *shape, dtype=dtype)
    leaf = x.to(device).requires_grad_(dtype.is_floating_point)
    dense = jagged_to_dense(
        leaf, offsets.to(device), max_length=longest, fill=fill, implementation=implementation
    )
    expected = torch.full((len(HISTORY), longest, *shape), fill, dtype=dtype)
    rows = torch.zeros_like(x)
    for b, n in enumerate(HISTORY):
        expected[b, :n] = x[offsets[b] : offsets[b + 1]]
        rows[offsets[b] : offsets[b + 1]] = x[offsets[b] : offsets[b + 1]]
    assert dense.dtype == dtype and dense.shape == expected.shape
    assert torch.equal(dense.detach().cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    back = dense_to_jagged(dense, offsets.to(device), rows=len(x), implementation=implementation)
    assert torch.equal(back.detach().cpu(), rows)
    if dtype.is_floating_point:
        d_dense = numbers(*expected.shape, dtype=dtype, seed=2)
        (grad_x,) = torch.autograd.grad(dense, leaf, d_dense.to(device))
        rows = torch.zeros_like(x)
        for b, n in enumerate(HISTORY):
            rows[offsets[b] : offsets[b + 1]] = d_dense[b, :n]
        assert torch.equal(grad_x.cpu(), rows)


@pytest.mark.parametrize("implementation", COMPUTING)
def test_gradient_of_a_padded_tensor(implementation: str, place: Callable[[str], torch.device]) -> None:
    device = place(implementation)
    offsets, rows = edges(HISTORY, 2), 2 + sum(HISTORY) + 3
    dense = numbers(len(HISTORY), max(HISTORY) + 1, 5).to(device).requires_grad_()
    back = dense_to_jagged(dense, offsets.to(device), rows=rows, implementation=implementation)
    d_back = numbers(rows, 5, seed=1)
    (gradient,) = torch.autograd.grad(back, dense, d_back.to(device))
    expected = torch.zeros(dense.shape)
    for b, n in enumerate(HISTORY):
        expected[b, :n] = d_back[offsets[b] : offsets[b + 1]]
    assert torch.equal(gradient.cpu(), expected)


@pytest.mark.parametrize("implementation", COMPUTING)
def test_padded_without_rows(implementation: str, place: Callable[[str], torch.device]) -> None:
    device = place(implementation)
    dense = jagged_to_dense(
        numbers(0, 3).to(device),
        edges((0, 0)).to(device),
        max_length=2,
        fill=1.0,
        implementation=implementation,
    )
    assert torch.equal(dense.cpu(), torch.ones(2, 2, 3))
    assert dense_to_jagged(dense, edges((0, 0)).to(device), rows=0, implementation=implementation).shape == (
        0,
        3,
    )


# ---- positions and times --------------------------------------------------------------------------------------------


def added_by_loop(
    x: Tensor, offsets: Tensor, scale: float, position: Tensor | None, time: Tensor | None,
    differences: Tensor, buckets: TimeBuckets, targets: Tensor | None, count_from: str,
) -> Tensor:  # fmt: skip
    rows = [torch.zeros_like(x[0])] * len(x)
    for b in range(len(offsets) - 1):
        n = int(offsets[b + 1] - offsets[b])
        history = n - (int(targets[b]) if targets is not None else 0)
        for i in range(n):
            row = int(offsets[b]) + i
            total = x[row] * scale
            if position is not None:
                total = total + position[min(i, history) if count_from == "front" else max(history - i, 0)]
            if time is not None:
                size = abs(int(differences[row]))
                exact = math.log(max(size, 1)) if buckets.kind == "log" else math.sqrt(size)
                total = total + time[min(int(exact / buckets.width), buckets.count - 1)]
            rows[row] = total
    return torch.stack(rows) if rows else x


ADD_CASES = {
    "all": (True, True, True, "front", TimeBuckets("log", 12, 0.9)),
    "from the back": (True, True, True, "back", TimeBuckets("sqrt", 9, 40.5)),
    "position": (True, False, False, "back", TimeBuckets()),
    "time": (False, True, True, "front", TimeBuckets("log", 5, 1.3)),
    "scale": (False, False, False, "front", TimeBuckets()),
}


@pytest.mark.parametrize("implementation", COMPUTING)
@pytest.mark.parametrize(("case", "dtype"), [*zip(ADD_CASES, [*DTYPES, *DTYPES]), ("all", torch.bfloat16)])
def test_positions_and_times(
    case: str, dtype: torch.dtype, implementation: str, place: Callable[[str], torch.device]
) -> None:
    with_position, with_time, with_targets, count_from, buckets = ADD_CASES[case]
    device = place(implementation)
    lengths, width = (5, 0, 1, 41, 0, 8), 19
    offsets, longest = edges(lengths, 1), max(lengths)
    x = numbers(int(offsets[-1]) + 2, width, dtype=dtype)
    position = numbers(longest + 3, width, seed=1).to(dtype) if with_position else None
    time = numbers(buckets.count, width, seed=2) if with_time else None  # float32 whatever x is
    size = 10 ** (6 * torch.rand(len(x), generator=torch.Generator().manual_seed(3)))
    differences = (size * (1 - 2 * (torch.arange(len(x)) % 2))).long() * (torch.arange(len(x)) % 5 > 0)
    targets = torch.tensor([2, 0, 1, 7, 0, 0]) if with_targets else None
    d_out = numbers(*x.shape, seed=4).to(dtype)

    def run(definition: bool) -> dict[str, Tensor]:
        """The implementation under test, or the loop in float64."""
        at = torch.device("cpu") if definition else device
        tensors = {"x": x, "position": position, "time": time}
        leaves = {
            name: t.to(at, torch.float64 if definition else t.dtype, copy=True).requires_grad_()
            for name, t in tensors.items()
            if t is not None
        }
        table = leaves.get
        if definition:
            out = added_by_loop(
                leaves["x"], offsets, 1.7, table("position"), table("time"), differences, buckets, targets, count_from
            )  # fmt: skip
        else:
            out = add_positions_and_times(
                leaves["x"], offsets.to(at), max_length=longest, scale=1.7, position_PD=table("position"),
                time_ED=table("time"), time_differences_T=differences.to(at), buckets=buckets,
                targets_B=None if targets is None else targets.to(at), count_from=count_from,
                implementation=implementation,
            )  # fmt: skip
        out.backward(d_out.to(at, out.dtype))
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        return {"out": out.detach(), **{name: g for name, g in gradients.items() if g is not None}}

    exact, allowed = analysed(lambda: run(True), dtype)
    assert_within(run(False), exact, allowed)


@pytest.mark.parametrize("implementation", COMPUTING)
@pytest.mark.parametrize("case", ["front", "back", "targets", "no table"])
def test_positions_where_every_row_has_a_sequence(
    case: str, implementation: str, place: Callable[[str], torch.device]
) -> None:
    """The same as among rows without one, whose gradients are zero."""
    device = place(implementation)
    lengths, width = (5, 0, 1, 21, 0, 8), 7
    offsets, rows = edges(lengths), sum(lengths)
    x, d_out = numbers(rows + 3, width), numbers(rows + 3, width, seed=1)
    table = numbers(max(lengths) + 2, width, seed=2)

    def run(before: int, after: int) -> list[Tensor]:
        taken = slice(1 - before, 1 + rows + after)
        x_here, table_here = (t.to(device).requires_grad_() for t in (x[taken], table))
        out = add_positions_and_times(
            x_here, (offsets + before).to(device), max_length=max(lengths), scale=1.7,
            position_PD=None if case == "no table" else table_here,
            targets_B=torch.tensor([2, 0, 1, 7, 0, 0]).to(device) if case == "targets" else None,
            count_from="back" if case == "back" else "front", implementation=implementation,
        )  # fmt: skip
        wanted = (x_here,) if case == "no table" else (x_here, table_here)
        return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, wanted, d_out[taken].to(device)))]

    covered, among = run(0, 0), run(1, 2)
    for around in among[:2]:
        assert not around[0].any() and not around[-2:].any()
    assert [torch.equal(a, b[1:-2]) for a, b in zip(covered[:2], among[:2])] == [True, True]
    for a, b in zip(covered[2:], among[2:]):
        torch.testing.assert_close(a, b, **tolerance(len(lengths), size=4.0 * len(lengths)))


def test_gradient_of_tables_splits_long_sums(place: Callable[[str], torch.device]) -> None:
    """One entry with most of the rows: summed in parts, the same bits every time."""
    device = place("triton")
    values, inside = numbers(700, 40), torch.arange(700) % 11 > 0
    entry = (torch.arange(700) % 50 == 0).long() * 2 + (torch.arange(700) % 70 == 1).long()
    assert sums_by_entry.parts(700, 4, 40) > 1
    found = [sums_by_entry.sum_rows_by_entry(*to(device, values, entry, inside), 4).cpu() for _ in range(2)]
    exact, allowed = analysed(
        lambda: {
            "sums": torch.zeros(4, 40, dtype=torch.float64).index_add(
                0, entry[inside], values[inside].double()
            )
        },
        torch.float32,
    )
    assert_within({"sums": found[0]}, exact, allowed)
    assert torch.equal(*found)


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", COMPUTING)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((37, 10), torch.float32), ((5, 3, 131), torch.bfloat16), ((9,), torch.float16)]
)
def test_dropout_decides_by_key_row_and_column(
    implementation: str, shape: tuple[int, ...], dtype: torch.dtype, place: Callable[[str], torch.device]
) -> None:
    device = place(implementation)
    probability, key = 0.3, 0xFEDC_BA98_7654_3210
    x, d_out = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    leaf = x.to(device).requires_grad_()
    out = jagged_dropout(leaf, probability, key=key, implementation=implementation)
    (gradient,) = torch.autograd.grad(out, leaf, d_out.to(device))
    row = torch.arange(shape[0])
    word = uniform_integers(
        key, row, torch.zeros_like(row), math.prod(shape[1:]), 2**32, implementation="reference"
    )
    kept = (word >= math.ceil(probability * 2**32)).view(shape)
    assert 0.5 < kept.float().mean() < 0.9
    for found, source in ((out.detach(), x), (gradient, d_out)):
        expected = torch.where(kept, source.float() * (1 / (1 - probability)), 0.0).to(dtype)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("implementation", COMPUTING)
def test_dropout_of_some_rows_is_that_of_all(
    implementation: str, place: Callable[[str], torch.device]
) -> None:
    """Forward and backward, with the rows' own numbers, in any order."""
    device = place(implementation)
    x, d_out = numbers(70, 10).to(device), numbers(70, 10, seed=1).to(device)
    rows = torch.tensor([69, 3, 4, 5, 30, 0], device=device)
    leaves = [x.clone().requires_grad_(), x[rows].requires_grad_()]
    every = jagged_dropout(leaves[0], 0.4, key=7, implementation=implementation)
    some = jagged_dropout(leaves[1], 0.4, key=7, rows=rows, implementation=implementation)
    every.backward(d_out)
    some.backward(d_out[rows])
    assert torch.equal(some, every[rows]) and torch.equal(leaves[1].grad, leaves[0].grad[rows])  # type: ignore[index,arg-type]
    with pytest.raises(ValueError, match=r"rows must be \(70,\) int64"):
        jagged_dropout(x, 0.4, key=7, rows=rows)


def test_dropout_rows_past_32_bits_differ() -> None:
    """The reference's counter has the row's 64 bits; the kernel splits its row in the same two words."""
    words = [uniform_integers(5, torch.tensor([row]), torch.tensor([0]), 4, 2**32) for row in (3, 3 + 2**32)]
    assert not torch.equal(*words)


def test_no_dropout_is_x_itself() -> None:
    x = numbers(4, 3)
    assert jagged_dropout(x, 0.0, key=1) is x


# ---- tracing, choice, errors ----------------------------------------------------------------------------------------


def operator_calls(device: torch.device, implementation: str) -> dict[str, Callable[[Tensor], Tensor]]:
    offsets, tails = edges((3, 0, 4)).to(device), torch.tensor([1, 0, 2], device=device)
    position, time = numbers(9, 4).to(device), numbers(6, 4).to(device)
    differences = torch.arange(7, device=device) * 50
    choice = {"implementation": implementation}
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "concat": lambda x: concat_jagged([x, x * 2], [offsets, offsets], **choice)[0],
        "split": lambda x: split_jagged(x, offsets, tails, tail_rows=3, **choice)[2],
    }
    if implementation in COMPUTING:
        calls |= {
            "dense": lambda x: jagged_to_dense(x, offsets, max_length=5, **choice),
            "jagged": lambda x: dense_to_jagged(x.view(1, 7, 4), offsets[:1].repeat(2) + 0, rows=2, **choice),
            "dropout": lambda x: jagged_dropout(x, 0.4, key=3, **choice),
            "positions": lambda x: add_positions_and_times(
                x, offsets, max_length=4, position_PD=position, time_ED=time, time_differences_T=differences,
                buckets=TimeBuckets("log", 6, 0.8), targets_B=tails, **choice,
            ),
        }  # fmt: skip
    return calls


@pytest.mark.parametrize("implementation", MOVING)
def test_compiles_without_graph_breaks(implementation: str, place: Callable[[str], torch.device]) -> None:
    device = place(implementation)
    for name, call in operator_calls(device, implementation).items():
        torch._dynamo.reset()
        x = numbers(7, 4).to(device).requires_grad_()
        traced = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
        plain = call(x)
        assert torch.equal(traced, plain), name
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (traced, plain)]
        assert torch.equal(*gradients), name


def test_registered_operators(place: Callable[[str], torch.device]) -> None:
    """Schema, shapes of fake tensors, gradients and dynamic shapes, by torch's own check."""
    device = place("triton")
    offsets = edges((3, 0, 4)).to(device)
    x = numbers(7, 4).to(device).requires_grad_()
    call_all = operator_calls(device, "triton")
    for call in call_all.values():
        call(x)  # registers
    ops = torch.ops.gr_kernels
    tables = (numbers(9, 4).to(device).requires_grad_(), numbers(6, 4).to(device).requires_grad_())
    differences = torch.arange(7, device=device)
    checks = [
        (ops.jagged_concat_triton, ([x, x.detach()], [offsets, offsets])),
        (ops.jagged_split_triton, (x, [offsets - offsets // 2, offsets // 2], [4, 3])),
        (ops.jagged_to_dense_triton, (x, offsets, 5, -1.0)),
        (ops.dense_to_jagged_triton, (x.detach().view(1, 7, 4).requires_grad_(), offsets[:2], 3)),
        (ops.jagged_dropout_triton, (x, 0.3, -5)),
        (
            ops.add_positions_and_times_triton,
            (x, offsets, None, *tables, differences, "log", 6, 0.8, 4, 2.0, "front"),
        ),
    ]
    for operator, arguments in checks:
        torch.library.opcheck(operator, arguments)


def test_compiled_operators_have_shapes_and_gradients(place: Callable[[str], torch.device]) -> None:
    place("cpp")
    x, offsets = numbers(7, 4).requires_grad_(), edges((3, 0, 4))
    concat_jagged([x], [offsets], implementation="cpp")  # registers
    ops = torch.ops.gr_kernels
    torch.library.opcheck(ops.jagged_concat, ([x, x.detach()], [offsets, offsets]))
    torch.library.opcheck(ops.jagged_split, (x, [offsets - offsets // 2, offsets // 2], [4, 3]))
    assert ops.jagged_concat([x.to("meta")], [offsets.to("meta")]).shape == (7, 4)


def test_choice_is_explained() -> None:
    x, offsets = numbers(7, 4), edges((3, 0, 4))
    expected = "reference" if native.why_unavailable() else "cpp"
    assert explain(concat_jagged, [x], [offsets]).startswith(f"{expected} (")
    assert "cuda can't: it is for cuda" in explain(concat_jagged, [x], [offsets])
    assert explain(jagged_to_dense, x, offsets, max_length=4).startswith("reference (")
    assert explain(jagged_dropout, x, 0.1, key=1).startswith("reference (")
    named = explain(add_positions_and_times, x, offsets, max_length=4, implementation="reference")
    assert named.startswith("reference (")
    with pytest.raises(ValueError, match="must be 'auto' or one of 'cuda', 'triton', 'cpp', 'reference'"):
        concat_jagged([x], [offsets], implementation="numpy")
    with pytest.raises(ValueError, match="'cuda' can't run here: the tensors are on cpu"):
        concat_jagged([x], [offsets], implementation="cuda")


X, OFFSETS = torch.zeros(7, 4), torch.tensor([0, 3, 7])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: concat_jagged([X, X], [OFFSETS]), "2 parts come with 1 offsets"),
        (lambda: concat_jagged([X, X[:, :3]], [OFFSETS, OFFSETS]), "part 1 is .*doesn't fit part 0's"),
        (lambda: concat_jagged([X, X], [OFFSETS, OFFSETS[:2]]), "2 and 1 sequences"),
        (lambda: concat_jagged([X], [OFFSETS + 1]), "from 1 to 8, outside the 7 rows"),
        (lambda: concat_jagged([X], [OFFSETS.flip(0) - 0]), "outside|must not fall"),
        (lambda: concat_jagged([X], [OFFSETS.int()]), "must be .* int64"),
        (
            lambda: split_jagged(X, OFFSETS, torch.tensor([1, 5]), tail_rows=6),
            "sequence 1 has 4 rows, of which",
        ),
        (lambda: split_jagged(X, OFFSETS, torch.tensor([1, 2]), tail_rows=2), "tail_lengths add to 3"),
        (lambda: jagged_to_dense(X, OFFSETS, max_length=3), "sequence 1 has 4 rows, more than max_length 3"),
        (lambda: dense_to_jagged(X.view(1, 7, 4), OFFSETS, rows=7), "dense must be"),
        (lambda: jagged_dropout(X, 1.0, key=1), "probability must be"),
        (lambda: jagged_dropout(X, 0.5, key=-1), "key must be a 64-bit number"),
        (
            lambda: add_positions_and_times(X, OFFSETS, max_length=4, position_PD=X[:3]),
            "needs 4 entries or more",
        ),
        (
            lambda: add_positions_and_times(X, OFFSETS, max_length=4, position_PD=X[:4], count_from="back"),
            "needs 5 entries or more, not 4",
        ),
        (lambda: add_positions_and_times(X, OFFSETS, max_length=4, time_ED=X), "needs 129 entries, not 7"),
        (
            lambda: add_positions_and_times(X, OFFSETS, max_length=4, targets_B=torch.tensor([4, 0])),
            "sequence 0 has fewer rows than targets",
        ),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
