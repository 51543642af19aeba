"""Item towers on paper: operations are those that torch counts of a real step, memory is what a step takes, and of an
encoder's files a plan reads the config alone."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training.planned_memory import measured_peak
from gr import config as configs
from gr.errors import UserError
from gr.processes import Processes
from gr.programs import plan as program
from gr.scaling.families import ModelAccounting
from gr.scaling.machine import cpu, gpu
from gr.scaling.plan import Imagined, Planner, _changes
from gr.scaling.towers import TowerWork
from gr.train import job
from gr.train.folder import RunFolder, read_rows
from gr.train.parts import build
from gr.train.planning import source
from tests.end_to_end.tiny import CONFIG, make_dataset
from tests.packages import needs
from tests.towers import ITEMS, make_encoder, make_image_encoder, make_pictures, titles
from tests.unit.test_plan import agreeing

needs("transformers")
pytest.importorskip("torchrec")
CPU = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("towers")
    make_dataset(path / "data", items=ITEMS, described={"title": titles()})
    make_encoder(path / "encoder", width=64)
    make_pictures(path / "pictures")
    for kind in ("vit", "swin", "resnet"):
        make_image_encoder(path / kind, kind)
    return path


@pytest.fixture
def config(folder, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", data=folder / "data"))

    def load(tower, *overrides):
        if tower["name"] == "image":
            kind = tower.get("image", "vit")
            section = {"encoder": str(folder / kind), "images": str(folder / "pictures"), "size": 16}
            tower = {**tower, "image": section}
        else:
            tower = {"text": {"encoder": str(folder / "encoder")}, **tower}
        return configs.load(file, [f"model.item_tower={json.dumps(tower)}", *overrides])

    return load


def plain(q, k, v, **unused):
    """Attention in products that torch's counter knows."""
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


TUNED = {"name": "text", "mode": "tuned"}
KINDS = {
    "tuned": TUNED,
    "the first layer stays": {**TUNED, "freeze": 1},
    "houlsby": {"name": "text", "mode": "adapters"},
    "lora": {"name": "text", "mode": "adapters", "adapters": {"name": "lora", "size": 4}},
    "prompt": {"name": "text", "mode": "adapters", "adapters": {"name": "prompt", "size": 3}},
    "frozen": {"name": "text", "mode": "frozen", "head": {"layers": 1}},
    "fused": {"name": "fused", "mode": "tuned", "fusion": "gated"},
    "recomputed": {**TUNED, "recompute": True},
    "vit": {"name": "image", "mode": "tuned"},
    "swin": {"name": "image", "mode": "tuned", "image": "swin"},
    "resnet": {"name": "image", "mode": "adapters", "image": "resnet", "adapters": {"name": "bitfit"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(config, monkeypatch, kind):
    """Of a real step's tower, forward and backward, its texts one by one: padding is no work of theirs."""
    tower = dict(KINDS[kind])
    run = config(tower)
    for section in ("text", "image"):
        if getattr(run.model.item_tower, section) is not None:
            run = configs.override(run, [f"model.item_tower.{section}.batch=1"])
    parts = build(run, CPU)
    items = parts.model.items
    wanted = [torch.arange(0, ITEMS, 2), torch.arange(0, ITEMS, 4)]
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    if items.content.encoder is None:
        items.content.of_step(wanted[0])  # encodes the catalogue, once a run
    with FlopCounterMode(display=False) as counter:
        view = items.views(wanted)[items.name]
        forward = counter.get_total_flops()
        view.weight_UD.grad = torch.ones_like(view.weight_UD)
        items.take_back(view)
        both = counter.get_total_flops()
    rows = wanted[0]
    found = TowerWork(items).step(rows, items.content.encodes(rows, rows))
    assert forward == pytest.approx(found.forward, rel=0.02)
    assert both - forward == pytest.approx(found.backward, rel=0.02)
    if items.content.encoder is None:
        assert set(found.parts) == {"head"}
    else:
        assert found.parts["head"].forward < 0.1 * found.forward, "nobody would notice the encoder"


def test_attention_on_cpus_is_counted_as_everywhere(config, monkeypatch):
    """Which torch's counter doesn't know; it forms products again rather than keep them."""
    text = "model.item_tower.text.max_tokens=128"  # of short ones attention is computed as it is written
    items, rows = build(config(TUNED, text), CPU).model.items, torch.arange(ITEMS)
    found = TowerWork(items).step(rows, rows).parts["encoder"]
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    expected = TowerWork(items).step(rows, rows).parts["encoder"]
    lengths = items.content.items.lengths_n.double()
    attention = 2 * 4 * 64 * float((lengths**2).sum())  # layers, two products, width
    assert found.forward == pytest.approx(expected.forward, rel=1e-6)
    assert found.backward - expected.backward == pytest.approx(0.5 * attention, rel=1e-6)


MEASURED = {
    "tuned": (TUNED, []),
    "recomputed": ({**TUNED, "recompute": True}, []),
    "adapters, micro-batches": (KINDS["houlsby"], ["train.micro_batch_actions=96"]),
    "fused, frozen": ({"name": "fused", "mode": "frozen"}, ["objective=full_softmax"]),
    "kept": ({**TUNED, "refresh": 4}, ["model.table=torchrec"]),
    "pictures": (KINDS["vit"], ["objective=in_batch"]),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_the_memory_of_a_step_is_what_it_takes(config, kind):
    tower, overrides = MEASURED[kind]
    run = config(tower, "train.global_batch=64", *overrides)
    parts = build(run, CPU)
    planned = Planner(*source(run), cpu(1)).plan(run, 1, {})
    assert measured_peak(run, parts, CPU) == pytest.approx(planned.memory.peak, rel=0.1)


def test_items_are_encoded_once_by_somebody_and_their_vectors_travel(config):
    run = config(TUNED, "train.global_batch=64", "objective=in_batch")
    one, four = (Planner(*source(run), cpu(4)).plan(run, count, {}) for count in (1, 4))
    alone, shared = one.rehearsal.encoding, four.rehearsal.encoding
    assert one.flops == four.flops and alone.flops.total > 0.2 * one.flops
    assert alone.items == alone.own == shared.items == ITEMS and shared.own == ITEMS / 4
    counted = [sum(often * done.flops for done, often in e.work) for e in (alone, shared)]
    assert counted[1] == pytest.approx(counted[0] / 4, rel=0.2)  # who has the longest texts
    sent = {exchange.name: exchange.sent for exchange in four.exchanges}
    assert sent["vectors of items"] == 4 * 64 * ITEMS / 4 * 3
    assert sent["gradients of vectors of items"] == 2 * 4 * 64 * ITEMS * 3 / 4
    encoder = one.memory.kept["item tower's weights"] / 4
    assert sent["gradients of whole tables"] == pytest.approx(2 * 4 * encoder * 3 / 4, rel=0.01)
    assert not one.exchanges


def test_what_is_frozen_has_neither_encoder_nor_moments_and_what_is_kept_is_dealt_out(config):
    def kept(tower, *overrides, count=1):
        run = config(tower, *overrides)
        return Planner(*source(run), cpu(4)).plan(run, count, {})

    tuned, adapters, frozen = (kept(KINDS[kind]).memory.kept for kind in ("tuned", "houlsby", "frozen"))
    assert tuned["item tower's moments"] == pytest.approx(2 * tuned["item tower's weights"], rel=0.01)
    assert 0 < adapters["item tower's moments"] < adapters["item tower's weights"]
    assert "tokens of items" in tuned and "tokens of items" not in frozen
    assert frozen["vectors of items"] == 4 * ITEMS * 64
    dealt = kept(KINDS["frozen"], "model.table=torchrec", count=4)
    assert dealt.memory.kept["vectors of items"] == 4 * ITEMS / 4 * 64
    assert {e.name for e in dealt.exchanges} >= {"row numbers of items", "vectors of items"}
    again = kept({**TUNED, "refresh": 3})
    assert again.rehearsal.encoding.flops.parts["refresh"].forward == pytest.approx(
        kept(TUNED, "objective=full_softmax").rehearsal.encoding.flops.parts["encoder"].forward / 3
    )


def test_of_an_encoder_a_plan_reads_the_config_alone(folder, config, tmp_path, capsys):
    """As large as that says; what isn't read, a text, is as long as it may be."""
    bare = tmp_path / "bare"
    bare.mkdir()
    said = json.loads((folder / "encoder/config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**said, "hidden_size": 8192, "num_hidden_layers": 4}))
    data = {"path": "nowhere", "max_length": 20}
    data["expected"] = {"items": 10**7, "users": 1000, "lengths": [5, 20], "columns": ["time"]}
    run = config({"name": "text", "mode": "adapters", "text": {"encoder": str(bare), "max_tokens": 16}})
    run = configs.override(run, [f"data={json.dumps(data)}", "train.precision=bf16"])
    plan = Planner(run, Imagined(run), gpu("h200", 12)).plan(run, 8, {}, advise=False)
    assert plan.memory.kept["item tower's weights"] > 2**32 and "tokens of items" not in plan.memory.kept
    encoding = plan.rehearsal.encoding
    weights = plan.memory.kept["item tower's weights"] / 4
    assert encoding.flops.parts["encoder"].forward == pytest.approx(
        2 * weights * 16 * encoding.items, rel=0.05
    )
    tried = [change for kind in _changes(run, 8, 8, tables_fit=True) for change, _ in kind]
    assert "model.item_tower.recompute=true" in tried and not plan.fits
    file = tmp_path / "hub.yaml"
    file.write_text(configs.to_yaml(configs.override(run, ["model.item_tower.text.encoder=nobody/has-this"])))
    assert program.main(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "a plan fetches nothing: give the path of a folder" in error and error.count("\n") == 1


def test_vectors_of_a_file_are_as_wide_as_the_file_says(config, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gr.modality.vectors import as_table

    pq.write_table(as_table(pa.array(range(3)), torch.randn(3, 24)), tmp_path / "some.parquet")
    cached = {"name": "text", "mode": "cached", "text": None, "vectors": str(tmp_path / "some.parquet")}
    run = config(cached)
    plan = Planner(*source(run), cpu(1)).plan(run, 1, {})
    assert plan.memory.kept["vectors of items"] == 4 * ITEMS * 24
    gone = config({**cached, "vectors": str(tmp_path / "none.parquet")})
    with pytest.raises(UserError, match="write it with the program encode"):
        Planner(*source(gone), cpu(1)).plan(gone, 1, {})


def test_a_rehearsal_and_a_plan_agree(config, tmp_path, capsys):
    plan = agreeing(config(TUNED), tmp_path, capsys)
    assert plan["step"]["encoded"]["items"] > 0
    assert "items encoded, with gradients" in capsys.readouterr().out


def test_the_log_has_the_work_of_a_tower(config, monkeypatch):
    """With a softmax over all every item is encoded in each step, once."""
    monkeypatch.setattr(job, "plot_run", lambda folder, shown: None)
    plain = ["train.max_steps=2", "eval.splits=[]", "objective=full_softmax"]
    run = config(TUNED, *plain)
    rows = [row for row in job.run(run).metrics if row["kind"] == "train"]
    parts = build(run, CPU)
    every = torch.arange(ITEMS)
    tower = TowerWork(parts.model.items).step(every, every).total
    account = ModelAccounting(parts.model, run)
    (batch,) = islice(parts.batches.epoch(0), 1)
    rest = account.step(batch.share.lengths).total
    assert rows[0]["flops"] == pytest.approx(tower + rest, rel=1e-6) and tower > 0.2 * rest
    timing = read_rows(RunFolder(run.run.dir).timing)[-1]
    assert timing["tflops"] > 0 and timing["mfu"] <= timing["mfu_padded"]  # rounded: alike on a slow machine
    parts.model.items.content.formed_G = every
    worked, padded = TowerWork(parts.model.items).last()
    assert worked == tower < padded
