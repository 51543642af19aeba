"""The input of encoders."""

import math

import pytest
import torch

from gr.config import InputSection
from gr.embeddings.table import LocalTable
from gr.models.input import ItemInput
from gr.models.tasks import MASK
from tests.unit.models_common import LENGTHS, generator, layout, randomise

ITEMS, DIM = 40, 6


def build(masks=False, **config):
    table = LocalTable("items", ITEMS, DIM, 1.0, 1)  # used, not owned
    return randomise(ItemInput(InputSection(**config), table, 9, masks, 0.02))


@pytest.mark.parametrize("positions", ["none", "xavier_normal", "truncated_normal", "normal"])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_items_scaled_plus_positions_from_the_first_action(positions, scale, masks):
    model = build(masks, positions=positions, scale=scale, extra_positions=2, dropout=0.0)
    where = layout()
    tokens = torch.randint(0, ITEMS, (where.rows,), generator=generator())
    if masks:
        tokens[[2, 9, 24]] = MASK
    expected = []
    for t, (token, position) in enumerate(zip(tokens.tolist(), [p for n in LENGTHS for p in range(n)])):
        item = model.mask if token == MASK else model.table.weight[token]
        x = item * (math.sqrt(DIM) if scale else 1.0)
        expected.append(x if positions == "none" else x + model.positions[position])
        assert where.positions_T[t] == position
    torch.testing.assert_close(model(tokens, where), torch.stack(expected))
    if positions != "none":
        assert model.positions.shape == (11, DIM)


def test_dropout_in_training_only():
    model, where = build(dropout=0.5), layout()
    tokens = torch.zeros(where.rows, dtype=torch.int64)
    assert 0.3 < (model(tokens, where) == 0).float().mean() < 0.7
    model.eval()
    assert (model(tokens, where) != 0).all()
