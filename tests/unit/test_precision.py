"""The bound on rounding (tests/precision): it holds whatever the order of summation, and no mistake passes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels.hstu_attention.reference import definition as specification
from tests.precision import analysed, assert_within, growth

Inputs = dict[str, Tensor]


def test_growth_is_linear_for_few_terms_and_a_root_for_many() -> None:
    assert [float(growth(n)) for n in (0, 1, 16, 100, 20_011)] == [
        0,
        1,
        16,
        40,
        pytest.approx(565.84, abs=0.01),
    ]
    # a lost term of a long sum of equal ones is more than rounding explains
    assert 1 / 20_011 > 565.84 * 2.0**-24


@pytest.mark.parametrize("terms", [1, 3, 100, 20_011])
@pytest.mark.parametrize("signs", ["one", "both"])
def test_sums_in_the_worst_order_are_within(terms: int, signs: str) -> None:
    """One term after the other; and a lost term is not within."""
    generator = torch.Generator().manual_seed(terms)
    x = torch.rand(40, terms, generator=generator) + 0.5
    if signs == "both":
        x = x * torch.randint(0, 2, x.shape, generator=generator).mul_(2).sub_(1)
    exact, allowed = analysed(lambda: {"sum": x.double().sum(1)}, torch.float32)
    one_after_the_other = torch.zeros(40)
    for column in x.T:
        one_after_the_other = one_after_the_other + column
    assert_within({"sum": one_after_the_other}, exact, allowed)
    with pytest.raises(AssertionError, match="where rounding explains"):
        assert_within({"sum": x.double()[:, :-1].sum(1)}, exact, allowed)


def inputs(count: int, catalogue: int, width: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        "q": torch.randn(count, width, generator=generator),
        "e": torch.randn(catalogue, width, generator=generator),
        "target": torch.randint(0, catalogue, (count,), generator=generator),
    }


def loss(x: Inputs, wrong: str = "") -> Inputs:
    """A full softmax with a cosine similarity, or one with a mistake."""
    q, e = (x[name].double().requires_grad_() for name in ("q", "e"))
    rows = F.normalize(e, dim=1, eps=1e-6)
    if wrong == "logits of bfloat16":
        logits = (20.0 * (q @ rows.T)).bfloat16().double()
    elif wrong == "products of bfloat16":
        logits = 20.0 * (q.bfloat16() @ rows.bfloat16().T).double()
    else:
        logits = (19.999 if wrong == "another scale" else 20.0) * (q @ rows.T)
    if wrong == "an item left out":  # one of middling share
        hidden = logits.softmax(1).mean(0).argsort()[len(e) // 2]
        logits = torch.cat(
            [logits[:, :hidden], logits[:, hidden : hidden + 1] - 1e9, logits[:, hidden + 1 :]], 1
        )
    if wrong == "a term of a score left out":
        logits = logits - 20.0 * q[:, -1:] * rows[:, -1] * 0.01
    target = x["target"].roll(1) if wrong == "another's target" else x["target"]
    losses = F.cross_entropy(logits, target, reduction="none")
    if wrong == "a query left out":
        losses = losses[1:]
    total = (losses * -1 if wrong == "a sign" else losses).sum()
    grads = torch.autograd.grad(total, (q, e))
    return {"loss": total.detach(), "q": grads[0], "e": grads[1]}


LOSS_MISTAKES = [
    *("an item left out", "a term of a score left out", "another's target", "a query left out", "a sign"),
    *("another scale", "logits of bfloat16", "products of bfloat16"),
]


@pytest.mark.parametrize("wrong", LOSS_MISTAKES)
def test_no_mistake_of_a_loss_is_within(wrong: str) -> None:
    x = inputs(50, 900, 32)
    exact, allowed = analysed(lambda: loss(x), torch.float32)
    assert_within(loss(x), exact, allowed)
    with pytest.raises(AssertionError, match="where rounding explains"):
        assert_within(loss(x, wrong), exact, allowed)


def attention(x: Inputs, activation: str, wrong: str = "") -> Inputs:
    q, k, v = (x[name].double().requires_grad_() for name in ("q", "k", "v"))
    offsets = torch.tensor([0, 60, 100])
    if wrong == "a key left out":
        v_used = torch.cat([v[:30], v[30:31] * 0, v[31:]])
    elif wrong == "values of bfloat16":
        v_used = v.bfloat16().double()
    else:
        v_used = v
    q_used = q.roll(1, 0) if wrong == "the neighbour's query" else q
    out = specification(
        q_used, k, v_used, offsets, divisor=61.0 if wrong == "another divisor" else 60.0, scale=0.25,
        activation=activation,  # type: ignore[arg-type]
    )  # fmt: skip
    if wrong == "another divisor" and activation == "softmax":
        out = out * 60 / 61
    grads = torch.autograd.grad(out, (q, k, v), x["d_out"].double() * (-1 if wrong == "a sign" else 1))
    return {"out": out.detach(), **dict(zip("qkv", grads))}


@pytest.mark.parametrize("activation", ["silu", "softmax"])
@pytest.mark.parametrize(
    "wrong", ["a key left out", "values of bfloat16", "the neighbour's query", "another divisor", "a sign"]
)
def test_no_mistake_of_an_attention_is_within(wrong: str, activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(100, 2, 16, generator=generator) for name in ("q", "k", "v", "d_out")}
    exact, allowed = analysed(lambda: attention(x, activation), torch.float32)
    assert_within(attention(x, activation), exact, allowed)
    with pytest.raises(AssertionError, match="where rounding explains"):
        assert_within(attention(x, activation, wrong), exact, allowed)


def normed(x: Inputs, norm: Callable[[Tensor], Tensor]) -> Inputs:
    leaf = x["q"].double().requires_grad_()
    out = norm(leaf)
    return {"out": out.detach(), "x": torch.autograd.grad(out, leaf, x["e"][: len(leaf)].double())[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_mistake_of_a_norm_is_within(dtype: torch.dtype) -> None:
    x = inputs(40, 90, 48)
    exact, allowed = analysed(lambda: normed(x, lambda t: F.layer_norm(t, (48,), eps=1e-6)), dtype)

    def within(norm: Callable[[Tensor], Tensor]) -> None:
        assert_within({name: value.to(dtype) for name, value in normed(x, norm).items()}, exact, allowed)

    within(lambda t: F.layer_norm(t, (48,), eps=1e-6))
    for wrong in (
        lambda t: F.layer_norm(t, (48,), eps=1e-2),
        lambda t: (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True),  # of 47 degrees of freedom
        lambda t: t / t.std(1, keepdim=True, correction=0),
    ):
        with pytest.raises(AssertionError, match="where rounding explains"):
            within(wrong)


def test_views_and_writes_through_them_carry_their_errors() -> None:
    x = torch.rand(4, 5, dtype=torch.float64) + 1

    def compute() -> Inputs:
        y = x * 3  # rounded
        y[1].zero_()
        y[:, 2] = 7.0
        return {"y": y, "turned": y.T[2:].clone()}

    exact, allowed = analysed(compute, torch.float32)
    assert torch.equal(allowed["y"] > 0, (exact["y"] != 0) & (exact["y"] != 7))
    assert torch.equal(allowed["turned"], allowed["y"].T[2:])


def test_an_operation_without_a_rule_is_refused() -> None:
    x = torch.rand(3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"no rule for .*inv"):
        analysed(lambda: {"y": torch.erfinv(x)}, torch.float32)


def test_shapes_names_dtypes_and_nan_are_compared() -> None:
    exact, allowed = analysed(lambda: {"y": torch.ones(3, dtype=torch.float64) / 3}, torch.float32)
    good = torch.ones(3) / 3
    assert_within({"y": good}, exact, allowed, torch.float32)
    for bad in ({"y": good[:2]}, {"z": good}, {"y": good * torch.tensor([1, torch.nan, 1])}, {"y": -good}):
        with pytest.raises(AssertionError):
            assert_within(bad, exact, allowed)
    with pytest.raises(AssertionError, match="float32, not"):
        assert_within({"y": good}, exact, allowed, torch.float16)
