"""Runs with a tower: what a checkpoint and an export have of it."""

from __future__ import annotations

from pathlib import Path

import torch

from gr.train import job
from gr.train.exporting import export
from gr.train.runs import open_run
from tests.end_to_end.tiny import stopped_and_resumed, weights
from tests.towers import CLOSE, scores_of


def test_a_tuned_run_that_was_stopped_ends_as_one_that_was_not(config):
    tower = {"name": "fused", "mode": "tuned", "fusion": "gated", "dropout": 0.1}
    overrides = ["train.max_steps=4", "eval.splits=[valid]", "checkpoint.every_steps=2"]
    whole = config(tower, *overrides, run="whole")
    rows = job.run(whole).metrics
    halves = config(tower, *overrides, run="halves")

    assert stopped_and_resumed(halves).metrics == rows
    one, other = weights(Path(whole.run.dir)), weights(Path(halves.run.dir))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("tables.items.encoder" in name for name in one)
    assert torch.equal(scores_of(open_run(whole.run.dir)), scores_of(open_run(halves.run.dir)))


def test_a_run_whose_ids_lie_elsewhere_goes_on_and_is_exported(config, tmp_path):
    """Stopped and gone on with it ends with the same bits; its export finds the same items with a local table."""
    tower = {"name": "fused", "mode": "tuned", "fusion": "concat"}
    overrides = ["model.table=mapped", "eval.splits=[]", "checkpoint.every_steps=2", "train.max_steps=4"]
    whole = job.run(config(tower, *overrides, run="whole"))

    halves = config(tower, *overrides, run="halves")
    stopped_and_resumed(halves)
    one, other = weights(Path(whole.path)), weights(Path(halves.run.dir))
    assert all(torch.equal(one[name], other[name]) for name in one) and "model/tables.item_ids.weight" in one
    export(whole.path, tmp_path / "out", overrides=["model.table=local"])
    run, exported = open_run(whole.path), open_run(tmp_path / "out")
    queries = torch.randn(5, run.model.items.dim, generator=torch.Generator().manual_seed(0))
    best, same = (r.model.similarity.topk(r.model.items, queries, 9) for r in (run, exported))
    torch.testing.assert_close(best[0], same[0], **CLOSE)
    assert torch.equal(best[1], same[1])


def test_a_frozen_encoder_is_in_no_checkpoint(config):
    result = job.run(config({"name": "text", "head": {"layers": 1}}, "train.max_steps=2"))
    names = [
        name for name in weights(Path(result.path)) if "tables.items" in name and name.startswith("model/")
    ]
    assert sorted(name.removeprefix("model/tables.items.") for name in names) == [
        *("head.first.bias", "head.first.weight", "head.more.0.bias", "head.more.0.weight")
    ]


def test_an_export_of_adapters_is_small_and_scores_like_its_run(config, tmp_path):
    tower = {"name": "text", "mode": "adapters", "adapters": {"name": "lora", "size": 2}}
    result = job.run(config(tower, "train.max_steps=2", "eval.splits=[]"))
    made = export(result.path, tmp_path / "out")
    kept = {name for name in made.sizes if name.startswith("tables.items.")}
    assert kept == {
        f"tables.items.{name}" for name, _ in open_run(result.path).model.items.named_parameters()
    }
    assert all("adapter" in name or ".head." in name for name in kept)
    assert torch.equal(scores_of(open_run(tmp_path / "out")), scores_of(open_run(result.path)))
