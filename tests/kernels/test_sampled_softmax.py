"""gr_kernels.sampled_softmax against the float64 definition, gradients included, for every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gr_kernels import native
from gr_kernels.dispatch import explain
from gr_kernels.sampled_softmax import sampled_softmax, triton_op
from tests.kernels.loss_problems import EPS, LEAVES, assert_precise, inputs, results
from tests.precision import UNIT

WAYS = ["triton", "scores"]
LOG_P = -2.0  # about the log share of an item among a few


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(
    tokens: int,
    catalogue: int,
    width: int,
    negatives: int,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """With negatives that hit the target, and one item drawn twice for everybody."""
    made = inputs(tokens, catalogue, width, dtype, device)
    shape = (negatives,) if shared else (tokens, negatives)
    rows = torch.randint(0, catalogue, shape, generator=torch.Generator().manual_seed(negatives)).to(device)
    if tokens and negatives > 2:
        rows[..., 1] = rows[..., 2]
        rows[..., 0] = made["targets"][0]
    return {**made, "negatives": rows}


def call(made: dict[str, Tensor], implementation: str, biased: bool = True, **settings: Any) -> Tensor:
    return sampled_softmax(
        made["queries"],
        made["table"],
        made["targets"],
        made["negatives"],
        weights_T=made["weights"],
        bias_I=made["bias"] if biased else None,
        implementation=implementation,
        **settings,
    )


# tokens, catalogue, width, negatives, dtype, normalize_eps
CASES = [
    (3, 5, 4, 1, torch.float32, None),
    (37, 11, 50, 33, torch.float32, EPS),
    (20, 90, 64, 70, torch.bfloat16, EPS),
    (18, 40, 33, 129, torch.bfloat16, None),
    (9, 30, 128, 40, torch.float16, EPS),
    (9, 30, 256, 20, torch.float32, None),
    (0, 5, 4, 3, torch.float32, None),
]
GPU_CASES = [
    (tokens, catalogue, width, negatives, dtype, eps)
    for tokens, catalogue, width, negatives in (
        (1000, 3883, 50, 128),
        (400, 50_021, 64, 512),
        (130, 999, 256, 257),
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for eps in (None, EPS)
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in GPU_CASES)], ids=str
)
def test_loss_and_gradients(case: tuple[Any, ...], shared: bool, way: str, device: torch.device) -> None:
    tokens, catalogue, width, negatives, dtype, eps = case
    made = problem(tokens, catalogue, width, negatives, shared, dtype, device)
    settings = {"scale": 20.0 if eps else width**-0.5, "normalize_eps": eps}
    found = results(lambda x: call(x, way, **settings), made)
    assert_precise(found, lambda x: call(x, "reference", **settings), made, scale=settings["scale"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shared", [False, True])
def test_without_bias_and_weights(shared: bool, way: str, device: torch.device) -> None:
    made = problem(7, 30, 20, 12, shared, torch.float32, device)

    def loss(x: dict[str, Tensor], implementation: str) -> Tensor:
        return sampled_softmax(
            x["queries"], x["table"], x["targets"], x["negatives"], implementation=implementation
        )

    leaves = ("queries", "table")
    found = results(lambda x: loss(x, way), made, None, leaves)
    assert_precise(found, lambda x: loss(x, "reference"), made, leaves)


@pytest.mark.parametrize("way", ["reference", *WAYS])
@pytest.mark.parametrize("shared", [False, True])
def test_a_target_alone_has_no_loss(shared: bool, way: str, device: torch.device) -> None:
    """Every negative is the target, or there is none: probability one, nothing moves."""
    made = inputs(4, 9, 6, torch.float32, device)
    made["targets"][:] = 5
    for negatives in (3, 0):
        shape = (negatives,) if shared else (4, negatives)
        made["negatives"] = torch.full(shape, 5, device=device)
        found = results(lambda x: call(x, way), made)
        assert_precise(found, lambda x: call(x, "reference"), made)
        # a share of 1, made of a quotient and a difference, and a loss of its logarithm, times terms of unit scale
        most = 8 * UNIT[torch.float32] * float(made["queries"].abs().max() + made["table"].abs().max())
        assert all(float(value.abs().max()) <= most for value in found.values())


@pytest.mark.parametrize("way", WAYS)
def test_all_items_as_negatives_make_the_full_softmax(way: str, device: torch.device) -> None:
    """The target among them counts once."""
    made = inputs(6, 20, 10, torch.float32, device)
    made["negatives"] = torch.arange(20, device=device)

    def full(x: dict[str, Tensor]) -> Tensor:
        logits = x["queries"] @ x["table"].t() + x["bias"]
        losses = torch.nn.functional.cross_entropy(logits, x["targets"], reduction="none")
        return (losses * x["weights"]).sum()

    assert_precise(results(lambda x: call(x, way), made), full, made)
    made["negatives"] = made["negatives"].expand(6, -1).int()
    assert_precise(results(lambda x: call(x, way), made), full, made)


@pytest.mark.parametrize("way", WAYS)
def test_in_batch_softmax_debiased(way: str, device: torch.device) -> None:
    """As the README says: the batch's targets are everyone's candidates, scores lowered by log p of their items."""
    made = inputs(25, 10, 8, torch.float32, device)  # targets repeat
    made["log_p"] = torch.linspace(LOG_P - 1, LOG_P + 1, 10, device=device)
    cosine = 1e-6

    def loss(x: dict[str, Tensor]) -> Tensor:
        return sampled_softmax(
            x["queries"],
            x["table"],
            x["targets"],
            x["targets"],
            scale=20.0,
            normalize_eps=cosine,
            bias_I=-x["log_p"],
            implementation=way,
        )

    def by_the_formula(x: dict[str, Tensor]) -> Tensor:
        rows = x["table"] / x["table"].norm(dim=1, keepdim=True).clamp_min(cosine)
        corrected = 20.0 * x["queries"] @ rows.t() - x["log_p"]
        total = x["queries"].new_zeros(())
        for t, target in enumerate(x["targets"].tolist()):
            candidates = [other for other in x["targets"].tolist() if other != target]
            terms = corrected[t, [target, *candidates]]
            total = total + torch.logsumexp(terms, 0) - terms[0]
        return total

    leaves = ("queries", "table")
    assert_precise(results(loss, made, None, leaves), by_the_formula, made, leaves)


@pytest.mark.parametrize("way", ["reference", *WAYS])
@pytest.mark.parametrize("shared", [False, True])
def test_a_target_without_a_chance(shared: bool, way: str, device: torch.device) -> None:
    """A bias of -inf: its loss is infinite, the gradients are those of the others' shares and of its own, 0 - 1."""
    made = problem(5, 12, 6, 4, shared, torch.float32, device)
    made["targets"][0], made["bias"][7] = 7, -torch.inf
    found = results(lambda x: call(x, way), made)
    assert float(found["out"]) == torch.inf
    assert all(bool(found[name].isfinite().all()) for name in ("queries", "table", "bias"))
    assert_precise(found, lambda x: call(x, "reference"), made)


@pytest.mark.parametrize("way", ["reference", *WAYS])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_where_nothing_has_a_chance(shared: bool, way: str, device: torch.device) -> None:
    """0 / 0: the loss and the gradients of the query are NaN."""
    made = problem(5, 12, 6, 4, shared, torch.float32, device)
    made["bias"][:] = -torch.inf
    found = results(lambda x: call(x, way), made)
    assert bool(found["out"].isnan()) and bool(found["queries"].isnan().all())


@pytest.mark.parametrize("way", ["reference", *WAYS])
@pytest.mark.parametrize("biased", [False, True])
def test_counts_stand_for_repeated_negatives(way: str, biased: bool, device: torch.device) -> None:
    made = inputs(25, 10, 8, torch.float32, device)  # targets are among the negatives
    drawn = torch.tensor([3, 3, 3, 0, 7, 7, 9, 1], device=device)
    counts = torch.bincount(drawn, minlength=10)
    repeated, counted = {**made, "negatives": drawn}, {**made, "negatives": torch.arange(10, device=device)}
    found = results(lambda x: call(x, way, biased, counts_K=counts), counted, None, LEAVES[: 2 + biased])
    assert_precise(found, lambda x: call(x, "reference", biased), repeated, LEAVES[: 2 + biased])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_shared_scores(dtype: torch.dtype) -> None:
    made = problem(30, 25, 12, 17, True, dtype, torch.device("cpu"))
    for max_scores in (1, 17 * 7):
        found = results(
            lambda x, most=max_scores: call(x, "scores", normalize_eps=EPS, max_scores=most), made
        )
        assert_precise(found, lambda x: call(x, "reference", normalize_eps=EPS), made)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wanted", [("queries",), ("table",), ("bias",), ()])
def test_only_the_gradients_asked_for(
    wanted: tuple[str, ...], shared: bool, way: str, device: torch.device
) -> None:
    made = problem(6, 14, 8, 5, shared, torch.float32, device)
    if not wanted:
        with torch.no_grad():
            made["queries"].requires_grad_()
            assert not call(made, way).requires_grad
        return
    some = results(lambda x: call(x, way), made, wanted=wanted)
    assert_precise(some, lambda x: call(x, "reference"), made, wanted)


@pytest.mark.parametrize("shared", [False, True])
def test_triton_gives_the_same_bits_again(shared: bool, device: torch.device) -> None:
    made = problem(40, 9, 16, 20, shared, torch.bfloat16, device)
    first, second = (results(lambda x: call(x, "triton", normalize_eps=EPS), made) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", ["reference", *WAYS])
def test_large_logits(shared: bool, way: str, device: torch.device) -> None:
    made = problem(5, 12, 6, 4, shared, torch.float32, device)
    found = results(lambda x: call(x, way, scale=1e4), made)
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_rows_of_32_bits_and_strided_negatives(device: torch.device) -> None:
    made = problem(7, 15, 8, 6, False, torch.float32, device)
    wide = torch.cat([made["negatives"], made["negatives"]], dim=1).int()
    for way in WAYS:
        for rows in (made["negatives"].int(), wide[:, :6], made["negatives"].t().contiguous().t()):
            found = results(lambda x, rows=rows, way=way: call({**x, "negatives": rows}, way), made)
            assert_precise(found, lambda x: call(x, "reference"), made)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_by_finite_differences(shared: bool) -> None:
    made = problem(4, 6, 3, 5, shared, torch.float64, torch.device("cpu"))
    made["table"][2] = torch.tensor([0.5, -1.0, 0.25])
    leaves = [made[name].double().requires_grad_() for name in ("queries", "table", "bias")]
    made["weights"] = made["weights"].double()

    def loss(queries: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        made_now = {**made, "queries": queries, "table": table, "bias": bias}
        return call(made_now, "scores", scale=1.5, normalize_eps=EPS, max_scores=10)

    assert torch.autograd.gradcheck(loss, leaves)


def test_triton_under_torch_library(device: torch.device) -> None:
    """The operator's schema, meta implementation and autograd agree with what it does."""
    made = problem(4, 9, 8, 3, False, torch.float32, device)
    leaves = [made[name].requires_grad_() for name in ("queries", "table", "bias")]
    arguments = (*leaves, made["targets"], made["negatives"], 0.5, EPS, True)
    triton_op.register()
    torch.library.opcheck(torch.ops.gr_kernels.sampled_softmax_triton, arguments)


def test_the_choice_and_errors_say_why() -> None:
    made = problem(6, 20, 8, 5, False, torch.float32, torch.device("cpu"))
    queries, table, targets, negatives = (made[n] for n in ("queries", "table", "targets", "negatives"))
    line = explain(sampled_softmax, queries, table, targets, negatives)
    assert line.startswith("scores (") and "triton can't: it is for cuda" in line
    with pytest.raises(ValueError, match=r"'triton' can't run here: .*float64"):
        sampled_softmax(queries.double(), table.double(), targets, negatives, implementation="triton")
    with pytest.raises(ValueError, match="'auto' or one of 'triton', 'scores', 'reference', not 'fast'"):
        sampled_softmax(queries, table, targets, negatives, implementation="fast")
    with pytest.raises(ValueError, match="same D"):
        sampled_softmax(queries[:, :7], table, targets, negatives)
    with pytest.raises(TypeError, match="negatives must be int64 or int32"):
        sampled_softmax(queries, table, targets, negatives.float())
    with pytest.raises(ValueError, match=r"targets must be \(6,\)"):
        sampled_softmax(queries, table, targets[:4], negatives)
    with pytest.raises(ValueError, match=r"negatives must be .* T = 6 queries"):
        sampled_softmax(queries, table, targets, negatives[:4])
    with pytest.raises(ValueError, match="bias must be"):
        sampled_softmax(queries, table, targets, negatives, bias_I=torch.zeros(6))
    for counts, rows in ((torch.ones(5), negatives), (torch.ones(4), negatives[0])):
        with pytest.raises(ValueError, match=r"counts must be \(K,\), one of each shared negative"):
            sampled_softmax(queries, table, targets, rows, counts_K=counts)
    negatives[3, 2] = 20
    with pytest.raises(
        IndexError, match=r"negative row 20 \(query 3, negative 2\) is outside the table of 20"
    ):
        sampled_softmax(queries, table, targets, negatives)
    targets[1] = -1
    with pytest.raises(IndexError, match=r"target row -1 \(target 1\)"):
        sampled_softmax(queries, table, targets, negatives)


@pytest.mark.skipif(not native.available(), reason="the C++ operators are not built")
def test_own_negatives_are_scored_by_the_c_operator() -> None:
    """float32 on CPU: not by the slower ways."""
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    made = problem(6, 2000, 8, 5, False, torch.float32, torch.device("cpu"))
    with Calls():
        call(made, "auto")
    assert torch.ops.gr_kernels.candidate_scores.default in called
