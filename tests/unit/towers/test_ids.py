"""Rows of ids: beneath a tower, and those that start from texts."""

from __future__ import annotations

from itertools import islice

import pyarrow as pa
import pytest
import torch

from gr.modality import tower as tower_module
from gr.models.step import StepContext
from gr.train.parts import build
from tests.packages import needs
from tests.towers import CLOSE, CPU, ITEMS, PLAIN, titles


@pytest.mark.parametrize("table", ["local", "mapped", "torchrec"])
@pytest.mark.parametrize("mode", ["tuned", "frozen"])
def test_ids_beneath_a_tower_may_be_any_table(config, monkeypatch, table, mode):
    """Steps and evaluations are those of a local table, whichever optimiser moves the rows, and however many rows are
    formed at a time."""
    needs(*(("torchrec", "fbgemm_gpu") if table == "torchrec" else ()))
    tower = {"name": "fused", "mode": mode, "fusion": "gated"}
    sampled = "objective={name: sampled_softmax, negatives: 16}"
    for optimizer in ("adamw", "lazy_adam"):
        found = {}
        for kind, at_once in {"local": tower_module.ROWS_AT_ONCE, table: 7}.items():
            monkeypatch.setattr(tower_module, "ROWS_AT_ONCE", at_once)
            parts = build(
                config(tower, sampled, f"model.table={kind}", f"optimizer={optimizer}", *PLAIN), CPU
            )
            model, steps = parts.model, []
            for number, batch in enumerate(islice(parts.batches.epoch(0), 3)):
                part = model.supervise(batch.share, number)
                steps.append(parts.engine.forward_backward([part], StepContext(number), part.count).item())
                parts.engine.step(1.0)
            assert not any("item_ids" in name for name, _ in model.items.named_parameters())
            queries = torch.randn(5, model.items.dim, generator=torch.Generator().manual_seed(0))
            best = model.similarity.topk(model.items, queries, 9)
            targets = torch.tensor([4, 0, 59, 17, 3])
            standing = model.similarity.standing(model.items, queries, targets)
            rows, rank = model.items.vectors(7, 31), model.items.watched()["item_rank"]
            found[kind] = steps, *best, standing.ranks_B, rows, rank, standing.losses_B
        one, other = found["local"], found[table]
        torch.testing.assert_close(other[0], one[0], rtol=1e-6, atol=0)
        assert torch.equal(other[2], one[2]) and torch.equal(other[3], one[3])
        torch.testing.assert_close(other[4], one[4], **CLOSE)
        assert other[5] == pytest.approx(one[5], rel=1e-4)
        torch.testing.assert_close(other[6], one[6], rtol=1e-5, atol=0)


@pytest.mark.parametrize("fusion", ["add", "concat", "gated"])
@pytest.mark.parametrize("table", ["local", "mapped"])
def test_ids_may_start_at_nothing(config, fusion, table):
    """Then an item is to the bit what a new one with its text is, and where vectors are added, what text alone makes of
    it; and its id learns."""
    sampled = "objective={name: sampled_softmax, negatives: 16}"

    def items_of(**tower):
        parts = build(config(tower, sampled, f"model.table={table}", *PLAIN), CPU)
        return parts, parts.model.items

    parts, items = items_of(name="fused", fusion=fusion, id_std=0)
    rows = items.vectors(0, ITEMS)
    new = items.unseen(pa.table({"title": titles()}))
    assert torch.equal(new.vectors_ID, rows)
    _, random = items_of(name="fused", fusion=fusion)
    assert not torch.equal(random.vectors(0, ITEMS), rows)
    if fusion == "add":
        assert torch.equal(items_of(name="text")[1].vectors(0, ITEMS), rows)
    part = parts.model.supervise(next(parts.batches.epoch(0)).share, 7)
    parts.engine.forward_backward([part], StepContext(7), part.count)
    parts.engine.step(1.0)
    assert items.beneath[0].vectors(0, ITEMS).abs().max() > 0


def test_a_table_starts_from_its_texts(folder, config):
    """Rows whose texts are alike start alike, with the spread that a table's rows have."""
    tower = {"name": "id", "text": None, "start": {"text": {"encoder": str(folder / "encoder")}}}
    items = build(config(tower), CPU).model.items
    weight = items.weight.detach()
    assert torch.equal(weight[3], weight[5])  # neither has a text
    assert weight.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
