"""Dropout: rates, scale, gradients and reproducibility, from torch's generator and from a counter."""

import pytest
import torch

from gr.models import attention as of_models
from gr.models.dropout import Dropout
from gr.models.hstu import GatedOutput
from gr_kernels.dispatch import preferring
from gr_kernels.hstu_attention import hstu_attention
from gr_kernels.jagged import jagged_dropout
from tests.precision import UNIT, tolerance
from tests.unit.models_common import batch, loss_of, randomise, retrieval, run_config

KEY = 0xFEDC_BA98_7654_3210
# On a CPU "auto" is torch's generator; the reference is the operator's, as on every device.
BITS = {"generator": "auto", "counter": "reference"}
ITEMS = 40


def dropped(probability, kernels, x, key=KEY):
    """What training makes of x where the run prefers ``kernels``."""
    with preferring(kernels):
        return Dropout(probability)(x, key)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rate_and_scale(bits, probability, dtype):
    torch.manual_seed(1)
    x = torch.ones(999, 201, dtype=dtype)
    y = dropped(probability, BITS[bits], x)
    kept = y != 0
    sigma = (probability * (1 - probability) / x.numel()) ** 0.5
    assert y.shape == x.shape and y.dtype == dtype
    assert kept.double().mean().item() == pytest.approx(1 - probability, abs=5 * sigma)
    assert (y[kept].double() == y[kept][0].double()).all()
    # the generator's probability of float32 and float64 is the nearest multiple of 2^-16; a quotient is rounded
    nearest = 2.0**-17 if bits == "generator" and dtype != torch.bfloat16 else 0.0
    off = nearest / (1 - probability - nearest) + 2 * UNIT[dtype]
    assert y[kept][0].item() == pytest.approx(1 / (1 - probability), rel=off)
    # neighbours in a word are as independent as any
    pairs = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert pairs == pytest.approx((1 - probability) ** 2, abs=10 * sigma)


@pytest.mark.parametrize("bits", BITS)
def test_means_are_kept(bits):
    torch.manual_seed(1)
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(2)) + 3.0
    y = dropped(0.3, BITS[bits], x)
    # the standard error of the mean of x u / 0.7, u kept with probability 0.7
    error = (x.double().square().mean() * 0.3 / 0.7 / x.numel()).sqrt().item()
    assert y.double().mean().item() == pytest.approx(x.double().mean().item(), abs=5 * error)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_goes_where_the_values_went(bits):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = dropped(0.4, BITS[bits], x)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach(), **tolerance(2))
    assert set((x.grad == 0).flatten().tolist()) == {True, False}


@pytest.mark.parametrize("kernels", ["auto", "cpp", "reference"])
def test_off(kernels):
    x = torch.randn(6, 5)
    with preferring(kernels):
        assert Dropout(0.5).eval()(x, KEY) is x
        assert Dropout(0.0)(x, KEY) is x
        assert Dropout(0.5)(x[:0], KEY).shape == (0, 5)


@pytest.mark.parametrize("kernels", ["auto", "cpp"])  # the operator has no C++: it chooses
def test_on_a_cpu_the_bits_are_the_generators(kernels):
    x = torch.randn(6, 5)
    torch.manual_seed(4)
    first, second = dropped(0.5, kernels, x), dropped(0.5, kernels, x)
    torch.manual_seed(4)
    assert torch.equal(dropped(0.5, kernels, x, KEY + 1), first)
    assert not torch.equal(first, second)


def test_the_operators_bits_are_a_function_of_the_key():
    x = torch.randn(6, 5)
    torch.manual_seed(4)
    first = dropped(0.5, "reference", x)
    state = torch.get_rng_state()
    assert torch.equal(dropped(0.5, "reference", x), first)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the generator"
    assert torch.equal(first, jagged_dropout(x, 0.5, key=KEY))
    assert not torch.equal(dropped(0.5, "reference", x, KEY + 1), first)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_bits_are_the_operators(kernels, dtype):
    x = torch.randn(70, 51, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = dropped(0.3, kernels, x.cuda()).cpu()
    assert torch.equal(found, jagged_dropout(x, 0.3, key=KEY, implementation="reference"))


MODELS = {
    "hstu": {"name": "hstu", "attention_dropout": 0.2},
    "sasrec": {"name": "sasrec"},
    "transformer": {"name": "transformer", "input_norm": True, "norm": "post"},
    "gru4rec": {"name": "gru4rec", "dropout": 0.3},
}
SITES = {"hstu": 1 + 2 * 2, "sasrec": 1 + 2 * 3, "transformer": 1 + 1 + 2 * 4, "gru4rec": 1 + 1}


def build(name):
    return randomise(retrieval(run_config(MODELS[name], model={"input": {"dropout": 0.3}}), ITEMS))


@pytest.mark.parametrize("name", MODELS)
def test_every_place_of_a_model_has_a_key_of_its_own(name, monkeypatch):
    """Equal keys would drop the same rows and columns in two places."""
    model, keys = build(name), []

    def attention(*given, **named):
        keys.append(named["dropout_key"])
        return hstu_attention(*given, **named)

    monkeypatch.setattr(of_models, "hstu_attention", attention)
    for module in model.modules():
        if isinstance(module, Dropout | GatedOutput):  # the key is their one number
            module.register_forward_pre_hook(
                lambda module, arguments: keys.extend(a for a in arguments if isinstance(a, int))
            )
    with preferring("reference"):
        for key in (1, 2):
            loss_of(model, model.supervise(batch(items=ITEMS), 1, key))
    assert len(keys) == 2 * SITES[name] and len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_loss_is_a_function_of_the_key(name):
    model = build(name)

    def loss(key):
        with preferring("reference"):
            return loss_of(model, model.supervise(batch(items=ITEMS), 1, key))

    torch.manual_seed(1)
    first, again, other = loss(1), loss(1), loss(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    with preferring("reference"):
        assert torch.equal(loss_of(model.eval(), model.supervise(batch(items=ITEMS), 1)), loss(2))
