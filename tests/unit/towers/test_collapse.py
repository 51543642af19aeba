"""The watch for vectors that collapse, and what it costs."""

from __future__ import annotations

import pytest
import torch

from gr.modality import collapse
from gr.modality.collapse import effective_rank, mean_cosine
from gr.train import job
from gr.train.parts import build
from tests.towers import CPU, ITEMS


def test_collapsed_vectors_are_noticed(config):
    apart, one = torch.eye(8), torch.ones(8, 8) + 0.01 * torch.eye(8)
    assert (mean_cosine(apart), effective_rank(apart)) == (pytest.approx(0), pytest.approx(8))
    assert mean_cosine(one) > 0.99 and effective_rank(one) < 1.1
    tower = {"name": "text", "head": {"activation": "none"}}
    parts = build(config(tower), CPU)
    with torch.no_grad():
        parts.model.items.head.first.bias.fill_(100.0)
    figures, said = parts.model.watched()
    assert figures["item_cosine"] > 0.99 and "have collapsed" in said
    assert said.endswith("lower optimizer.lr, or look at what the items' contents are")  # no encoder trains
    assert "begin again with mode frozen" in collapse.advice(0.99, 1.0, learns=True)
    assert build(config({"name": "id", "text": None}), CPU).model.watched() == ({}, None)


@pytest.mark.parametrize(
    ("tower", "table"),
    [
        ({"name": "text", "refresh": 2}, "local"),
        ({"name": "fused", "fusion": "gated"}, "local"),
        ({"name": "fused", "fusion": "gated"}, "mapped"),
    ],
)
def test_the_watch_for_collapse_encodes_a_sample_where_nothing_else_asks_for_all(
    config, monkeypatch, tower, table
):
    monkeypatch.setattr(collapse, "SAMPLE", 8)
    sampled = "objective={name: sampled_softmax, negatives: 16}"
    parts = build(config({"mode": "tuned", **tower}, sampled, f"model.table={table}"), CPU)
    items, read = parts.model.items, []
    source = getattr(items.content, "formed", items.content).items
    inputs = source.inputs
    source.__dict__["inputs"] = lambda rows: (read.append(len(rows)), inputs(rows))[1]
    alone, _ = parts.model.watched()
    assert sum(read) == 8
    items.vectors(0, ITEMS)
    read.clear()
    of_all, _ = parts.model.watched()
    assert not read
    assert alone == pytest.approx(of_all, rel=1e-4)


@pytest.mark.parametrize("splits", ["[]", "[valid]"])
def test_a_run_that_evaluates_nothing_never_encodes_all_items(config, splits, capsys):
    tower = {"name": "text", "mode": "tuned"}
    rows = job.run(config(tower, "train.max_steps=1", f"eval.splits={splits}")).metrics
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert ("encoding items" in capsys.readouterr().err) == bool(evaluated) == (splits != "[]")
    assert all({"item_cosine", "item_rank"} <= row.keys() for row in evaluated)
