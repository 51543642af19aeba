"""The training benchmark's yardstick computes what gr computes: the same loss and the same gradients; and the time
of a step is given to the right parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import record_function

from benchmarks.training import shares
from benchmarks.training.padded_baseline import PaddedBatch, PaddedHSTU, pad
from benchmarks.training.shapes import BOOKS, ML_1M, Shape, config
from gr.batch import SequenceBatch
from gr.models.retrieval import Retrieval
from tests.precision import tolerance
from tests.unit.models_common import loss_of, named, retrieval

ITEMS, LENGTH, KEY = 40, 12, 0x1234_5678_9ABC_DEF0
# Layers of 50 to 64 wide, forward and backward some forty sums of at most 200 terms (q, k, u and v side by side), which
# partly cancel: terms add up to ten times the largest result.
MODEL = tolerance(200, stages=40, size=10.0)
LENGTHS = (13, 2, 7, 5)  # actions, the one to be predicted included: from one input to the longest


def small(shape: Shape, dropout: float = 0.0) -> Shape:
    return replace(shape, items=ITEMS, length=LENGTH, negatives=30, dropout=dropout)


def models(shape: Shape) -> tuple[Retrieval, PaddedHSTU]:
    """Ours, with tables of unit scale so that every term matters, and the baseline with the same weights."""
    ours = retrieval(config(shape), shape.items, torch.ones(shape.items))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in named(ours).values():
            scale = 0.3 if parameter.dim() == 2 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    baseline = PaddedHSTU(**shape.baseline())
    pairs = same_parameters(ours, baseline)
    assert sum(b.numel() for _, b, _ in pairs) == sum(p.numel() for p in baseline.parameters())
    with torch.no_grad():
        for a, b, first in pairs:
            b[first:].copy_(a)
    return ours, baseline


def same_parameters(ours: Retrieval, baseline: PaddedHSTU) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """(ours, the baseline's, its first row that corresponds: 1 where row 0 is padding)."""
    pairs = [
        (ours.items.weight, baseline.embedding.weight, 1),
        (ours.input.positions, baseline.positions, 0),
    ]
    for a, b in zip(ours.encoder.layers, baseline.layers, strict=True):
        pairs += [
            (a.uvqk.weight, b.uvqk.weight, 0),
            (a.output.weight, b.output.weight, 0),
            (a.output.bias, b.output.bias, 0),
            (a.position_bias, b.bias.position, 0),
            (a.time_bias, b.bias.time, 0),
        ]
    return pairs


def batches() -> tuple[SequenceBatch, PaddedBatch]:
    generator = torch.Generator().manual_seed(2)
    actions = sum(LENGTHS)
    items_T = torch.randint(ITEMS, (actions,), generator=generator)
    seconds_T = torch.cat([torch.randint(10**6, (n,), generator=generator).cumsum(0) for n in LENGTHS])
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    jagged = SequenceBatch(
        offsets, torch.arange(len(LENGTHS)) + 5, LENGTHS, {"item": items_T, "time": seconds_T}
    )
    return jagged, pad(list(zip(items_T.split(LENGTHS), seconds_T.split(LENGTHS), strict=True)), LENGTH)


@pytest.mark.parametrize("shape", [ML_1M, BOOKS], ids=lambda shape: shape.name)
def test_loss_and_gradients_equal_ours(shape: Shape) -> None:
    shape = small(shape)
    ours, baseline = models(shape)
    jagged, padded = batches()

    supervision = ours.supervise(jagged, KEY)
    drawn = ours.objective.sampler.own(KEY, supervision, shape.negatives)[:, 1:]
    assert (drawn == supervision.targets_S[:, None]).any(), "no collision: the masking would go untested"
    loss = loss_of(ours, supervision, KEY) / supervision.count
    expected = baseline(padded, drawn.long() + 1)
    torch.testing.assert_close(loss, expected, **MODEL)

    loss.backward()
    expected.backward()
    for a, b, first in same_parameters(ours, baseline):
        assert b.grad.abs().max() > 0
        largest = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad / largest, b.grad[first:] / largest, **MODEL)
    assert baseline.embedding.weight.grad[0].abs().max() == 0  # padding learns nothing


def test_padding_changes_nothing() -> None:
    """A sequence's loss is the same alone, without padding to a longer companion."""
    _, baseline = models(small(ML_1M))
    _, padded = batches()
    together = baseline.encode(padded)
    alone = baseline.encode(PaddedBatch(*(getattr(padded, f)[2:3] for f in PaddedBatch.__dataclass_fields__)))
    torch.testing.assert_close(together[2:3], alone, **MODEL)
    assert together[1, LENGTHS[1] - 1 :].abs().max() == 0


def test_it_drops_out_and_draws_its_own_negatives() -> None:
    _, baseline = models(small(ML_1M, dropout=0.2))
    _, padded = batches()
    torch.manual_seed(3)
    first, second = baseline(padded), baseline(padded)
    assert torch.isfinite(first) and first != second


def test_backward_time_belongs_to_the_part_that_recorded_it() -> None:
    weight, table = (torch.randn(16, 16, requires_grad=True) for _ in range(2))
    x = torch.randn(8, 16, requires_grad=True)

    def step(_: int) -> None:
        y = F.linear(x, weight)
        with record_function("region:loss"):
            loss = (y @ table).logsumexp(1).sum()
        loss.backward()

    result = shares.measure(step, range(3))
    assert result["steps"] == 3
    assert sum(result["shares"].values()) == pytest.approx(1.0)
    where = {tuple(label.split(": ", 1)) for label in result["operators_ms"]}
    assert {part for part, name in where if name == "aten::mm"} == {"linear", "loss"}
    assert result["shares"]["attention"] == result["shares"]["data"] == 0
