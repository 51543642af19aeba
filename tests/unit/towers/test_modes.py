"""Whatever of an encoder trains, and however a step is cut, a tower's rows and gradients are the same."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch

from gr.modality.reader import TextReader, TextSection
from gr.modality.vectors import as_table
from gr.models.step import StepContext
from gr.train import job
from gr.train.parts import build
from gr.train.runs import open_run
from tests.towers import CLOSE, CPU, FEW, PLAIN, first_step, scores_of


def test_frozen_cached_and_tuned_without_a_rate_score_alike(folder, config, tmp_path):
    """To the bit while nothing has moved; after an epoch in which a tuned encoder's rate was 0, but for rounding."""
    section = TextSection(encoder=str(folder / "encoder"))
    frozen = build(config({"name": "text"}), CPU)
    found = TextReader(section, CPU).vectors(frozen.data.catalogue)
    pq.write_table(as_table(frozen.data.catalogue.ids, found), tmp_path / "vectors.parquet")
    cached_tower = {
        "name": "text",
        "mode": "cached",
        "text": None,
        "vectors": str(tmp_path / "vectors.parquet"),
    }
    towers = {"frozen": {"name": "text"}, "cached": cached_tower, "tuned": {"name": "text", "mode": "tuned"}}
    built = {mode: build(config(tower), CPU) for mode, tower in towers.items()}
    for parts in built.values():
        assert torch.equal(scores_of(parts), scores_of(frozen))
    still = "optimizer.groups=[{match: ^tables.items.encoder, lr: 0.0}]"
    scores, losses = {}, {}
    for mode, tower in towers.items():
        overrides = [*PLAIN, "train.epochs=1", *[still] * (mode == "tuned")]
        result = job.run(config(tower, *overrides, run=mode))
        run = open_run(result.path)
        scores[mode] = scores_of(run)
        losses[mode] = torch.tensor([r["loss"] for r in result.metrics if r["kind"] == "train"])
    assert torch.equal(scores["frozen"], scores["cached"]) and torch.equal(losses["frozen"], losses["cached"])
    torch.testing.assert_close(losses["tuned"], losses["frozen"], rtol=1e-4, atol=0)
    torch.testing.assert_close(scores["tuned"], scores["frozen"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("fusion", ["add", "concat", "gated"])
@pytest.mark.parametrize("objective", ["{name: sampled_softmax, negatives: 16}", "full_softmax"])
def test_gradients_are_those_of_encoding_every_occurrence(config, fusion, objective):
    """What a view of distinct rows gathers is what autograd finds where every look-up encodes anew."""
    tower = {"name": "fused", "mode": "tuned", "fusion": fusion}
    parts = build(config(tower, f"objective={objective}", *PLAIN), CPU)
    loss, found = first_step(parts)
    items = parts.model.items
    assert found.keys() == {name for name, _ in parts.model.named_dense()}
    parts.engine.parts[0].optimizer.zero_grad()
    in_parts_loss, in_parts = first_step(parts, cut=40)
    assert in_parts_loss == pytest.approx(loss, rel=1e-5)
    parts.engine.parts[0].optimizer.zero_grad()

    ids, mask = items.content.items.inputs(torch.arange(items.rows))
    (of_ids,) = items.beneath

    class Naive:
        """A view that encodes each row that is asked for, again and again, with a graph of its own."""

        numbering = bias_U = None

        @property
        def weight_UD(self):
            return items._fused(of_ids.weight, items.encoder(ids, mask))

        def place(self, rows):
            return rows

        def lookup(self, rows):
            content = items.encoder(ids[rows.flatten()], mask[rows.flatten()])
            return items._fused(of_ids.weight[rows.flatten()], content).view(*rows.shape, -1)

    batch = next(parts.batches.epoch(0)).share
    part = parts.model.supervise(batch, 7)
    items._leaf_ID = Naive().weight_UD
    naive = parts.model(part, StepContext(7, views={"items": Naive()})) / part.count
    naive.backward()
    for name, parameter in parts.model.named_dense():
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        for gradient in (found[name], in_parts[name]):
            torch.testing.assert_close(gradient / scale, parameter.grad / scale, **CLOSE, msg=name)


def test_forming_again_changes_no_gradient(config):
    kept = first_step(build(config({"name": "text", "mode": "tuned"}, *PLAIN), CPU))
    again = first_step(build(config({"name": "text", "mode": "tuned", "recompute": True}, *PLAIN), CPU))
    assert kept[0] == again[0]
    words = [name for name in kept[1] if name.endswith("word_embeddings.weight")]
    assert len(words) == 1
    for name in kept[1].keys() - set(words):
        assert torch.equal(kept[1][name], again[1][name]), name
    # looked up once a step, or once a chunk: a token's gradient is a sum in another order
    torch.testing.assert_close(kept[1][words[0]], again[1][words[0]], **CLOSE)


@pytest.mark.parametrize("refresh", [None, 1])
def test_steps_in_bfloat16_encode_in_it_and_evaluations_do_not(config, refresh):
    tower = {"name": "text", "mode": "tuned", "refresh": refresh}
    asked = ["train.precision=bf16", FEW, *PLAIN]
    parts = build(config({k: v for k, v in tower.items() if v is not None}, *asked), CPU)
    items, kinds = parts.model.items, []
    layer = items.encoder.model.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(lambda module, given, output: kinds.append(output.dtype))
    loss, gradients = first_step(parts)
    assert set(kinds) == {torch.bfloat16} and all(g.dtype == torch.float32 for g in gradients.values())
    kinds.clear()
    items.catalogue()
    assert set(kinds) == {torch.float32}


ADAPTERS = ("houlsby", "parallel", "pfeiffer", "compacter", "lora", "bitfit")


@pytest.mark.parametrize("name", [*ADAPTERS, "prompt"])
def test_adapters_start_from_the_frozen_encoder_and_train_alone(config, name):
    frozen = build(config({"name": "text"}), CPU).model.items
    tower = {"name": "text", "mode": "adapters", "adapters": {"name": name, "size": 4}}
    parts = build(config(tower, *PLAIN), CPU)
    items = parts.model.items
    if name != "prompt":
        assert torch.equal(items.catalogue(), frozen.catalogue())
    before = {n: p.clone() for n, p in items.encoder.named_parameters()}
    training = {n for n, _ in items.named_parameters()}
    first_step(parts)
    parts.engine.step(1.0)
    moved = {f"encoder.{n}" for n, p in items.encoder.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= training
    own = {n for n in training if n.startswith("encoder.")}
    assert all(("adapter" in n or "prompt" in n) if name != "bitfit" else n.endswith("bias") for n in own)
    assert not torch.equal(items.catalogue(), frozen.catalogue())


def test_the_first_layers_of_a_tuned_encoder_can_stay(config):
    items = build(config({"name": "text", "mode": "tuned", "freeze": 1}), CPU).model.items
    names = [name for name, _ in items.named_parameters() if name.startswith("encoder.")]
    assert names and all(".layer.1." in name for name in names)
