"""IntTower's sums of maxima and its contrast against their definitions by autograd, cut into chunks as they may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gr.models.two_tower import contrast as contrasts, fe_block
from gr.models.two_tower.contrast import contrast
from gr.models.two_tower.fe_block import max_similarity
from tests.precision import analysed, assert_within
from tests.unit.models_common import generator

WIDTHS, HEADS, ITEM_HEADS, K = (5, 3), 4, 3, 2


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def given(impressions: int, draw, widths=WIDTHS) -> list[Tensor]:
    """Of the item its heads, of each layer x, W and b."""
    shapes = [(impressions, ITEM_HEADS, K)]
    for width in widths:
        shapes += [(impressions, width), (HEADS * K, width), (HEADS * K,)]
    return [draw(shape) for shape in shapes]


def whole_numbers(seed=1):
    """So small that no sum is rounded in any dtype; and many products are equal."""
    g = generator(seed)
    return lambda shape: torch.randint(-1, 2, shape, generator=g).double()


def unit_scale(seed=1):
    g = generator(seed)
    return lambda shape: torch.randn(shape, generator=g, dtype=torch.float64)


def plainly(item: Tensor, *flat: Tensor) -> Tensor:
    """Of equal products the first counts, and has the gradient."""
    total = 0.0
    for x, weight, bias in zip(flat[::3], flat[1::3], flat[2::3]):
        heads = (x @ weight.T + bias).unflatten(1, (HEADS, K))
        products = heads @ item.transpose(1, 2)
        total = total + products.gather(2, products.argmax(2, keepdim=True)).sum((1, 2))
    return total


def results(function, tensors: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    inputs = leaves(*tensors)
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    return {"out": out, **{f"gradient {n}": x for n, x in enumerate(gradients)}}


def ours(item: Tensor, *flat: Tensor) -> Tensor:
    return max_similarity(list(zip(flat[::3], flat[1::3], flat[2::3])), item)


@pytest.fixture(params=[1, 40, 1 << 20])
def chunked(request, monkeypatch):
    """An impression at a time (2 layers of 4 heads of 2), a few, all."""
    monkeypatch.setattr(fe_block, "NUMBERS", request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impressions", [0, 1, 7])
def test_sums_of_maxima_and_gradients_where_nothing_is_rounded_and_much_is_equal(chunked, impressions, dtype):
    tensors, upstream = given(impressions, whole_numbers()), whole_numbers(2)((impressions,))
    wanted = results(plainly, tensors, upstream)
    found = results(ours, [tensor.to(dtype) for tensor in tensors], upstream)
    assert found["out"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value in found.items():
        assert torch.equal(value.double(), wanted[name]), name
    if impressions == 7:  # of equal products the later ones get nothing
        item, x, weight, bias = tensors[:4]
        scores = (x @ weight.T + bias).unflatten(1, (HEADS, K)) @ item.transpose(1, 2)
        assert ((scores == scores.amax(2, keepdim=True)).sum(2) > 1).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("widths", [(5,), WIDTHS, (130, 5, 3)])
def test_sums_of_maxima_and_gradients_are_rounded_no_more_than_their_definition(chunked, widths, dtype):
    tensors = [x.to(dtype).double() for x in given(9, unit_scale(), widths)]
    upstream = unit_scale(2)((9,)).to(dtype).double()
    exact, allowed = analysed(lambda: results(plainly, tensors, upstream), dtype)
    assert_within(results(ours, [x.to(dtype) for x in tensors], upstream), exact, allowed, dtype)


def test_without_gradients_the_sums_are_the_same_bits():
    tensors = given(7, unit_scale())
    with torch.no_grad():
        assert torch.equal(ours(*tensors), ours(*leaves(*tensors)).detach())


def test_pairs_that_say_who_meets_are_those_that_meet_by_place(chunked):
    item, *flat = given(7, whole_numbers())
    user_S, item_S = torch.tensor([6, 0, 6, 2, 2, 5, 6, 0, 6]), torch.tensor([0, 0, 3, 1, 6, 6, 1, 2, 2])
    wanted = ours(item[item_S], *(x[user_S] if n % 3 == 0 else x for n, x in enumerate(flat)))
    layers = list(zip(flat[::3], flat[1::3], flat[2::3]))
    assert torch.equal(max_similarity(layers, item, (user_S, item_S)), wanted)
    assert max_similarity(layers, item, (user_S[:0], item_S[:0])).shape == (0,)


TEMPERATURE = 0.5


def likes(impressions: int, users: int, items: int, share: float) -> tuple[Tensor, ...]:
    """Who, what, and which of the impressions are likes."""
    g = generator(3)
    user, item = (torch.randint(0, n, (impressions,), generator=g) for n in (users, items))
    return user, item, torch.rand(impressions, generator=g) < share


def contrast_plainly(tops: Tensor, items: Tensor, who: tuple[Tensor, ...]) -> Tensor:
    user, item, liked = who
    total = (tops.sum() + items.sum()) * 0.0
    for n in liked.nonzero()[:, 0].tolist():
        other = (item != item[n]) & ~((user == user[n]) & liked)
        rows = torch.cat([torch.tensor([n]), other.nonzero()[:, 0]])
        total = total - F.log_softmax(items[rows] @ tops[n] / TEMPERATURE, 0)[0]
    return total


def our_contrast(tops: Tensor, items: Tensor, who: tuple[Tensor, ...]) -> Tensor:
    user, item, liked = who
    own = liked.nonzero()[:, 0]
    same = [(item[own], item), (user[own], user.where(liked, -1))]
    return contrast(tops[own], items, own, same, TEMPERATURE)


@pytest.mark.parametrize("scores", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("impressions", "users", "items", "share"),
    [(1, 1, 1, 1.1), (17, 5, 6, 0.6), (17, 5, 6, -1.0), (6, 3, 1, 0.9), (40, 2, 9, 1.1)],
    ids=["one", "some", "no likes", "one item", "all liked"],
)
def test_a_contrast_and_its_gradients(monkeypatch, impressions, users, items, share, dtype, scores):
    monkeypatch.setitem(contrasts.SCORES, "cpu", scores)
    who, draw = likes(impressions, users, items, share), unit_scale(4)
    tensors = [F.normalize(draw((impressions, 4)), dim=1).to(dtype).double() for _ in range(2)]
    upstream = torch.tensor(0.7, dtype=dtype).double()
    exact, allowed = analysed(lambda: results(lambda *x: contrast_plainly(*x, who), tensors, upstream), dtype)
    found = results(lambda *x: our_contrast(*x, who), [x.to(dtype) for x in tensors], upstream)
    assert_within(found, exact, allowed, dtype)
    if items == 1:
        assert found["out"] == 0 and not found["gradient 0"].any(), "nothing is seen beside the own item"
