"""gr_kernels.log_partition against the float64 definitions, gradients included, whatever the way and the chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gr_kernels import native, products
from gr_kernels.dispatch import explain
from gr_kernels.log_partition import cross_entropy, log_partition, op, triton_op
from gr_kernels.log_partition.tiles import MOST_SPLITS, splits
from tests.kernels.loss_problems import assert_precise, inputs as problem_in, results
from tests.precision import UNIT, analysed, assert_within

EPS = 1e-6
ULP = 2.0**-23
needs_cpp = pytest.mark.skipif(not native.available(), reason=native.why_unavailable())
BOTH = [pytest.param("cpp", marks=needs_cpp), "chunked"]
# The C++ operator's tiles are its own, whatever max_scores says.
WAYS = [
    pytest.param({"implementation": "cpp"}, id="cpp", marks=needs_cpp),
    *(
        pytest.param({"implementation": "chunked", "max_scores": most}, id=f"chunked-{most}")
        for most in (1, 1000, 1 << 24)
    ),
]

OPERATORS = {"log_partition": log_partition, "cross_entropy": cross_entropy}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(tokens: int, catalogue: int, width: int) -> dict[str, Tensor]:
    """Unit-scale queries, table (with a zero row and one below eps) and bias; targets and uneven weights."""
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(catalogue, width, generator=generator)
    if catalogue > 2:
        table[1], table[2] = 0, table[2] * EPS / 100
    return {
        "queries": torch.randn(tokens, width, generator=generator),
        "table": table,
        "bias": torch.randn(catalogue, generator=generator),
        "targets": torch.randint(0, catalogue, (tokens,), generator=generator),
        "weights": torch.randn(tokens, generator=generator),
    }


def evaluate(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The value (per token or scalar), and the gradients of queries, table and bias."""
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    leaves = [cast[name].requires_grad_() for name in ("queries", "table", "bias")]
    value = function(cast)
    upstream = cast["weights"].detach() if value.dim() else torch.tensor(0.7, dtype=dtype)
    gradients = torch.autograd.grad(value, leaves, upstream)
    return {"value": value.detach(), **dict(zip(("queries", "table", "bias"), gradients))}


Shape = tuple[int, int, int]


@functools.cache
def definition(
    name: str, shape: Shape, scale: float, eps: float | None, weighted: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The exact results and their bounds, for every way."""
    function = functools.partial(OPERATORS[name], scale=scale, normalize_eps=eps, implementation="reference")
    inputs = problem(*shape)
    return analysed(
        lambda: evaluate(lambda x: ask(function, name, x, weighted), inputs, torch.float64), torch.float32
    )


def ask(function: Callable[..., Tensor], name: str, x: dict[str, Tensor], weighted: bool) -> Tensor:
    if name == "log_partition":
        return function(x["queries"], x["table"], bias_I=x["bias"])
    weights = x["weights"].detach() if weighted else None
    return function(x["queries"], x["table"], x["targets"], weights_T=weights, bias_I=x["bias"])


# The last catalogue is too large for the C++ operator to keep a block's scores: it forms them twice.
SHAPES = [
    (0, 5, 4),
    (1, 1, 3),
    (13, 7, 5),
    (130, 301, 33),
    (7, 2000, 64),
    (1, 3883, 64),
    (67, 3883, 50),
    (131, 20011, 7),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale", "eps"), [(1.0, None), (20.0, EPS)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "weighted"), [("log_partition", False), ("cross_entropy", False), ("cross_entropy", True)]
)
def test_values_and_gradients(
    name: str, weighted: bool, shape: Shape, scale: float, eps: float | None, way: dict[str, Any]
) -> None:
    function = functools.partial(OPERATORS[name], scale=scale, normalize_eps=eps, **way)
    found = evaluate(lambda x: ask(function, name, x, weighted), problem(*shape), torch.float32)
    assert_within(found, *definition(name, shape, scale, eps, weighted), torch.float32)


@pytest.mark.parametrize("max_scores", [1, 1 << 24])
def test_no_sum_over_the_catalogue_is_longer_than_a_block(max_scores: int) -> None:
    """Whatever the processor's BLAS does with one row: of 2^24 + 1 + 1 + ... in float32, added in turn, no 1 arrives.

    Equal logits: the queries' gradient is the mean of the table's rows, whose terms, shares of 2^-14, are exact. The
    first 64 rows are large, for routines that add up every 8th or 16th row apart.
    """
    catalogue, large = 2**14, 64
    table = torch.ones(catalogue, 64)
    table[:large] = 2.0**24
    queries = torch.zeros(2, 64, requires_grad=True)
    log_partition(queries, table, implementation="chunked", max_scores=max_scores).sum().backward()
    assert queries.grad is not None
    exact = large * 2**24 + catalogue - large
    lost = (exact - queries.grad.double() * catalogue).abs().max()
    # at most the ones of the block that holds the large rows, and what adding the blocks' sums rounds
    blocks = -(-catalogue // products.BLOCK)
    assert float(lost) <= products.BLOCK + (blocks + 1) * UNIT[torch.float32] * exact


@pytest.mark.parametrize("eps", [None, EPS])
def test_gradients_by_finite_differences(eps: float | None) -> None:
    inputs = problem(5, 6, 3)
    inputs["table"][1:3] = torch.randn(2, 3)
    leaves = tuple(inputs[name].double().requires_grad_() for name in ("queries", "table", "bias"))
    weights = inputs["weights"].double()
    kwargs = {"scale": 1.5, "normalize_eps": eps, "max_scores": 13}
    assert torch.autograd.gradcheck(lambda q, e, b: log_partition(q, e, bias_I=b, **kwargs), leaves)
    assert torch.autograd.gradcheck(
        lambda q, e, b: cross_entropy(q, e, inputs["targets"], weights_T=weights, bias_I=b, **kwargs), leaves
    )


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("wanted", [("queries",), ("table",), ("bias",), ("queries", "table"), ()])
def test_only_the_gradients_asked_for(wanted: tuple[str, ...], implementation: str) -> None:
    made = problem_in(40, 90, 17, torch.float32, torch.device("cpu"))
    for name in ("log_partition", "cross_entropy"):
        if not wanted:
            value = call(name, made, implementation, max_scores=500)
            assert not value.requires_grad
            continue
        found = results(
            lambda x, name=name: call(name, x, implementation, max_scores=500), made, wanted=wanted
        )
        assert_precise(found, lambda x, name=name: call(name, x, "reference"), made, wanted)


@pytest.mark.parametrize("implementation", BOTH)
def test_no_grad_forms_no_gradient(implementation: str) -> None:
    inputs = problem(40, 90, 17)
    queries, table = inputs["queries"].requires_grad_(), inputs["table"].requires_grad_()
    with torch.no_grad():
        loss = cross_entropy(queries, table, inputs["targets"], implementation=implementation)
        value = log_partition(queries, table, implementation=implementation)
    assert not loss.requires_grad and not value.requires_grad
    exact, allowed = analysed(
        lambda: {
            "value": log_partition(
                queries.detach().double(), table.detach().double(), implementation="reference"
            )
        },
        torch.float32,
    )
    assert_within({"value": value}, exact, allowed)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("shape", [(200, 400, 9), (300, 500, 20), (1111, 70, 16), (301, 18000, 5)])
def test_two_runs_give_the_same_bits_and_backward_may_run_twice(
    implementation: str, shape: tuple[int, int, int]
) -> None:
    """On the C++ operator, whatever the number of threads."""
    inputs = problem(*shape)
    results = []
    for threads in (1, 2, 3, 1) if implementation == "cpp" else (1, 1):
        torch.set_num_threads(threads)
        leaves = [inputs[name].clone().requires_grad_() for name in ("queries", "table", "bias")]
        loss = cross_entropy(
            *leaves[:2],
            inputs["targets"],
            bias_I=leaves[2],
            scale=20.0,
            normalize_eps=EPS,
            max_scores=90000,
            implementation=implementation,
        )
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves)))
        results.append([loss.detach(), *first])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("implementation", BOTH)
def test_extreme_logits_and_nan(implementation: str) -> None:
    queries = torch.tensor([[100.0, 0.0], [0.0, -100.0], [float("nan"), 1.0]])
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    got = log_partition(queries, table, scale=50.0, implementation=implementation)
    assert got[:2].tolist() == [5000.0, 5000.0] and bool(got[2].isnan())
    # a target of probability 0 in float32 still has the right, finite loss
    loss = cross_entropy(queries[:1], table, torch.tensor([2]), scale=50.0, implementation=implementation)
    assert float(loss) == 10000.0
    loss = cross_entropy(queries, table, torch.tensor([0, 1, 2]), implementation=implementation)
    assert bool(loss.isnan())


@needs_cpp
@pytest.mark.parametrize("catalogue", [40, 18000])
@pytest.mark.parametrize("spoilt", ["masked", "all masked", "queries", "table", "infinite queries", "weight"])
def test_masks_nan_and_infinities_spread_alike(catalogue: int, spoilt: str) -> None:
    """A bias of -inf takes items out; what isn't finite reaches the same gradients either way."""
    inputs = problem(5, catalogue, 6)
    inputs["targets"][:] = catalogue - 1
    if "masked" in spoilt:
        inputs["bias"][: catalogue if spoilt == "all masked" else catalogue // 2] = -torch.inf
    elif spoilt == "weight":
        inputs["weights"][3] = torch.nan
    else:
        inputs[spoilt.split()[-1]][3, 2] = torch.inf if "infinite" in spoilt else torch.nan
    got, wanted = (
        [
            *evaluate(
                lambda x, way=way: log_partition(
                    x["queries"], x["table"], bias_I=x["bias"], implementation=way
                ),
                inputs,
                torch.float32,
            ).values(),
            *evaluate(
                lambda x, way=way: cross_entropy(
                    x["queries"],
                    x["table"],
                    x["targets"],
                    weights_T=x["weights"].detach(),
                    bias_I=x["bias"],
                    implementation=way,
                ),
                inputs,
                torch.float32,
            ).values(),
        ]
        for way in ("cpp", "chunked")
    )
    for a, b in zip(got, wanted):
        assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a.isnan(), b.isnan())
        infinite = a.isinf()
        assert torch.equal(a[infinite], b[infinite])


def test_the_way_is_chosen_by_device_and_dtype() -> None:
    inputs = problem(6, 20, 8)
    queries, table, double = inputs["queries"], inputs["table"], inputs["queries"].double()
    targets, nobody = inputs["targets"], torch.full((6, 1), -1)
    assert explain(log_partition, queries, table).startswith("cpp (" if native.available() else "chunked (")
    assert explain(cross_entropy, queries, table, targets).startswith(
        "cpp" if native.available() else "chunked"
    )
    for reason, line in {
        "float64 on cpu": explain(log_partition, double, table.double()),
        "a float32 bias": explain(log_partition, queries, table, bias_I=inputs["bias"].double()),
        "no excluded items": explain(log_partition, queries, table, excluded_TX=nobody),
    }.items():
        assert line.startswith("chunked (") and reason in line and "triton can't: it is for cuda" in line
    with pytest.raises(ValueError, match=r"'cpp' can't run here: .*float64"):
        log_partition(double, table.double(), implementation="cpp")
    with pytest.raises(ValueError, match=r"'triton' can't run here: it takes float32.* not torch.float64"):
        log_partition(double, table.double(), implementation="triton")
    with pytest.raises(ValueError, match=r"'auto' or one of .*'chunked', 'reference', not 'fast'"):
        log_partition(queries, table, implementation="fast")


@needs_cpp
def test_the_operator_knows_its_shapes_without_data() -> None:
    queries, table = (torch.empty(rows, 8, device="meta") for rows in (6, 20))
    results = torch.ops.gr_kernels.full_softmax(queries, table, None, None, None, 1.0, True, False, True)
    assert [tuple(x.shape) for x in results] == [(6,), (6, 8), (0, 8), (20,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_have_float32_sums(dtype: torch.dtype) -> None:
    made = problem_in(50, 200, 32, dtype, torch.device("cpu"))
    found = results(lambda x: call("cross_entropy", x, "chunked", max_scores=2000), made)
    assert_precise(found, lambda x: call("cross_entropy", x, "reference"), made)


@pytest.mark.parametrize("implementation", BOTH)
def test_strided_queries_and_autocast(implementation: str) -> None:
    inputs = problem(30, 40, 16)
    strided = inputs["queries"].t().contiguous().t()

    def loss(queries: Tensor) -> Tensor:
        return cross_entropy(queries, inputs["table"], inputs["targets"], implementation=implementation)

    plain = loss(inputs["queries"])
    exact, allowed = analysed(
        lambda: {
            "loss": cross_entropy(
                inputs["queries"].double(),
                inputs["table"].double(),
                inputs["targets"],
                implementation="reference",
            )
        },
        torch.float32,
    )
    for value in (loss(strided), plain):
        assert_within({"loss": value}, exact, allowed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(inputs["queries"]), plain)


@pytest.mark.parametrize("implementation", [*BOTH, "triton"])
@pytest.mark.parametrize("name", ["log_partition", "cross_entropy"])
def test_autocast_leaves_the_gradients_alone(name: str, implementation: str, device: torch.device) -> None:
    """The inputs' dtype is the products', whatever autocast is on; the table is long enough for several parts."""
    made = problem_in(9, 300, 16, torch.float32, torch.device("cpu") if implementation == "cpp" else device)
    plain = results(lambda x: call(name, x, implementation), made)
    with torch.autocast(made["queries"].device.type, dtype=torch.bfloat16):
        found = results(lambda x: call(name, x, implementation), made)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def excluding(made: dict[str, Tensor], names: bool) -> dict[str, Any]:
    """Three excluded items a query (-1 and repetitions among them; all items for one query of small tables)."""
    tokens, catalogue = len(made["queries"]), len(made["table"])
    device = made["table"].device
    excluded = (torch.arange(3 * tokens, device=device).reshape(tokens, 3) * 7) % (catalogue + 1) - 1
    if tokens > 3:
        excluded[1, 1], excluded[2] = excluded[1, 0], -1
        excluded[3] = torch.arange(3, device=device).clamp_max(catalogue - 1)
    if not names:
        return {"excluded_TX": excluded}
    # the table holds every item three times
    return {"excluded_TX": excluded, "names_I": torch.arange(catalogue, device=device) // 3}


def call(
    name: str, made: dict[str, Tensor], implementation: str, names: bool | None = None, **settings: Any
) -> Tensor:
    """One of the two functions; names: whether queries exclude items, by name or by row (None: no)."""
    kwargs: dict[str, Any] = {"bias_I": made.get("bias"), "implementation": implementation, **settings}
    if names is not None:
        kwargs |= excluding(made, names)
    if name == "log_partition":
        return log_partition(made["queries"], made["table"], **kwargs)
    return cross_entropy(made["queries"], made["table"], made["targets"], weights_T=made["weights"], **kwargs)


# tokens, catalogue, width, dtype, normalize_eps, names; sizes around the tiles' edges (128 and 64 rows)
TRITON_CASES = [
    (5, 6, 4, torch.float32, None, False),
    (129, 63, 50, torch.float32, EPS, None),
    (65, 193, 16, torch.bfloat16, None, True),
    (70, 130, 33, torch.bfloat16, EPS, False),
    (9, 300, 64, torch.float16, EPS, None),
    (4, 70, 128, torch.bfloat16, None, None),
    (3, 65, 200, torch.float16, None, False),
    (19, 70, 256, torch.float32, EPS, True),
    (0, 5, 4, torch.float32, None, None),
]
GPU_CASES = [
    (tokens, catalogue, width, dtype, eps, names)
    for tokens, catalogue, width in ((1000, 3883, 50), (513, 20_011, 64), (300, 5001, 128), (257, 4099, 256))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for eps in (None, EPS)
    for names in (None, False, True)
]


@pytest.mark.parametrize("name", ["log_partition", "cross_entropy"])
@pytest.mark.parametrize(
    "case", [*TRITON_CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in GPU_CASES)], ids=str
)
def test_triton(name: str, case: tuple[Any, ...], device: torch.device) -> None:
    tokens, catalogue, width, dtype, eps, names = case
    made = problem_in(tokens, catalogue, width, dtype, device)
    settings = {"scale": 20.0 if eps else width**-0.5, "normalize_eps": eps, "names": names}
    found = results(lambda x: call(name, x, "triton", **settings), made)
    assert_precise(found, lambda x: call(name, x, "reference", **settings), made, scale=settings["scale"])


def test_triton_of_one_item(device: torch.device) -> None:
    made = problem_in(3, 1, 5, torch.float32, device)
    for name in ("log_partition", "cross_entropy"):
        found = results(lambda x, name=name: call(name, x, "triton"), made)
        assert_precise(found, lambda x, name=name: call(name, x, "reference"), made)


@pytest.mark.parametrize("name", ["log_partition", "cross_entropy"])
@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("max_scores", [100, 1 << 20])
def test_excluded_items_in_chunks(name: str, names: bool, max_scores: int) -> None:
    made = problem_in(37, 21, 6, torch.float32, torch.device("cpu"))
    found = results(lambda x: call(name, x, "chunked", names, max_scores=max_scores), made)
    assert_precise(found, lambda x: call(name, x, "reference", names), made)


@pytest.mark.parametrize("implementation", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("wanted", [("queries",), ("queries", "table", "bias")])
def test_a_query_that_sees_nothing(
    implementation: str, wanted: tuple[str, ...], device: torch.device
) -> None:
    """An empty sum is -inf, and moves nothing; the other queries' gradients are theirs alone."""
    made = problem_in(4, 3, 5, torch.float32, device)
    excluded = torch.tensor([[0, 1, 2], [0, 0, 1], [-1, -1, -1], [2, 1, 0]], device=device)

    def partition(x: dict[str, Tensor]) -> Tensor:
        return log_partition(x["queries"], x["table"], excluded_TX=excluded, implementation=implementation)

    leaves = [name for name in wanted if name != "bias"]
    found = results(partition, made, wanted=leaves)
    assert found["out"].isneginf().tolist() == [True, False, False, True]
    assert found["queries"][0].abs().sum() == 0 and found["queries"][3].abs().sum() == 0
    seen = {n: x[1:3] if n in ("queries", "weights") else x for n, x in made.items()}
    rest = {n: x[1:3] if n in ("out", "queries") else x for n, x in found.items()}
    assert_precise(
        rest,
        lambda x: log_partition(
            x["queries"], x["table"], excluded_TX=excluded[1:3], implementation="reference"
        ),
        seen,
        leaves,
    )


@pytest.mark.parametrize("implementation", [*BOTH, "triton", "reference"])
@pytest.mark.parametrize("wanted", [("queries",), ("queries", "table", "bias")])
def test_where_no_item_is_left(implementation: str, wanted: tuple[str, ...], device: torch.device) -> None:
    """Biases of -inf: an empty sum is -inf and moves nothing, however its gradient is weighed."""
    made = problem_in(5, 40, 6, torch.float32, torch.device("cpu") if implementation == "cpp" else device)
    made["bias"][:] = -torch.inf
    partition = results(lambda x: call("log_partition", x, implementation), made, wanted=wanted)
    assert bool(partition["out"].isneginf().all())
    assert all(float(partition[name].abs().max()) == 0 for name in wanted)
    # nobody can be the target: 0 / 0, as in PyTorch
    loss = results(lambda x: call("cross_entropy", x, implementation), made, wanted=wanted)
    assert all(bool(value.isnan().all()) for value in loss.values())


@pytest.mark.parametrize("implementation", [*BOTH, "triton", "reference"])
def test_a_target_without_a_chance(implementation: str, device: torch.device) -> None:
    """Its loss is infinite, the gradients are those of the others' shares and of its own, 0 - 1."""
    made = problem_in(5, 40, 6, torch.float32, torch.device("cpu") if implementation == "cpp" else device)
    made["bias"][made["targets"][0]] = -torch.inf
    found = results(lambda x: call("cross_entropy", x, implementation), made)
    assert float(found["out"]) == torch.inf
    assert_precise(found, lambda x: call("cross_entropy", x, "reference"), made)


def test_an_excluded_target_still_counts() -> None:
    made = problem_in(5, 8, 4, torch.float32, torch.device("cpu"))
    others = (made["targets"] + 1) % 8
    both = torch.stack([made["targets"], others], dim=1)
    kept, meant = (
        cross_entropy(made["queries"], made["table"], made["targets"], excluded_TX=excluded)
        for excluded in (both, others[:, None])
    )
    assert torch.equal(kept, meant) and bool(meant.isfinite())


@pytest.mark.parametrize("wanted", [("queries",), ("table",), ("bias",), ("queries", "bias")])
def test_triton_forms_only_the_gradients_asked_for(wanted: tuple[str, ...], device: torch.device) -> None:
    made = problem_in(9, 70, 17, torch.float32, device)
    some = results(lambda x: call("cross_entropy", x, "triton"), made, wanted=wanted)
    assert_precise(some, lambda x: call("cross_entropy", x, "reference"), made, wanted)


def test_triton_gives_the_same_bits_again(device: torch.device) -> None:
    made = problem_in(70, 200, 20, torch.bfloat16, device)
    first, second = (results(lambda x: call("cross_entropy", x, "triton", True), made) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_triton_has_extreme_logits_and_spreads_what_is_not_finite(device: torch.device) -> None:
    queries = torch.tensor([[100.0, 0.0], [0.0, -100.0], [float("nan"), 1.0]], device=device)
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], device=device)
    found = log_partition(queries, table, scale=50.0, implementation="triton")
    # 5000 log2(e) / log2(e): a constant, a product, a quotient
    assert float((found[:2] / 5000.0 - 1).abs().max()) <= 3 * UNIT[torch.float32]
    assert bool(found[2].isnan())
    bias = torch.tensor([0.0, -torch.inf, 0.0], device=device)  # an item taken out for everybody
    without = log_partition(queries[:2], table, bias_I=bias, implementation="triton")
    exact, allowed = analysed(
        lambda: {
            "value": log_partition(queries[:2].double(), table[[0, 2]].double(), implementation="reference")
        },
        torch.float32,
    )
    assert_within({"value": without}, exact, allowed)


def test_triton_under_torch_library(device: torch.device) -> None:
    """The operator's schema, meta implementation and autograd agree with what it does."""
    made = problem_in(5, 20, 8, torch.float32, device)
    leaves = [made[name].requires_grad_() for name in ("queries", "table", "bias")]
    nobody = torch.full((5, 1), -1, device=device)
    arguments = (*leaves, made["targets"], nobody, None, 0.5, EPS, True)
    triton_op.register()
    torch.library.opcheck(torch.ops.gr_kernels.log_partition_triton, arguments)


def test_triton_is_one_node_of_an_exported_program(device: torch.device) -> None:
    class Partition(torch.nn.Module):
        def forward(self, queries: Tensor, table: Tensor) -> Tensor:
            return log_partition(queries, table, normalize_eps=EPS, implementation="triton")

    queries, table = torch.randn(5, 8, device=device), torch.randn(20, 8, device=device)
    program = torch.export.export(Partition(), (queries, table))
    nodes = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert nodes.count("gr_kernels.log_partition_triton.default") == 1
    assert torch.equal(program.module()(queries, table), Partition()(queries, table))


def test_the_table_is_split_until_the_gpu_is_busy() -> None:
    assert splits(128, 10_000, 132) == 1  # one round, nearly full
    assert splits(64, 10_000, 132) == 2
    assert splits(1, 10_000, 132) == MOST_SPLITS and splits(1, 3, 132) == 3
    assert splits(140, 10_000, 132) == 8  # 9 rounds of an eighth each, rather than 2 whole ones
    assert splits(0, 5, 132) == 1


def test_triton_holds_no_logits() -> None:
    """What the forward pass keeps and gives grows with T x D, not with T x I."""
    triton_op.register()
    meta = {"device": "meta"}
    sizes = []
    for catalogue in (1000, 1_000_000):
        out = torch.ops.gr_kernels.log_partition_triton(
            torch.empty(64, 32, **meta),
            torch.empty(catalogue, 32, **meta),
            None,
            None,
            None,
            None,
            1.0,
            None,
            True,
        )
        sizes.append([x.numel() for x in out])
    assert sizes[0] == sizes[1] == [64, 64, 64, 64 * 32]


@pytest.mark.gpu
def test_triton_memory_on_a_gpu_does_not_depend_on_the_catalogue() -> None:
    peaks = []
    for catalogue in (20_000, 1_000_000):
        queries = torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        table = torch.randn(catalogue, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(0, catalogue, (4096,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cross_entropy(queries, table, targets, implementation="triton").backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - table.numel() * 2)
    assert abs(peaks[1] - peaks[0]) < 16 << 20


def test_every_implementation_is_listed_once() -> None:
    assert [way.name for way in op.IMPLEMENTATIONS] == ["cpp", "triton", "chunked", "reference"]


def test_errors_say_what_is_wrong() -> None:
    inputs = problem(6, 20, 8)
    queries, table, targets = inputs["queries"], inputs["table"], inputs["targets"]
    with pytest.raises(ValueError, match="same D"):
        log_partition(queries[:, :7], table)
    with pytest.raises(ValueError, match="no rows"):
        log_partition(queries, table[:0])
    with pytest.raises(ValueError, match="bias must be"):
        log_partition(queries, table, bias_I=inputs["bias"][:5])
    with pytest.raises(ValueError, match="excluded must be \\(6, X\\) integers"):
        log_partition(queries, table, excluded_TX=targets)
    with pytest.raises(ValueError, match="names must be \\(20,\\) integers"):
        log_partition(queries, table, names_I=targets)
    with pytest.raises(IndexError, match=r"excluded row 20 \(query 3\) is outside the table of 20 rows"):
        log_partition(queries, table, excluded_TX=torch.tensor([-1, 3, 4, 20, 1, 2])[:, None])
    with pytest.raises(ValueError, match="max_scores"):
        log_partition(queries, table, max_scores=0)
    with pytest.raises(ValueError, match="targets must be"):
        cross_entropy(queries, table, targets[:3])
    with pytest.raises(ValueError, match="weights must be"):
        cross_entropy(queries, table, targets, weights_T=inputs["weights"][:3])
    targets[4] = 20
    with pytest.raises(IndexError, match=r"target row 20 \(target 4\) is outside the table of 20 rows"):
        cross_entropy(queries, table, targets)
