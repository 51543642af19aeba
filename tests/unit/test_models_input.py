"""The input of encoders."""

import copy
import math

import pytest
import torch

from gr.config import InputSection
from gr.models.input import ItemInput
from gr.models.layout import JaggedLayout
from gr.models.tasks import MASK
from gr_kernels.dispatch import preferring
from tests.precision import tolerance
from tests.unit.models_common import LENGTHS, generator, layout, local_table, randomise

ITEMS, DIM = 40, 6


def build(masks=False, **config):
    return randomise(ItemInput(InputSection(**config), DIM, 9, masks, 0.02))


def items():
    """The table of items, of unit scale."""
    return randomise(local_table(ITEMS, DIM))


@pytest.mark.parametrize("positions", ["none", "xavier_normal", "truncated_normal", "normal"])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 0), ()])
def test_items_scaled_plus_positions_from_the_first_action(positions, scale, masks, lengths):
    model = build(masks, positions=positions, scale=scale, extra_positions=2, dropout=0.0)
    where, table = layout(lengths), items()
    tokens = torch.randint(0, ITEMS, (where.rows,), generator=generator())
    if masks and len(tokens):
        tokens[[2, 9, 24]] = MASK
    expected = []
    for t, (token, position) in enumerate(zip(tokens.tolist(), [p for n in lengths for p in range(n)])):
        item = model.mask if token == MASK else table.weight[token]
        x = item * (math.sqrt(DIM) if scale else 1.0)
        expected.append(x if positions == "none" else x + model.positions[position])
        assert where.positions_T[t] == position
    found = model(tokens, where, table.view().lookup(tokens.clamp_min(0)))
    assert found.shape == (len(tokens), DIM)
    if expected:
        torch.testing.assert_close(found, torch.stack(expected), **tolerance(3, size=10.0))
    if positions != "none":
        assert model.positions.shape == (11, DIM)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "triton", "reference"])
def test_gpu_equals_cpu(kernels):
    model, where = build(positions="normal", scale=True, dropout=0.0), layout()
    tokens = torch.randint(0, ITEMS, (where.rows,), generator=generator())
    weights = torch.randn(where.rows, DIM, generator=generator(5))
    found = []
    for device in ("cpu", "cuda"):
        table, there = items().to(device), copy.deepcopy(model).to(device)
        jagged = JaggedLayout(where.offsets_B1.to(device), where.lengths, where.max_length)
        with preferring(kernels if device == "cuda" else "auto"):
            out = there(tokens.to(device), jagged, table.view().lookup(tokens.to(device)))
        gradients = torch.autograd.grad((out * weights.to(device)).sum(), (there.positions, table.weight))
        found.append([out.detach().cpu(), *(g.cpu() for g in gradients)])
    for on_cpu, on_gpu in zip(*found):
        torch.testing.assert_close(on_gpu, on_cpu, **tolerance(len(tokens), size=100.0))


def test_dropout_in_training_only():
    model, where, table = build(dropout=0.5), layout(), items()
    tokens = torch.zeros(where.rows, dtype=torch.int64)
    assert 0.3 < (model(tokens, where, table.view().lookup(tokens)) == 0).float().mean() < 0.7
    model.eval()
    assert (model(tokens, where, table.view().lookup(tokens)) != 0).all()
