"""HSTU's fused layers: the same model whichever way they run."""

import copy
import dataclasses

import pytest
import torch

from gr.models.hstu import HSTU, GatedOutput, Projection
from gr_kernels.dispatch import preferring
from gr_kernels.fused_layer import gated_output, norm_linear_silu
from tests.precision import tolerance
from tests.unit.models_common import generator, layout, randomise

CONFIG = HSTU.Config(layers=2, heads=2, qk_dim=8, v_dim=8, dropout=0.0)
DIM, MAX_LENGTH = 16, 9
# A norm, a gate and a product of 6 terms of half unit scale.
GATE = tolerance(6, stages=4, size=10.0)
# Two layers forward and backward, some twenty sums of at most 64 terms, a hundred times their results at most.
LAYERS = tolerance(64, stages=20, size=100.0)


def test_parameters_are_those_of_plain_layers() -> None:
    names = {name: tuple(p.shape) for name, p in HSTU(CONFIG, DIM, MAX_LENGTH).layers[0].named_parameters()}
    assert names == {
        "uvqk.weight": (64, DIM),
        "output.weight": (DIM, 16),
        "output.bias": (DIM,),
        "position_bias": (MAX_LENGTH,),
        "time_bias": (129,),
    }


def test_the_gate_of_cpu_is_the_fused_one_without_dropout() -> None:
    layer = randomise(GatedOutput(6, 5, 0.0))
    attended, u = (torch.randn(7, 6, generator=generator(seed)) for seed in (0, 1))
    x = torch.randn(7, 5, generator=generator(2))
    fused = gated_output(attended, u, x, layer.weight, layer.bias, eps=1e-6)
    torch.testing.assert_close(layer(attended, u, x, 0), fused, **GATE)


def test_the_gate_drops_by_its_key_where_the_operator_is_named() -> None:
    layer = randomise(GatedOutput(6, 5, 0.5))
    attended, u = (torch.randn(7, 6, generator=generator(seed)) for seed in (0, 1))
    x = torch.randn(7, 5, generator=generator(2))
    with preferring("reference"):
        first, again, other = (layer(attended, u, x, key) for key in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    fused = gated_output(attended, u, x, layer.weight, layer.bias, eps=1e-6, dropout=0.5, dropout_key=1)
    torch.testing.assert_close(first, fused, **GATE)


def test_the_projection_is_cut_by_widths() -> None:
    layer = randomise(Projection(5, (2, 3, 1, 4)))
    x = torch.randn(7, 5, generator=generator(0))
    with preferring("reference"):
        whole = norm_linear_silu(x, layer.weight, eps=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(layer(x), whole.split((2, 3, 1, 4), dim=1)))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_gpu_equals_cpu(kernels: str) -> None:
    where = layout()
    x = torch.randn(where.rows, DIM, generator=generator())
    weights = torch.randn(where.rows, DIM, generator=generator(5))
    model = randomise(HSTU(CONFIG, DIM, MAX_LENGTH))
    gradients = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        leaf = x.to(device).requires_grad_()
        with preferring(kernels if device == "cuda" else "auto"):
            out = there(leaf, _to(where, device))
        (out * weights.to(device)).sum().backward()
        gradients.append([out.detach().cpu(), leaf.grad.cpu(), *(p.grad.cpu() for p in there.parameters())])
    for on_cpu, on_gpu in zip(*gradients):
        torch.testing.assert_close(on_gpu, on_cpu, **LAYERS)


@pytest.mark.gpu
def test_dropout_on_gpu_is_a_function_of_the_key() -> None:
    layer = randomise(GatedOutput(64, 32, 0.3)).cuda()
    attended, u = (torch.randn(50, 64, generator=generator(seed)).cuda() for seed in (0, 1))
    x = torch.zeros(50, 32, device="cuda")
    first, again, other = (layer(attended, u, x, key) for key in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(layer.eval()(attended, u, x, 1), layer(attended, u, x, 2))


def _to(where, device):
    """The layout with its tensors on a device."""
    values = {field.name: getattr(where, field.name) for field in dataclasses.fields(where)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(where, **tensors)
