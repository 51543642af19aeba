"""Dropout: rates, scale, gradients and reproducibility."""

import pytest
import torch

from gr.models.dropout import dropout


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rate_and_scale(probability, dtype):
    torch.manual_seed(1)
    x = torch.ones(999, 201, dtype=dtype)
    y = dropout(x, probability, True)
    kept = y != 0
    sigma = (probability * (1 - probability) / x.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - probability, abs=5 * sigma)
    assert (y[kept].double() == y[kept][0].double()).all()
    tolerance = 0.01 if dtype == torch.bfloat16 else 0.01 * (probability > 0.9) + 2e-5
    assert y[kept][0].item() == pytest.approx(1 / (1 - probability), rel=tolerance)
    # neighbours in a word are as independent as any
    pairs = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert pairs == pytest.approx((1 - probability) ** 2, abs=10 * sigma)


def test_the_gradient_goes_where_the_values_went():
    x = torch.randn(7, 5, requires_grad=True)
    y = dropout(x, 0.4, True)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())
    assert set((x.grad == 0).flatten().tolist()) == {True, False}


def test_off_and_reproducible():
    x = torch.randn(6, 5)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert dropout(x[:0], 0.5, True).shape == (0, 5)
    torch.manual_seed(4)
    first = dropout(x, 0.5, True)
    second = dropout(x, 0.5, True)
    torch.manual_seed(4)
    assert torch.equal(dropout(x, 0.5, True), first)
    assert not torch.equal(first, second)
