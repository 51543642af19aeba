"""gr_kernels.candidate_scores: every implementation against the float64 definition, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels import native
from gr_kernels.candidate_scores import candidate_scores, reference
from gr_kernels.dispatch import explain
from tests.precision import analysed, assert_within

NATIVE = pytest.param(
    "cpp", marks=pytest.mark.skipif(not native.available(), reason="the C++ operators are not built")
)
FAST = [NATIVE, "dense", "gather"]
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(
    tokens: int, candidates: int, catalogue: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit-scale queries, table (with a zero row and one below eps), rows (with duplicates), upstream gradient."""
    generator = torch.Generator().manual_seed(width)
    queries = torch.randn(tokens, width, generator=generator)
    table = torch.randn(catalogue, width, generator=generator)
    rows = torch.randint(0, catalogue, (tokens, candidates), generator=generator)
    grad = torch.randn(tokens, candidates, generator=generator)
    if tokens and candidates:
        table[1], table[2] = 0, table[2] * EPS / 100
        rows[0] = rows[0, 0]  # one row for all candidates
        rows[-1, 0], rows[-1, -1] = 1, 2
    return queries, table, rows, grad


def run(
    way: str, queries: Tensor, table: Tensor, rows: Tensor, grad: Tensor, eps: float | None
) -> list[Tensor]:
    """Scores, and the gradients of queries and table."""
    queries, table = queries.detach().requires_grad_(), table.detach().requires_grad_()
    if way == "reference":
        scores = reference.candidate_scores(queries, table, rows, eps)
    else:
        scores = candidate_scores(queries, table, rows, normalize_eps=eps, implementation=way)
    return [scores.detach(), *torch.autograd.grad(scores, (queries, table), grad)]


NAMES = ("scores", "queries", "table")


def check(
    got: list[Tensor], queries: Tensor, table: Tensor, rows: Tensor, grad: Tensor, eps: float | None
) -> None:
    """Scores and gradients within the bound on rounding."""
    inputs = (queries.double(), table.double(), rows, grad.double())
    exact, allowed = analysed(lambda: dict(zip(NAMES, run("reference", *inputs, eps))), torch.float32)
    assert_within(dict(zip(NAMES, got)), exact, allowed, torch.float32)


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("width", [2, 3, 4, 7, 8, 17, 31, 50, 64, 100, 128, 200])
@pytest.mark.parametrize("shape", [(5, 1, 4), (37, 129, 100), (90, 20, 5000)])
def test_scores_and_gradients(way: str, eps: float | None, width: int, shape: tuple[int, int, int]) -> None:
    queries, table, rows, grad = problem(*shape, width)
    check(run(way, queries, table, rows, grad, eps), queries, table, rows, grad, eps)


@pytest.mark.parametrize("way", [*FAST, "reference"])
@pytest.mark.parametrize("eps", [None, EPS])
def test_no_tokens_no_candidates(way: str, eps: float | None) -> None:
    for tokens, candidates in ((0, 5), (5, 0), (0, 0)):
        queries, table, rows, grad = problem(tokens, candidates, 7, 12)
        scores, grad_queries, grad_table = run(way, queries, table, rows, grad, eps)
        assert scores.shape == (tokens, candidates)
        assert torch.equal(grad_queries, torch.zeros(tokens, 12))
        assert torch.equal(grad_table, torch.zeros(7, 12))


@pytest.mark.parametrize("way", FAST)
def test_strided_inputs_and_narrow_rows(way: str) -> None:
    queries, table, rows, grad = problem(30, 9, 50, 20)
    strided = run(way, queries.t().contiguous().t(), table.t().contiguous().t(), rows.int(), grad, EPS)
    wide = torch.stack([rows, rows], dim=2)[:, :, 0]
    for got in (strided, run(way, queries, table, wide, grad, EPS)):
        check(got, queries, table, rows, grad, EPS)
    # an upstream gradient that is a broadcast scalar
    q = queries.clone().requires_grad_()
    candidate_scores(q, table, rows, implementation=way).sum().backward()
    assert q.grad is not None
    exact, allowed = analysed(lambda: {"queries": table.double()[rows].sum(1)}, torch.float32)
    assert_within({"queries": q.grad}, exact, allowed)


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("shape", [(300, 33, 60), (40, 20, 5000)])
def test_two_runs_and_two_thread_counts(way: str, shape: tuple[int, int, int]) -> None:
    inputs = problem(*shape, 24)
    once, again = run(way, *inputs, EPS), run(way, *inputs, EPS)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    if way != "cpp":
        return  # PyTorch's GEMM may sum in another order on other threads
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(once, run(way, *inputs, EPS)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not native.available(), reason="the C++ operators are not built")
def test_blocks_of_queries_and_buckets_of_rows() -> None:
    """More pairs than one block holds, more rows than one bucket: the seams of the table's gradient."""
    queries, table, rows, grad = problem(4300, 129, 9000, 16)
    _, _, got = run("cpp", queries, table, rows, grad, None)

    def table_gradient() -> dict[str, Tensor]:
        products = (grad.double()[:, :, None] * queries.double()[:, None, :]).flatten(0, 1)
        zeros = torch.zeros(9000, 16, dtype=torch.float64)
        return {"table": zeros.index_add(0, rows.flatten(), products)}

    exact, allowed = analysed(table_gradient, torch.float32)
    assert_within({"table": got}, exact, allowed)
    # normalised on the way, over several buckets
    inputs = problem(60, 500, 40_000, 16)
    check(run("cpp", *inputs, EPS), *inputs, EPS)


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("eps", [None, EPS])
def test_a_score_does_not_depend_on_its_companions(way: str, eps: float | None) -> None:
    queries, table, rows, _ = problem(40, 37, 3000, 50)
    table[:] = F.normalize(table, dim=-1)
    exact, allowed = analysed(
        lambda: {"scores": reference.candidate_scores(queries.double(), table.double(), rows, eps)},
        torch.float32,
    )
    for some in (slice(3, 4), slice(10, 29)):
        alone = candidate_scores(
            queries[some], table, rows[some, 5:20], normalize_eps=eps, implementation=way
        )
        part, bound = ({"scores": x["scores"][some, 5:20]} for x in (exact, allowed))
        assert_within({"scores": alone}, part, bound)


@pytest.mark.parametrize("way", [*FAST, "reference"])
@pytest.mark.parametrize("eps", [None, EPS])
def test_nan_is_passed_on(way: str, eps: float | None) -> None:
    queries, table, rows, grad = problem(6, 5, 20, 19)
    rows[:] = torch.arange(30).reshape(6, 5) % 20
    poisoned = table.clone()
    poisoned[7, 18] = float("nan")
    scores, grad_queries, grad_table = run(way, queries, poisoned, rows, grad, eps)
    assert torch.equal(scores.isnan(), rows == 7)
    assert bool(grad_queries[(rows == 7).any(1)].isnan().any(1).all())
    if eps is not None:
        assert bool(grad_table[7].isnan().any())
    poisoned = queries.clone()
    poisoned[2, 0] = float("nan")
    scores, _, grad_table = run(way, poisoned, table, rows, grad, eps)
    assert torch.equal(scores.isnan().all(1), torch.arange(6) == 2)
    assert bool(grad_table[rows[2]].isnan().any(1).all())


@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("way", ["auto", "gather", "dense"])
def test_float64_gradients_by_finite_differences(way: str, eps: float | None) -> None:
    queries, table, rows, _ = problem(4, 3, 6, 3)
    table[1:3] = torch.randn(2, 3)  # differences do not work at a zero row, nor across eps
    inputs = (queries.double().requires_grad_(), table.double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, e: candidate_scores(q, e, rows, normalize_eps=eps, implementation=way), inputs
    )


@pytest.mark.parametrize("eps", [None, EPS])
def test_shared_candidates_and_stretches(eps: float | None) -> None:
    queries, table, _, _ = problem(11, 4, 30, 9)
    shared = torch.tensor([3, 1, 3, 29])
    cases: list[tuple[Tensor | range | slice, Tensor]] = [
        (shared, shared),
        (shared.int(), shared),
        (range(4, 21), torch.arange(4, 21)),
        (range(0, 30, 3), torch.arange(0, 30, 3)),
        (range(5, 5), torch.arange(0)),
        (slice(None), torch.arange(30)),
        (slice(-4, None), torch.arange(26, 30)),
    ]
    for rows, indices in cases:
        leaves = [x.clone().requires_grad_() for x in (queries, table)]
        scores = candidate_scores(*leaves, rows, normalize_eps=eps)
        if len(indices) == 0:
            assert scores.shape == (11, 0)
            continue
        weights = torch.linspace(-1, 1, scores.numel()).reshape(scores.shape)
        got = [scores.detach(), *torch.autograd.grad(scores, leaves, weights)]
        check(got, queries, table, indices.expand(11, -1), weights, eps)


@pytest.mark.parametrize("way", FAST)
def test_only_one_side_wants_a_gradient(way: str) -> None:
    queries, table, rows, grad = problem(12, 7, 40, 33)
    _, grad_queries, grad_table = run(way, queries, table, rows, grad, EPS)
    q, e = queries.clone().requires_grad_(), table.clone().requires_grad_()
    candidate_scores(q, table, rows, normalize_eps=EPS, implementation=way).backward(grad)
    candidate_scores(queries, e, rows, normalize_eps=EPS, implementation=way).backward(grad)
    assert q.grad is not None and torch.equal(q.grad, grad_queries)
    assert e.grad is not None and torch.equal(e.grad, grad_table)


@pytest.mark.parametrize("way", [*FAST, "reference"])
def test_the_first_bad_row_is_named(way: str) -> None:
    queries, table, rows, _ = problem(6, 5, 20, 8)
    rows[3, 2], rows[4, 0] = 20, -1
    with pytest.raises(IndexError, match=r"candidate row 20 \(query 3, candidate 2\) .* table of 20 rows"):
        candidate_scores(queries, table, rows, implementation=way)
    rows[1, 4] = -7
    with pytest.raises(IndexError, match=r"candidate row -7 \(query 1, candidate 4\)"):
        candidate_scores(queries, table, rows.int(), implementation=way)


def test_errors_say_what_is_wrong() -> None:
    queries, table, rows, _ = problem(6, 5, 20, 8)
    with pytest.raises(IndexError, match=r"candidate row 20 \(candidate 1\)"):
        candidate_scores(queries, table, torch.tensor([0, 20]))
    with pytest.raises(IndexError, match="outside the table of 20 rows"):
        candidate_scores(queries, table, range(15, 25))
    with pytest.raises(ValueError, match="same D"):
        candidate_scores(queries[:, :7], table, rows)
    with pytest.raises(ValueError, match="T = 6 queries"):
        candidate_scores(queries, table, rows[:5])
    with pytest.raises(TypeError, match="int64 or int32"):
        candidate_scores(queries, table, rows.float())
    with pytest.raises(TypeError, match="float dtype"):
        candidate_scores(queries.double(), table, rows)
    with pytest.raises(ValueError, match="normalize_eps"):
        candidate_scores(queries, table, rows, normalize_eps=0.0)
    with pytest.raises(ValueError, match="implementation must be 'auto' or one of"):
        candidate_scores(queries, table, rows, implementation="fast")


def test_the_choice_follows_the_cost() -> None:
    def explained(candidates: int, catalogue: int, **settings: Any) -> str:
        dtype = settings.pop("dtype", torch.float32)
        queries, table = torch.empty(2, 3, dtype=dtype), torch.empty(catalogue, 3, dtype=dtype)
        rows = torch.zeros(2, candidates, dtype=torch.int32)
        return explain(candidate_scores, queries, table, rows, **settings)

    assert explained(129, 695_762, dtype=torch.float64).startswith("gather (129 candidates x 45 ")
    assert explained(3000, 3883).startswith("dense (3000 candidates x ")
    assert explained(129, 3883).startswith(
        "cpp (129 candidates" if native.available() else "dense (129 candidates"
    )
    assert explained(3000, 3883, implementation="gather").startswith("gather (")
    queries, table = torch.empty(2, 3), torch.empty(9, 3)
    assert "one GEMM" in explain(candidate_scores, queries, table, range(4), implementation="cpp")
    with pytest.raises(ValueError, match=r"'cpp' can't run here: .*float64"):
        explained(5, 9, dtype=torch.float64, implementation="cpp")
