"""Vectors of items outside the batch, as they were some steps ago."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from gr.embeddings.view import View
from gr.models.step import StepContext
from gr.train import job
from gr.train.exporting import export
from gr.train.parts import build
from gr.train.runs import open_run
from tests.end_to_end.tiny import stopped_and_resumed, weights
from tests.towers import CLOSE, CPU, FEW, ITEMS, PLAIN, first_step, scores_of

OBJECTIVES = ["{name: sampled_softmax, negatives: 16}", "full_softmax"]


def inside(part):
    """(I,) whether an item stands in a micro-batch's sequences or is a target."""
    rows = torch.isin(torch.arange(ITEMS), torch.cat([part.tokens_T, part.targets_S]))
    assert 1 < rows.sum() < ITEMS - 5
    return rows


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kept_vectors_that_are_formed_in_each_step_change_no_loss_and_have_no_gradient(config, objective):
    tower = {"name": "fused", "mode": "tuned", "fusion": "gated"}
    asked = [f"objective={objective}", FEW, *PLAIN]
    loss, whole = first_step(build(config(tower, *asked), CPU))
    parts = build(config({**tower, "refresh": 1}, *asked), CPU)
    kept_loss, found = first_step(parts)
    assert kept_loss == pytest.approx(loss, rel=1e-6)

    model, items = parts.model, parts.model.items
    part = model.supervise(next(parts.batches.epoch(0)).share, 7)
    content = items.encoder(*items.content.formed.items.inputs(torch.arange(ITEMS)))
    content = torch.where(inside(part)[:, None], content, content.detach())
    items._leaf_ID = items._fused(items.beneath[0].weight, content)
    parts.engine.parts[0].optimizer.zero_grad()
    (model(part, StepContext(7, views={"items": View(items._leaf_ID)})) / part.count).backward()
    for name, parameter in model.named_dense():
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[name] / scale, parameter.grad / scale, **CLOSE, msg=name)
    first_layer = next(name for name in found if "encoder.layer.0" in name and name.endswith("query.weight"))
    assert (found[first_layer] - whole[first_layer]).abs().max() > 0.01 * whole[first_layer].abs().max()


@pytest.mark.parametrize("table", ["local", "mapped"])
def test_kept_vectors_are_formed_again_every_so_many_steps(config, table):
    """In between a step encodes the items of its batch, and no others."""
    sampled = "objective={name: sampled_softmax, negatives: 512, shared: true}"  # about all items
    tower = {"name": "text", "mode": "tuned", "refresh": 3}
    parts = build(config(tower, sampled, FEW, f"model.table={table}", *PLAIN), CPU)
    model, content, encoded_now = parts.model, parts.model.items.content, []
    inputs = content.formed.items.inputs
    content.formed.items.__dict__["inputs"] = lambda rows: (encoded_now.append(len(rows)), inputs(rows))[1]
    kept = None
    for number, batch in enumerate(islice(parts.batches.epoch(0), 5)):
        now = content.formed.all()
        kept = now if number % 3 == 0 else kept
        part, context = model.supervise(batch.share, number), StepContext(number, number=number)
        rows = torch.cat([wanted.flatten() for wanted in model.wanted([part], context)["items"]]).unique()
        fresh = inside(part)[rows]
        encoded_now.clear()
        parts.engine.forward_backward([part], context, part.count)
        assert sum(encoded_now) == fresh.sum() + (ITEMS if number % 3 == 0 else 0)
        model.views([part], context)
        found = model.items._content_UE
        assert torch.equal(found[~fresh], kept[rows[~fresh]]) and len(rows[~fresh]) > 5
        torch.testing.assert_close(found[fresh], now[rows[fresh]], **CLOSE)
        parts.engine.step(1.0)
    assert (now - kept).abs().max() > 1e-3


def test_kept_vectors_of_items_that_are_new_to_a_run_are_formed_at_once(config):
    """What no checkpoint had of them."""
    parts = build(config({"name": "text", "mode": "tuned", "refresh": 9}, FEW, *PLAIN), CPU)
    part = parts.model.supervise(next(parts.batches.epoch(0)).share, 7)
    (size, first, values), content = parts.model.items.state()["content"], parts.model.items.content
    assert size == [ITEMS, 16] and first == 0 and values.isnan().all()
    values[: ITEMS - 3] = 0.0  # filled by a checkpoint of fewer items
    parts.model.views([part], StepContext(5, number=5))
    assert torch.equal(content.state()["content"][2], content.all())
    kept = content.state()["content"][2].fill_(0.5)
    parts.model.views([part], StepContext(6, number=6))
    assert content.state()["content"][2] is kept


def test_a_run_with_kept_vectors_that_was_stopped_ends_as_one_that_was_not(config):
    """Stopped between two of the steps that form them: they are in the checkpoint, and in no export."""
    tower = {"name": "text", "mode": "tuned", "refresh": 3}
    overrides = [FEW, "train.max_steps=5", "eval.splits=[]", "checkpoint.every_steps=2"]
    whole = job.run(config(tower, *overrides, run="whole"))

    halves = config(tower, *overrides, run="halves")
    assert stopped_and_resumed(halves).metrics == whole.metrics
    one, other = weights(Path(whole.path)), weights(Path(halves.run.dir))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["kept/items/content"].shape == (ITEMS, 16)
    assert torch.equal(scores_of(open_run(whole.path)), scores_of(open_run(halves.run.dir)))
    manifest = export(whole.path, Path(whole.path) / "out")
    assert not any("content" in name for name in manifest.sizes)
