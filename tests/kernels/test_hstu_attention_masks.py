"""Masks of the attention: the formula against loops, and the reference under every mask against float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from gr_kernels import AttentionMask, hstu_attention, native
from gr_kernels.hstu_attention import blocked
from gr_kernels.hstu_attention.mask import allowed
from tests.kernels.attention_problems import (
    Case,
    assert_close_to_specification,
    dropout_factors,
    make_case,
    run,
)
from tests.precision import analysed, assert_within, tolerance

LENGTHS = (9, 0, 1, 40, 23, 2, 31)
TARGETS = torch.tensor([3, 0, 1, 5, 23, 0, 8])
MASKS = {
    "causal": AttentionMask(),
    "full": AttentionMask(causal=False),
    "window": AttentionMask(window=6),
    "window and full rows": AttentionMask(window=5, full_rows=4),
    "contexts": AttentionMask(contexts=3),
    "one context": AttentionMask(contexts=1),
    "targets": AttentionMask(targets=TARGETS),
    "targets and contexts": AttentionMask(contexts=2, targets=TARGETS.int()),
    "targets and window": AttentionMask(window=4, targets=TARGETS),
    "contexts and window": AttentionMask(window=7, contexts=4),
    "all": AttentionMask(window=6, full_rows=3, contexts=3, targets=TARGETS),
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_cpp = pytest.mark.skipif(
    not native.available(), reason="gr_kernels was built without its C++ operators"
)
MASKS_BY_IMPLEMENTATION = [
    *(("blocked", name) for name in MASKS),
    *(pytest.param("cpp", name, marks=needs_cpp) for name in ("causal", "full", "targets")),
]


def sees(i: int, j: int, n: int, targets: int, window: int, full_rows: int, contexts: int) -> bool:
    """The rule in words: who row i of n is, who row j is, and what the one may see of the other."""
    if i == j:
        return True
    history_end = n - targets
    # Rows 0 .. contexts - 1 are one place (place 0), then one place a row of history, then one for all targets.
    places = max(history_end - max(contexts - 1, 0), 0)

    def place(row: int) -> int:
        if row < contexts:
            return 0
        return min(row - max(contexts - 1, 0), places)

    if contexts and place(i) == 0 and place(j) < places:
        return True
    if place(j) >= place(i):
        return False
    if full_rows and place(i) >= places - full_rows:
        return True  # a target, or among the last rows of history: free of the window
    return not window or place(i) - place(j) <= window


def test_allowed_is_the_rule() -> None:
    """All small sequences under all small masks, against loops."""
    for n, contexts, window, full_rows in itertools.product(range(9), (0, 1, 2, 4), (0, 1, 3), (0, 1, 2)):
        i, j = torch.arange(n)[:, None], torch.arange(n)
        for targets in range(n + 1):
            mask = AttentionMask(window=window, full_rows=full_rows, contexts=contexts)
            found = allowed(mask, i, j, n, targets).tolist()
            expected = [
                [sees(a, b, n, targets, window, full_rows, contexts) for b in range(n)] for a in range(n)
            ]
            assert found == expected, (n, contexts, window, full_rows, targets)
            broadcast = allowed(mask, i[None], j, torch.tensor([[[n]]]), torch.tensor([[[targets]]]))
            assert broadcast.shape == (1, n, n) and broadcast[0].tolist() == expected


def test_allowed_by_hand() -> None:
    """2 contexts, 3 rows of history, 2 targets; window 1, the last row of history free of it."""
    mask = AttentionMask(window=1, full_rows=1, contexts=2)
    found = allowed(mask, torch.arange(7)[:, None], torch.arange(7), 7, 2).int().tolist()
    assert found == [
        [1, 1, 1, 1, 1, 0, 0],  # contexts see each other and history
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],  # the first row of history: the contexts are one step back
        [0, 0, 1, 1, 0, 0, 0],  # the second: one step back is the first
        [1, 1, 1, 1, 1, 0, 0],  # the third is free
        [1, 1, 1, 1, 1, 1, 0],  # targets see all but each other
        [1, 1, 1, 1, 1, 0, 1],
    ]


def test_a_window_binds_targets_where_no_rows_are_full() -> None:
    """As in the public kernels: 4 rows of history, 2 targets, window 2; a target is one step behind the history."""
    targets = torch.tensor([2])
    rows = []
    for full_rows in (0, 1):
        mask = AttentionMask(window=2, full_rows=full_rows, targets=targets)
        rows.append(allowed(mask, torch.arange(6)[:, None], torch.arange(6), 6, 2).int().tolist())
    assert rows[0] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],  # the last two of history, whichever target it is
        [0, 0, 1, 1, 0, 1],
    ]
    assert rows[1] == [*rows[0][:3], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]


def test_full_is_everything() -> None:
    found = allowed(AttentionMask(causal=False), torch.arange(3)[:, None], torch.arange(4), 4, 0)
    assert found.shape == (3, 4) and found.all()


# (heads, Q, V, dropout)
SHAPES = [(1, 16, 16, False), (2, 8, 24, True), (4, 24, 8, False), (2, 25, 25, True)]
BIASES = ["none", "position", "time", "both"]
QUERIES = (4, 0, 1, 40, 7, 1, 12)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize(("implementation", "name"), MASKS_BY_IMPLEMENTATION)
def test_every_mask_matches_specification(
    implementation: str, name: str, activation: str, cross: bool
) -> None:
    """All masks and biases, self and cross, each with two shapes."""
    mask = MASKS[name]
    biases = BIASES if mask.causal else ["none", "time"]
    for index, bias in enumerate(biases):
        heads, query_width, value_width, dropout = SHAPES[(index + 2 * cross + list(MASKS).index(name)) % 4]
        case = make_case(LENGTHS, heads, query_width, value_width, bias, seed=index)
        case = dataclasses.replace(case, query_lengths=QUERIES if cross else None)
        factors = dropout_factors(case) if dropout else None
        settings = {"activation": activation, "mask": mask, "scale": query_width**-0.5, "divisor": 40.0}
        assert_close_to_specification(case, implementation, factors, settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize("name", ["causal", "full", "all"])
def test_lower_precision(name: str, activation: str, dtype: torch.dtype) -> None:
    mask = MASKS[name]
    bias = "both" if mask.causal else "time"
    for cross, dropout in ((False, False), (False, True), (True, True)):
        case = make_case(LENGTHS, 2, 24, 16, bias)
        case = dataclasses.replace(case, query_lengths=QUERIES if cross else None)
        settings = {"activation": activation, "mask": mask, "scale": 24**-0.5, "divisor": 40.0}
        factors = dropout_factors(case) if dropout else None
        assert_close_to_specification(case, "blocked", factors, settings, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32(dtype: torch.dtype) -> None:
    """Of inputs of 16 bits, on processors with instructions for them and without.

    Queries and keys of scale 3 have scores of about 3 * 3 * sqrt(24) = 44, which bfloat16 rounds by up to 1 / 8: the
    weights of a softmax would be off by an eighth, and with v = 1 and one hot row of d_out, so would d_v. Scores are
    exact in float32 here but for 24 u; what remains is the rounding of d_v to 16 bits, of the weights themselves.
    """
    case = make_case((40, 7), 1, 24, 16, "none")
    case.projection.mul_(3.0)
    rounded = dataclasses.replace(case, projection=case.projection.to(dtype).float())
    rounded.d_out.zero_()
    rounded.d_out[30, 0] = 1.0
    exact, allowed = analysed(
        lambda: run(rounded, torch.float64, "specification", activation="softmax", divisor=1.0), torch.float32
    )
    found = run(rounded, dtype, "blocked", activation="softmax", divisor=1.0)
    v = slice(16, 32)  # u, v, q, k side by side
    weights, bound = ({"d_v": x["projection"][:, v]} for x in (exact, allowed))
    assert_within({"d_v": found["projection"][:, v]}, weights, bound, dtype)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize(("implementation", "name"), MASKS_BY_IMPLEMENTATION)
def test_blocks_of_rows(implementation: str, name: str, cross: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences cut into many blocks, of which some skip keys."""
    monkeypatch.setattr(blocked, "BLOCK_SCORES", 512)
    monkeypatch.setattr(blocked, "SMALL_BLOCK_SCORES", 256)
    monkeypatch.setattr(blocked, "ROWS", 7)
    mask = MASKS[name]
    if mask.targets is not None:
        mask = dataclasses.replace(mask, targets=torch.tensor([11, 0, 63, 9]))
    for dropout in (False, True):
        case = make_case((150, 3, 64, 90), 2, 8, 8, "both" if mask.causal else "time")
        case = dataclasses.replace(case, query_lengths=(100, 2, 64, 20) if cross else None)
        factors = dropout_factors(case) if dropout else None
        assert_close_to_specification(case, implementation, factors, {"mask": mask, "divisor": 90.0})


@needs_cpp
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_long_histories_of_compiled_code(activation: str) -> None:
    """More keys than are summed in registers, and every number of rows that a tile has left over."""
    lengths, targets = (700, 300, 41, 33), torch.tensor([9, 290, 41, 1])
    case = dataclasses.replace(make_case(lengths, 1, 16, 8, "both"), query_lengths=(50, 299, 3, 33))
    settings = {
        "activation": activation,
        "mask": AttentionMask(targets=targets),
        "scale": 0.25,
        "divisor": 700.0,
    }
    assert_close_to_specification(case, "cpp", None, settings)


@needs_cpp
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_compiled_rows_have_their_bits_in_the_cross_form(activation: str, dropout: float) -> None:
    """Whichever of a sequence's rows are asked for, in whatever blocks: among them targets with and without others."""
    lengths, targets = (300, 41, 70), torch.tensor([40, 41, 0])
    whole = make_case(lengths, 2, 24, 8)
    settings = {"activation": activation, "divisor": 50.0, "dropout": dropout, "dropout_key": 5}
    mask = AttentionMask(targets=targets)
    every = run(whole, torch.float32, "cpp", mask=mask, **settings)["out"]
    for queries in ((40, 41, 1), (17, 3, 0), (101, 41, 45)):
        case = dataclasses.replace(whole, query_lengths=queries)
        found = run(case, torch.float32, "cpp", mask=mask, **settings)["out"]
        assert torch.equal(found, every[case.query_rows()])


def of_one(case: Case, sequence: int) -> Case:
    """One sequence of a case, alone."""
    begin, end = case.offsets[sequence : sequence + 2].tolist()
    times = {name: getattr(case.bias, name)[begin:end] for name in ("query_times", "key_times")}
    return dataclasses.replace(
        case,
        projection=case.projection[begin:end],
        d_out=case.d_out[begin:end],
        offsets=torch.tensor([0, end - begin]),
        bias=dataclasses.replace(case.bias, **times),
    )


@pytest.mark.parametrize("activation", ["silu", "softmax"])
def test_companions_do_not_matter(activation: str) -> None:
    """A sequence alone, and among others of other lengths and other numbers of targets."""
    case = make_case((30, 12, 31, 29), 2, 8, 8)
    targets = torch.tensor([4, 12, 0, 9])
    settings = {"activation": activation, "divisor": 30.0}
    mask = dataclasses.replace(MASKS["all"], targets=targets)
    together = run(case, torch.float64, "blocked", mask=mask, **settings)
    for sequence, (begin, end) in enumerate(itertools.pairwise(case.offsets.tolist())):
        alone_mask = dataclasses.replace(mask, targets=targets[sequence : sequence + 1])
        alone = run(of_one(case, sequence), torch.float64, "blocked", mask=alone_mask, **settings)
        for name in ("out", "projection"):
            torch.testing.assert_close(
                alone[name],
                together[name][begin:end],
                **tolerance(64, stages=4, dtype=torch.float64, size=100.0),
            )


@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize("name", ["targets", "targets and contexts", "targets and window", "all"])
def test_targets_do_not_see_each_other(name: str, activation: str) -> None:
    """Another candidate in one target's place changes that row alone, and every target may be the only one."""
    case = make_case((25,), 2, 8, 8)
    n, t = 25, 6
    mask = dataclasses.replace(MASKS[name], targets=torch.tensor([t]))
    settings = {"activation": activation, "divisor": 30.0, "mask": mask}
    before = run(case, torch.float64, "blocked", **settings)["out"]
    for row in range(n - t, n):
        changed = dataclasses.replace(case, projection=case.projection.clone())
        changed.projection[row] += 1.0
        after = run(changed, torch.float64, "blocked", **settings)["out"]
        moved = (after != before).any(dim=2).any(dim=1)
        assert moved.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("blocked", torch.float64), pytest.param("cpp", torch.float32, marks=needs_cpp)],
)
def test_targets_are_what_they_would_be_alone(implementation: str, dtype: torch.dtype) -> None:
    """Each target gets what it would get without the others (the bias by position aside, which counts rows), from
    compiled code to the bit."""
    case = make_case((20,), 1, 8, 8, "time")
    n, t = 20, 5
    mask = AttentionMask(targets=torch.tensor([t]))
    together = run(case, dtype, implementation, divisor=20.0, mask=mask)["out"]
    for row in range(n - t, n):
        rows = torch.tensor([*range(n - t), row])
        times = {name: getattr(case.bias, name)[rows] for name in ("query_times", "key_times")}
        alone = dataclasses.replace(
            case,
            projection=case.projection[rows],
            d_out=case.d_out[rows],
            offsets=torch.tensor([0, len(rows)]),
            bias=dataclasses.replace(case.bias, **times),
        )
        one = dataclasses.replace(mask, targets=torch.tensor([1]))
        found = run(alone, dtype, implementation, divisor=20.0, mask=one)["out"]
        if implementation == "cpp":
            assert torch.equal(found, together[rows])
        else:
            torch.testing.assert_close(
                found, together[rows], **tolerance(64, stages=4, dtype=dtype, size=100.0)
            )


def test_a_mask_that_binds_nothing_is_causal() -> None:
    case = make_case(LENGTHS, 2, 8, 8)
    plain = run(case, torch.float64, "blocked", divisor=9.0)
    for mask in (
        AttentionMask(window=64),
        AttentionMask(full_rows=2),
        AttentionMask(window=2, full_rows=64),
        AttentionMask(targets=torch.zeros(len(LENGTHS), dtype=torch.int64)),
        AttentionMask(window=40, full_rows=1),
    ):
        found = run(case, torch.float64, "blocked", divisor=9.0, mask=mask)
        for name, value in found.items():
            torch.testing.assert_close(
                value, plain[name], **tolerance(64, stages=4, dtype=torch.float64, size=100.0)
            )


WRONG_MASKS = {
    "window must be": {"window": -1},
    "contexts must be": {"contexts": -3},
    "full_rows must be": {"full_rows": -1},
    "window is for causal": {"causal": False, "window": 2},
    "full_rows is for causal": {"causal": False, "full_rows": 2},
    "contexts is for causal": {"causal": False, "contexts": 2},
    "targets is for causal": {"causal": False, "targets": torch.tensor([1])},
}


@pytest.mark.parametrize("sentence", WRONG_MASKS)
def test_wrong_masks(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        AttentionMask(**WRONG_MASKS[sentence])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


WRONG_TARGETS: dict[str, Tensor] = {
    r"mask.targets must be \(2,\) int64 or int32": torch.tensor([1]),
    "one number a sequence": torch.tensor([1.0, 2.0]),
    "sequence 1 has 6 rows, of which 7": torch.tensor([0, 7]),
    "sequence 0 has 4 rows, of which -1": torch.tensor([-1, 7]),
}


@pytest.mark.parametrize("sentence", WRONG_TARGETS)
def test_wrong_targets(sentence: str) -> None:
    x = torch.randn(10, 1, 4)
    with pytest.raises(ValueError, match=sentence) as caught:
        mask = AttentionMask(targets=WRONG_TARGETS[sentence])
        hstu_attention(x, x, x, torch.tensor([0, 4, 10]), max_length=6, divisor=6.0, mask=mask)
    assert str(caught.value).startswith("hstu_attention: ") and "\n" not in str(caught.value)
