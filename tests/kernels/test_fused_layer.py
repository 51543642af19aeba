"""norm_linear_silu and gated_output: each implementation against float64, gradients included, and what they keep."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.counter_random import philox
from gr_kernels.dispatch import explain
from gr_kernels.fused_layer import gated_output, norm_linear_silu, norm_linear_silu_parts
from gr_kernels.hstu_attention import hstu_attention
from tests.precision import analysed, assert_within, tolerance

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-6
IMPLEMENTATIONS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEY = 2**63 + 2**31 + 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: unit-scale inputs by name in float32, and the gradient of its result."""

    inputs: dict[str, Tensor]
    d_out: Tensor


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def linear_case(rows: int, width: int, outputs: int, affine: bool, bias: bool) -> Case:
    generator = torch.Generator().manual_seed(rows + width)
    inputs = {"x": unit(generator, rows, width), "weight": unit(generator, outputs, width) / math.sqrt(width)}
    if affine:
        inputs |= {"norm_weight": unit(generator, width), "norm_bias": unit(generator, width)}
    if bias:
        inputs["bias"] = unit(generator, outputs)
    return Case(inputs, unit(generator, rows, outputs))


def gated_case(rows: int, width: int, outputs: int, affine: bool, bias: bool) -> Case:
    linear = linear_case(rows, width, outputs, affine, bias)
    generator = torch.Generator().manual_seed(1)
    inputs = {"attended": linear.inputs["x"] * 0.1, "gate": unit(generator, rows, width)}
    inputs["residual"] = unit(generator, rows, outputs)
    return Case({**inputs, **{n: t for n, t in linear.inputs.items() if n != "x"}}, linear.d_out)


def plain_linear(x: Tensor, weight: Tensor, norm_weight=None, norm_bias=None, bias=None) -> Tensor:
    normed = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS).to(weight.dtype)
    return F.silu(F.linear(normed, weight, bias))


def keep_factors(rows: int, columns: int, dropout: float) -> Tensor:
    """Value by value from the generator: word c mod 4 at counter (row, 0, c div 4, 0)."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    zero = torch.zeros(rows, columns, dtype=torch.int64)
    words = torch.stack(philox(KEY, row + zero, zero, column // 4 + zero, zero))
    word = words.gather(0, (column % 4 + zero)[None])[0]
    return (word >= math.ceil(dropout * 2**32)) / (1 - dropout)


def plain_gated(
    attended: Tensor, gate: Tensor, residual: Tensor, weight: Tensor, bias=None, norm_weight=None, norm_bias=None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    normed = F.layer_norm(attended, attended.shape[1:], norm_weight, norm_bias, EPS)
    gated = normed * gate
    if dropout:
        gated = gated * keep_factors(*gated.shape, dropout).to(gated)
    return residual + F.linear(gated.to(weight.dtype), weight, bias)


def fused_linear(x: Tensor, weight: Tensor, **others: Any) -> Tensor:
    return norm_linear_silu(x, weight, **others)


def fused_gated(
    attended: Tensor,
    gate: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **others: Any,
) -> Tensor:
    return gated_output(attended, gate, residual, weight, bias, dropout_key=KEY, **others)


def run(
    function: Any, case: Case, dtypes: dict[str, torch.dtype], device: torch.device, **settings: Any
) -> dict:
    """Result and gradients by name; the inputs are first rounded to bfloat16's 8 bits, so that all dtypes have them."""
    leaves = {
        name: value.bfloat16().to(device, dtypes.get(name, dtypes["all"])).requires_grad_()
        for name, value in case.inputs.items()
    }
    out = function(**leaves, **settings)
    out.backward(case.d_out.bfloat16().to(out))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def compare(
    function: Any, plain: Any, case: Case, dtypes: dict[str, torch.dtype], device: torch.device,
    for_both: dict[str, Any] | None = None, **settings: Any,
) -> None:  # fmt: skip
    for_both, cpu = for_both or {}, torch.device("cpu")
    exact, allowed = analysed(
        lambda: run(plain, case, {"all": torch.float64}, cpu, **for_both), dtypes["all"], wide=False
    )
    found = run(function, case, dtypes, device, eps=EPS, **for_both, **settings)
    out = dtypes.get("residual", dtypes["all"])
    assert_within(found, exact, allowed, {**{n: dtypes.get(n, dtypes["all"]) for n in found}, "out": out})


# rows, width, outputs, affine norm, bias: one tile and many, whole and with remainders, empty.
SHAPES = [
    (0, 8, 16, True, True),
    (1, 37, 51, False, True),
    (37, 50, 200, False, False),
    (130, 64, 64, True, False),
    (131, 100, 260, True, True),
    (3, 130, 20, False, False),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_linear_silu(
    shape: tuple, dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    for recompute in (True, False):
        compare(
            fused_linear, plain_linear, linear_case(*shape), {"all": dtype}, device,
            recompute=recompute, implementation=implementation,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("widths", [(128, 256, 128), (128,) * 4, (128,) * 5, (100, 28, 128), (64,)], ids=str)
def test_parts_are_the_split(widths: tuple[int, ...], implementation: str, device: torch.device) -> None:
    """Gradients of strided, absent and expanded parts go where those of the whole go."""
    case = linear_case(70, 24, sum(widths), False, True)

    def definition() -> dict[str, Tensor]:
        leaves = {n: t.double().requires_grad_() for n, t in case.inputs.items()}
        out = F.silu(F.linear(F.layer_norm(leaves["x"], (24,), eps=EPS), leaves["weight"], leaves["bias"]))
        d_out = case.d_out.double()
        total = out.sum() if len(widths) == 1 else (out * d_out)[:, widths[0] :].sum()
        total.backward()
        parts = {str(i): part for i, part in enumerate(out.detach().split(widths, dim=1))}
        return {**parts, **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}

    exact, allowed = analysed(definition, torch.float32)
    for recompute in (True, False):
        for parted in (True, False):
            leaves = {n: t.to(device, copy=True).requires_grad_() for n, t in case.inputs.items()}
            settings: dict[str, Any] = {"eps": EPS, "recompute": recompute, "implementation": implementation}
            settings["bias"] = leaves["bias"]
            if parted:
                parts = norm_linear_silu_parts(leaves["x"], leaves["weight"], widths, **settings)
            else:
                parts = norm_linear_silu(leaves["x"], leaves["weight"], **settings).split(widths, dim=1)
            d_out = case.d_out.to(device)
            total = sum((p * d).sum() for p, d in zip(parts[1:], d_out.split(widths, dim=1)[1:]))
            if len(parts) == 1:
                total = parts[0].sum()
            total.backward()  # type: ignore[union-attr]
            found = {str(i): part for i, part in enumerate(parts)}
            assert_within({**found, **{n: leaf.grad for n, leaf in leaves.items()}}, exact, allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_output(shape: tuple, dtype: torch.dtype, implementation: str, device: torch.device) -> None:
    for recompute, dropout in ((True, 0.3), (False, 0.0 if shape[3] else 0.7)):
        compare(
            fused_gated, plain_gated, gated_case(*shape),
            {"all": dtype}, device, {"dropout": dropout}, recompute=recompute, implementation=implementation,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wide_rows_and_narrow_weights(implementation: str, device: torch.device) -> None:
    """As under autocast: float32 rows and norms, a bfloat16 GEMM."""
    half = {"all": torch.bfloat16}
    linear = half | dict.fromkeys(("x", "norm_weight", "norm_bias"), torch.float32)
    compare(
        fused_linear, plain_linear, linear_case(40, 24, 48, True, True), linear, device,
        implementation=implementation,
    )  # fmt: skip
    gated = half | {"residual": torch.float32}
    compare(
        fused_gated,
        plain_gated,
        gated_case(40, 24, 48, False, True),
        gated,
        device,
        implementation=implementation,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_large_mean_is_taken_off_first(implementation: str, device: torch.device) -> None:
    case = linear_case(20, 64, 32, False, False)
    case.inputs["x"] += 30.0
    compare(fused_linear, plain_linear, case, {"all": torch.float32}, device, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slices_are_taken_as_they_come(implementation: str, device: torch.device) -> None:
    """u is a slice of the projection: rows with a stride, and columns with one, give what copies give."""
    wide = torch.randn(30, 96, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(device)
    attended, gate, residual = wide[:, :24], wide[:, 24:72:2], wide[:, 80:]
    settings: dict[str, Any] = {
        "eps": EPS,
        "dropout": 0.4,
        "dropout_key": 7,
        "implementation": implementation,
    }
    sliced = gated_output(attended, gate, residual, weight, **settings)
    copies = (x.contiguous() for x in (attended, gate, residual))
    assert torch.equal(sliced, gated_output(*copies, weight, **settings))
    linear = norm_linear_silu(attended, weight, eps=EPS, implementation=implementation)
    assert torch.equal(
        linear, norm_linear_silu(attended.contiguous(), weight, eps=EPS, implementation=implementation)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_is_a_function_of_key_row_and_column(implementation: str, device: torch.device) -> None:
    """gate = 1, W = I: the result shows which values were kept; a shorter batch keeps the same ones."""
    rows, width, dropout = 300, 64, 0.25
    attended = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(device)
    ones, zeros = torch.ones_like(attended), torch.zeros_like(attended)
    identity = torch.eye(width, device=device)

    def kept(key: int, count: int = rows) -> Tensor:
        parts = (x[:count] for x in (attended, ones, zeros))
        out = gated_output(
            *parts, identity, eps=EPS, dropout=dropout, dropout_key=key, implementation=implementation
        )
        return (out != 0).cpu()

    first = kept(KEY)
    assert torch.equal(first, keep_factors(rows, width, dropout) != 0)
    assert torch.equal(first[:77], kept(KEY, 77))
    assert abs(float(first.float().mean()) - 0.75) < 0.02
    for other in (KEY - 1, KEY + 2**32, 5):
        assert abs(float((first == kept(other)).float().mean()) - (0.75**2 + 0.25**2)) < 0.03


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_is_not_finite_stays_alone(implementation: str, device: torch.device) -> None:
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).to(device)
    x[7] = math.nan
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1)).to(device)
    finite = norm_linear_silu(x, weight, eps=EPS, implementation=implementation).isfinite().all(1)
    assert not finite[7] and finite.sum() == 19


def block(x_TD: Tensor, weights: tuple[Tensor, Tensor], heads: int, recompute: bool) -> Tensor:
    """An HSTU block of one sequence, without relative bias."""
    first_ED, second_DV = weights
    width = second_DV.shape[1]
    u, v, q, k = norm_linear_silu_parts(x_TD, first_ED, (width,) * 4, eps=EPS, recompute=recompute)
    rows = x_TD.shape[0]
    attended = hstu_attention(
        *(part.unflatten(1, (heads, -1)) for part in (q, k, v)),
        torch.tensor([0, rows]), max_length=rows, divisor=float(rows),
    )  # fmt: skip
    return gated_output(
        attended.flatten(1), u, x_TD, second_DV, eps=EPS, dropout=0.2, dropout_key=3, recompute=recompute
    )


def kept_bytes(rows: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype, recompute: bool) -> int:
    """Bytes of all memory the block keeps for its backward pass, each once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(rows, dim).to(dtype).requires_grad_()
    weights = tuple(torch.randn(n, dim).to(weight_dtype).requires_grad_() for n in (4 * dim, dim))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x, weights, heads=2, recompute=recompute)
    return sum(kept.values()) + 0 * out.shape[0]


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "recompute", "per_width", "what"),
    [
        (torch.bfloat16, torch.bfloat16, True, 12, "LN(x), u, v, q, k, attended"),
        (torch.float32, torch.bfloat16, True, 12, "the same though x is float32, as under autocast"),
        (torch.bfloat16, torch.bfloat16, False, 24, "also x, the linear layer's output, gated rows"),
        (torch.float32, torch.float32, True, 24, "everything in float32"),
    ],
)
def test_what_a_block_keeps(
    dtype: torch.dtype, weight_dtype: torch.dtype, recompute: bool, per_width: int, what: str
) -> None:
    """Bytes a token: `per_width` d, and 16 for mean and deviation of two norms; within 10 %, by the difference of
    two lengths, which leaves parameters out."""
    dim, rows = 64, 400
    more, fewer = (kept_bytes(n, dim, dtype, weight_dtype, recompute) for n in (2 * rows, rows))
    stated = per_width * dim + 16
    assert abs((more - fewer) / rows - stated) <= 0.1 * stated, what


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operators_trace(implementation: str, device: torch.device) -> None:
    """Schema, fake shapes, autograd registration and tracing, as torch.compile uses them."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    case = {n: t.to(device).requires_grad_() for n, t in gated_case(5, 8, 6, True, True).inputs.items()}
    norm_linear_silu(case["attended"], case["weight"], eps=EPS, implementation=implementation)  # registers
    operators = torch.ops.gr_kernels
    tables = [case[name] for name in ("norm_weight", "norm_bias", "bias")]
    gated = [
        case[name] for name in ("attended", "gate", "residual", "weight", "bias", "norm_weight", "norm_bias")
    ]
    for recompute in (True, False):
        torch.library.opcheck(
            getattr(operators, f"norm_linear_silu_{implementation}").default,
            (case["attended"], case["weight"], *tables, EPS, recompute),
            test_utils=checks,
        )
        torch.library.opcheck(
            getattr(operators, f"gated_output_{implementation}").default,
            (*gated, EPS, 0.25, -5, recompute),
            test_utils=checks,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_into_one_graph(implementation: str, device: torch.device) -> None:
    settings: dict[str, Any] = {"eps": EPS, "implementation": implementation}
    leaves = {n: t.to(device).requires_grad_() for n, t in gated_case(5, 4, 6, False, False).inputs.items()}

    def step(residual: Tensor, weight: Tensor) -> Tensor:
        u, v, o = norm_linear_silu_parts(residual, weight.T.repeat(3, 1), (4, 4, 4), **settings)
        return gated_output(o * v, u, residual, weight, dropout=0.5, dropout_key=3, **settings).square().sum()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        total = function(leaves["residual"], leaves["weight"])
        results.append([total, *torch.autograd.grad(total, [leaves["residual"], leaves["weight"]])])
    for eager, compiled in zip(*results):
        # three norms, products of 4 to 6 terms and their gradients, of unit scale
        torch.testing.assert_close(compiled, eager, **tolerance(6, stages=12, size=10.0))


def test_autocast_makes_the_gemm_narrow() -> None:
    case = gated_case(9, 16, 16, False, False).inputs
    with torch.autocast("cpu", torch.bfloat16):
        hidden = norm_linear_silu(case["residual"], case["weight"], eps=EPS)
        out = gated_output(hidden, hidden, case["residual"], case["weight"], eps=EPS)
    assert hidden.dtype == torch.bfloat16 and out.dtype == torch.float32
    by_hand = norm_linear_silu(case["residual"], case["weight"].bfloat16(), eps=EPS)
    assert torch.equal(hidden, by_hand)


def test_gradients_are_differentiable_once() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    out = norm_linear_silu(x, weight, eps=EPS)
    (d_x,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        d_x.sum().backward()


def test_explains() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    sentence = explain(norm_linear_silu, x, weight, eps=EPS)
    assert sentence.startswith("reference") and "triton can't: it is for cuda" in sentence
    residual = torch.randn(3, 5)
    assert explain(gated_output, x, x, residual, weight, eps=EPS).startswith("reference")


def wrong_linear(**changes: Any) -> tuple[Any, dict[str, Any]]:
    return norm_linear_silu, {"x_TD": torch.randn(3, 4), "weight_ED": torch.randn(5, 4), "eps": EPS} | changes


def wrong_gated(**changes: Any) -> tuple[Any, dict[str, Any]]:
    x = torch.randn(3, 4)
    call = {"attended_TV": x, "gate_TV": x, "residual_TD": torch.randn(3, 5), "weight_DV": torch.randn(5, 4)}
    return gated_output, call | {"eps": EPS} | changes


WRONG = {
    "x must have 2 dimensions": wrong_linear(x_TD=torch.randn(4)),
    "weight must have 4 columns, not 3": wrong_linear(weight_ED=torch.randn(5, 3)),
    "weight must be floating point": wrong_linear(weight_ED=torch.ones(5, 4, dtype=torch.int64)),
    "widths must be positive and add up to the weight's 5 rows": (
        norm_linear_silu_parts,
        wrong_linear()[1] | {"widths": [2, 2]},
    ),
    "x has no columns": wrong_linear(x_TD=torch.randn(3, 0)),
    r"norm_weight must have shape \(4,\)": wrong_linear(norm_weight=torch.ones(5)),
    "bias is torch.float64 and must be torch.float32": wrong_linear(bias=torch.zeros(5).double()),
    "implementation must be 'auto' or one of": wrong_linear(implementation="fast"),
    "gate must have 3 rows, not 2": wrong_gated(gate_TV=torch.randn(2, 4)),
    "gate is torch.bfloat16 and must be": wrong_gated(gate_TV=torch.randn(3, 4).bfloat16()),
    "residual must have 5 columns": wrong_gated(residual_TD=torch.randn(3, 4)),
    r"dropout must be in \[0, 1\)": wrong_gated(dropout=1.0),
    "dropout_key must be": wrong_gated(dropout_key=-1),
    "residual is on meta": wrong_gated(residual_TD=torch.randn(3, 5, device="meta")),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_calls_are_one_sentence(sentence: str) -> None:
    function, arguments = WRONG[sentence]
    with pytest.raises(ValueError, match=sentence) as caught:
        function(**arguments)
    assert str(caught.value).startswith(f"{function.__name__}: ") and "\n" not in str(caught.value)


def test_asking_for_what_cannot_run_says_why() -> None:
    function, arguments = wrong_linear(x_TD=torch.randn(3, 4).double(), implementation="triton")
    with pytest.raises(ValueError, match="'triton' can't run here: "):
        function(**arguments)
