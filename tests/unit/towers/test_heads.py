"""From content to an item's vector."""

from __future__ import annotations

import torch

from gr.modality.head import Fusion, Head, HeadSection
from tests.precision import tolerance


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    """An encoder may make it of an empty picture. What it's divided by would make its gradient 10^12 times as large."""
    head = Head(HeadSection(), 4, 2)
    content = torch.tensor([[0.0] * 4, [3.0, 0, 4, 0]], requires_grad=True)
    head(content)[0].sum().backward()
    assert not content.grad.any() and torch.equal(head(content)[0], torch.nn.functional.gelu(head.first.bias))
    unit = torch.nn.functional.normalize(content[1:], dim=1)
    assert torch.equal(head(content)[1:], torch.nn.functional.gelu(head.first(unit)))


def test_a_head_and_a_gate_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    ids, content = torch.randn(2, 5, 4, generator=generator)
    gated = Fusion("gated", 4)
    gate = torch.sigmoid(torch.cat([ids, content], 1) @ gated.mix.weight.T + gated.mix.bias)
    wanted = gate * ids + (1 - gate) * content
    torch.testing.assert_close(gated(ids, content), wanted, **tolerance(8, stages=3, size=4.0))
    for unit in (True, False):
        head = Head(HeadSection(unit=unit, **{"scale": 3.0} if unit else {}), 4, 2)
        given = 3 * content / content.norm(dim=1, keepdim=True) if unit else content
        wanted = torch.nn.functional.gelu(given @ head.first.weight.T + head.first.bias)
        torch.testing.assert_close(head(content), wanted, **tolerance(4, stages=3, size=4.0))
    deep = Head(HeadSection(activation="none", layers=2, dropout=0.5), 4, 4)
    for training in (True, False):
        torch.manual_seed(1)
        wanted = deep.first(content / content.norm(dim=1, keepdim=True))
        for layer in deep.more:
            wanted = layer(torch.nn.functional.dropout(wanted, 0.5, training))
        torch.manual_seed(1)
        torch.testing.assert_close(deep.train(training)(content), wanted, **tolerance(4, stages=6, size=8.0))
