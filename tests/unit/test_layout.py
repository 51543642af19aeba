"""What the sequences of a batch are found to be, once for all layers."""

from __future__ import annotations

import pytest
import torch

from gr.models.hstu import HSTU
from gr.models.layout import JaggedLayout
from gr.models.sasrec import SASRec
from gr.models.transformer import Transformer
from tests.unit.models_common import generator, layout

LENGTHS = (3, 0, 9, 3)


def test_no_start_order_on_cpu() -> None:
    assert layout(LENGTHS).start_order_B is None


def test_start_order_on_a_device() -> None:
    """One (B,) int64 tensor on the offsets' device, found once."""
    offsets_B1 = torch.empty(len(LENGTHS) + 1, dtype=torch.int64, device="meta")
    where = JaggedLayout(offsets_B1, LENGTHS, max(LENGTHS))
    order_B = where.start_order_B
    assert order_B is not None and order_B is where.start_order_B
    assert (order_B.shape, order_B.dtype, order_B.device.type) == ((4,), torch.int64, "meta")


@pytest.mark.gpu
def test_start_order_is_from_the_longest_on() -> None:
    where = layout(LENGTHS)
    order_B = JaggedLayout(where.offsets_B1.cuda(), LENGTHS, max(LENGTHS)).start_order_B
    assert order_B is not None and order_B.tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("encoder", [HSTU, SASRec, Transformer])
def test_encoders_hand_the_start_order_to_the_attention(encoder: type) -> None:
    """Seen on CPU, where it isn't used, by giving one that isn't an order."""
    where = layout(LENGTHS)
    where.__dict__["start_order_B"] = torch.zeros(len(LENGTHS), dtype=torch.int64)
    model = encoder(encoder.Config(), 8, 20)
    with pytest.raises(ValueError, match="order must name each of the 4 sequences once"):
        model(torch.randn(sum(LENGTHS), 8, generator=generator()), where)
