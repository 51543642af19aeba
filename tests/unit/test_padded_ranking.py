"""The ranking benchmark's yardstick computes what gr computes: the same loss and the same gradients."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.training import padded_ranking
from benchmarks.training.ranking import HIDDEN, TASKS, _one, _samples, made
from gr.data.collate import collate
from tests.precision import tolerance
from tests.unit.models_common import generator, loss_of, named

ITEMS, LENGTH = 40, 8


def test_loss_and_gradients_are_ours():
    _, ours = made(ITEMS, LENGTH, 8, 2, 2, 0.0)
    plain = padded_ranking.PaddedRanking(ITEMS, LENGTH + 1, 8, 2, 2, 4, TASKS, HIDDEN, 0.0)
    pairs = [
        (ours.items.weight, plain.embedding.weight, 1),
        (ours.input.positions, plain.positions, 0),
        (ours.history.weight, plain.done, 0),
        (ours.head.layers[0].weight, plain.hidden.weight, 0),
        (ours.head.layers[0].bias, plain.hidden.bias, 0),
        (ours.head.out.weight, plain.out.weight, 0),
        (ours.head.out.bias, plain.out.bias, 0),
    ]
    for a, b in zip(ours.encoder.layers, plain.layers, strict=True):
        pairs += [(a.uvqk.weight, b.uvqk.weight, 0), (a.output.weight, b.output.weight, 0)]
        pairs += [(a.output.bias, b.output.bias, 0)]
        pairs += [(a.position_bias, b.bias.position, 0), (a.time_bias, b.bias.time, 0)]
    assert len(pairs) == len(named(ours)) == len(list(plain.parameters()))
    g = generator(1)
    with torch.no_grad():
        for a, b, first in pairs:
            a.copy_(torch.randn(a.shape, generator=g) * 0.3)
            b[first:].copy_(a)
    samples = _samples(np.random.default_rng(0), np.array([9, 2, 5, 1]), ITEMS)
    batch = collate(samples)
    part = ours.supervise(batch, 5)
    loss = loss_of(ours, part) / part.count
    beside = plain(padded_ranking.pad([_one(samples, row) for row in range(4)], LENGTH + 1))
    # layers and a head of up to 64 terms, forward and backward; gradients add up 13 actions
    off = tolerance(64, stages=30, size=10.0)
    torch.testing.assert_close(loss, beside, **off)
    loss.backward()
    beside.backward()
    for a, b, first in pairs:
        torch.testing.assert_close(a.grad, b.grad[first:], **off)
