"""Item towers: exact where they must be, whatever their mode and however a step is cut."""

from __future__ import annotations

import json
import logging
import re
import shutil
from itertools import combinations, islice
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from gr import config as configs
from gr.adapters.insert import insert
from gr.adapters.section import AdapterSection
from gr.data.dataset import SequenceDataset
from gr.embeddings.shares import Shares
from gr.embeddings.view import View
from gr.errors import UserError
from gr.modality import collapse, encoder as encoders, tower as tower_module
from gr.modality.chunks import BUCKET, chunks
from gr.modality.collapse import effective_rank, mean_cosine
from gr.modality.content import Fixed, FixedShares, encoded
from gr.modality.digest import sketched, sums_of
from gr.modality.encoder import config_of, load_tokenizer, transformers
from gr.modality.find import loaded
from gr.modality.head import Fusion, Head, HeadSection
from gr.modality.reader import TextReader, TextSection
from gr.modality.texts import Template, as_texts, tokenised
from gr.modality.vectors import as_table, read_file
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train import checkpoint, job
from gr.train.checkpoint import find_checkpoint
from gr.train.encoding import encode, read_tower
from gr.train.exporting import export
from gr.train.folder import RunFolder
from gr.train.item_files import read_items
from gr.train.parts import build
from gr.train.recommend import recommend, unseen_items, write_item_vectors
from gr.train.runs import open_run
from tests.end_to_end.tiny import CONFIG, make_dataset, stopped_and_resumed, weights
from tests.packages import needs
from tests.precision import tolerance
from tests.towers import ITEMS, make_encoder, make_image_encoder, make_titled, titles

needs("transformers")
CPU = Processes(torch.device("cpu"))
# Two layers of width 16 on ten tokens, a head, an encoder of width 16 and a loss of 17 terms, all of unit size
CLOSE = tolerance(64, stages=12, size=10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("towers")
    make_titled(path / "data")
    make_encoder(path / "encoder")
    return path


@pytest.fixture
def config(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "plot_run", lambda folder, shown: None)  # pictures take longer than runs
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", data=folder / "data"))

    def load(tower, *overrides, run="run"):
        tower = {"text": {"encoder": str(folder / "encoder")}, **tower}
        tower = {key: value for key, value in tower.items() if value is not None}
        given = [f"model.item_tower={json.dumps(tower)}", f"run.dir={tmp_path / run}", *overrides]
        return configs.load(file, given)

    return load


PLAIN = ("model.input.dropout=0", "model.encoder.dropout=0", "train.clip_norm=null")
SHORT = ("objective={name: sampled_softmax, negatives: 16}", "train.max_steps=1", "eval.splits=[]")


def first_step(parts, cut=None):
    """The engine after the gradients of the first global batch, which is cut into micro-batches of ``cut`` actions."""
    batch = next(parts.batches.epoch(0)).share
    pieces = [parts.model.supervise(p, 7) for p in batch.split(cut or 10**6)]
    loss = parts.engine.forward_backward(pieces, StepContext(7), sum(p.count for p in pieces))
    return loss.item(), {name: p.grad.clone() for name, p in parts.model.named_dense() if p.grad is not None}


def scores_of(parts_or_run):
    with torch.no_grad():
        model = parts_or_run.model
        queries = torch.randn(5, model.items.dim, generator=torch.Generator().manual_seed(0))
        return model.similarity.scores(model.items, queries)


# -- the modes are one ------------------------------------------------------------------------------------------------


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


# -- vectors of items outside the batch -----------------------------------------------------------------------------

FEW = "train.global_batch=2"  # of two users, who have not seen all items
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


def test_a_text_is_encoded_by_itself(folder, config):
    """Whatever it is padded beside."""
    reader = TextReader(TextSection(encoder=str(folder / "encoder")), CPU)
    encoder = reader.encoder()
    tokens = tokenised([t or "" for t in titles()], reader.tokenizer, 20)
    together = encoded(encoder, tokens, CPU, 16).own_RE
    with torch.no_grad():
        for item in range(0, ITEMS, 7):
            alone = encoder(*tokens.inputs(torch.tensor([item])))
            torch.testing.assert_close(together[item], alone[0], **CLOSE)


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


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_prompt_is_words_before_a_text_and_no_part_of_its_vector(folder, pooling):
    """Words whose embeddings it has would do the same in its place."""
    encoder = encoders.TextEncoder(str(folder / "encoder"), pooling).eval()
    insert(encoder.model, AdapterSection(name="prompt", size=3), 7)
    words = torch.tensor([[5, 9, 11]]).expand(2, -1)
    ids, mask = torch.tensor([[2, 7, 8, 3], [2, 6, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        encoder.model.prompt.vectors.copy_(encoder.model.get_input_embeddings()(words[0]))
        whole = torch.cat([words, ids], 1), torch.cat([torch.ones_like(words), mask], 1)
        hidden = encoder.model(input_ids=whole[0], attention_mask=whole[1]).last_hidden_state[:, 3:]
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        wanted = hidden[:, 0] if pooling == "cls" else mean
        torch.testing.assert_close(encoder(ids, mask), wanted, **CLOSE)


def test_a_tokenizer_is_given_no_more_of_a_text_than_can_count(folder):
    reader, given = TextReader(TextSection(encoder=str(folder / "encoder")), CPU), []

    class Watching:
        def __getattr__(self, name):
            return getattr(reader.tokenizer, name)

        def __call__(self, texts, **settings):
            given.extend(map(len, texts))
            return reader.tokenizer(texts, **settings)

    tokenised(["red " * 100_000, "blue"], Watching(), 8)
    assert given == [8 * 64, 4]


def test_texts_of_a_chunk_are_about_as_long():
    """None is padded by as many tokens as a bucket has, none is left out."""
    lengths = torch.randint(1, 160, (300,), generator=torch.Generator().manual_seed(0))
    parts = chunks(lengths, 64)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    assert all(1 <= len(part) <= 64 for part in parts) and len(parts) <= 160 // BUCKET
    assert all(lengths[part].max() - lengths[part].min() < BUCKET for part in parts)


def test_vectors_are_kept_beside_the_dataset_for_what_they_were_made_of(tmp_path, monkeypatch):
    """And are read where that is asked for again."""
    catalogue, encoder = make_titled(tmp_path / "data").catalogue, str(make_encoder(tmp_path / "encoder"))
    asked = [{}, {"pooling": "cls"}, {"max_tokens": 4}, {"fields": ["item_id"]}]

    def vectors_of(settings):
        return TextReader(TextSection(encoder=encoder, **settings), CPU).vectors(catalogue)

    found = [vectors_of(settings) for settings in asked]
    make_encoder(tmp_path / "encoder", seed=1)
    others = vectors_of({})
    assert not any(torch.equal(*pair) for pair in combinations([*found, others], 2))
    make_encoder(tmp_path / "encoder")
    monkeypatch.setattr(TextReader, "encoded", None)  # nothing is encoded any more
    assert all(torch.equal(vectors_of(settings), of) for settings, of in zip(asked, found, strict=True))


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


# -- runs -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("table", ["local", "mapped"])
def test_a_run_is_opened_with_the_frozen_encoder_that_it_was_trained_with(config, tmp_path, table):
    """One that stands in its place is refused, however alike; it may have moved."""
    tower = {"name": "text", "text": {"encoder": str(make_encoder(tmp_path / "encoder"))}}
    sampled = "objective={name: sampled_softmax, negatives: 16}"
    overrides = [sampled, f"model.table={table}", "train.max_steps=1", "eval.splits=[]"]
    result = job.run(config(tower, *overrides))
    scores = open_run(result.path).model.items.vectors(0, ITEMS)
    export(result.path, tmp_path / "out")
    (tmp_path / "encoder").rename(tmp_path / "before")
    make_encoder(tmp_path / "encoder", seed=1)
    for path in (result.path, tmp_path / "out"):
        with pytest.raises(UserError, match="was trained onto frozen weights that are others now"):
            open_run(path)
    shutil.rmtree(tmp_path / "encoder")
    (tmp_path / "before").rename(tmp_path / "encoder")
    assert torch.equal(open_run(result.path).model.items.vectors(0, ITEMS), scores)


@pytest.mark.parametrize("mode", ["frozen", "tuned"])
def test_a_run_is_opened_with_the_tokenizer_and_the_texts_that_it_was_trained_with(config, tmp_path, mode):
    """Others that stand in their place are refused, in runs and in exports; a dataset that has grown may tell of its
    items anew, by the same tokenizer."""
    make_titled(tmp_path / "data")
    text = {"encoder": str(make_encoder(tmp_path / "encoder"))}
    tower, asked = {"name": "text", "mode": mode, "text": text}, [f"data.path={tmp_path / 'data'}", *SHORT]
    run = job.run(config(tower, *asked)).path
    export(run, tmp_path / "out")

    def refused(sentence):
        for path in (run, tmp_path / "out"):
            with pytest.raises(UserError, match=sentence) as refusal:
                open_run(path)
            assert "\n" not in str(refusal.value)
        with pytest.raises(UserError, match=sentence):
            job.resume(run, ["train.max_steps=2"])

    described = {"title": ["new soap", *titles()[1:]]}
    shutil.rmtree(tmp_path / "data")
    make_dataset(tmp_path / "data", items=ITEMS, described=described)
    refused("was trained with other texts of the items than the dataset has now")
    checkpoint.load(
        find_checkpoint(RunFolder(run), "last"), build(config(tower, *asked), CPU).model, growing=True
    )

    file = tmp_path / "encoder/tokenizer.json"
    before = file.read_text()
    said = json.loads(before)
    words = said["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    file.write_text(json.dumps(said))
    refused("was trained with another tokenizer than the encoder of model.item_tower comes with now")
    start = config(tower, f"train.start_from={run}", *asked, run="another")
    with pytest.raises(UserError, match="was trained with another tokenizer than the encoder of"):
        build(start, CPU)
    file.write_text(before)

    shutil.rmtree(tmp_path / "data")
    make_titled(tmp_path / "data")
    file = tmp_path / "encoder/config.json"  # the same shapes, and other vectors
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "num_attention_heads": 4}))
    refused("was trained with other settings .* than the encoder of model.item_tower comes with now")
    with pytest.raises(UserError, match=r"with other settings .*: name an encoder with that one's settings"):
        build(start, CPU)
    file.write_text(before)
    open_run(tmp_path / "out")
    assert job.resume(run, ["train.max_steps=2"]).finished


@pytest.fixture
def vectors_of_titles(folder, tmp_path):
    """A file of them, as an encoder made them."""
    catalogue = SequenceDataset(folder / "data").catalogue
    found = TextReader(TextSection(encoder=str(folder / "encoder")), CPU).vectors(catalogue)
    pq.write_table(as_table(catalogue.ids, found), file := tmp_path / "vectors.parquet")
    return file, catalogue.ids, found


@pytest.mark.parametrize("table", ["local", "mapped"])
def test_a_run_is_opened_with_the_vectors_that_it_was_trained_with(
    config, tmp_path, table, vectors_of_titles
):
    """Encoded again, in another order, they are the same; others that stand in their place are refused, one too."""
    file, ids, found = vectors_of_titles
    tower = {"name": "text", "mode": "cached", "text": None, "vectors": str(file)}
    sampled = "objective={name: sampled_softmax, negatives: 16}"
    result = job.run(config(tower, sampled, f"model.table={table}", "train.max_steps=1", "eval.splits=[]"))
    export(result.path, tmp_path / "out")
    places = [result.path, tmp_path / "out"]

    order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(0))
    rounded = (found * (1 + 2.0**-13 * torch.randn_like(found)))[order]
    pq.write_table(as_table(ids.take(pa.array(order.numpy())), rounded), file)
    for path in places:
        open_run(path)
    for others in (found.flip(0), torch.cat([found[:-1], -found[-1:]])):
        pq.write_table(as_table(ids, others), file)
        for what, path in (("checkpoint", places[0]), ("export", places[1])):
            said = f"{what} '{path}.* was trained with other vectors than '{file}' has now"
            with pytest.raises(UserError, match=said) as refused:
                open_run(path)
            assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match="was trained with other vectors than"):
            job.resume(result.path, ["train.max_steps=2"])
    pq.write_table(as_table(ids, found), moved := tmp_path / "moved.parquet")
    file.unlink()
    assert job.resume(result.path, ["train.max_steps=2", f"model.item_tower.vectors={moved}"]).finished
    export(result.path, tmp_path / "again", overrides=[f"model.item_tower.vectors={moved}"])
    assert torch.equal(scores_of_some(tmp_path / "again"), scores_of_some(result.path))


def scores_of_some(path):
    run = open_run(path)
    return run.model.similarity.topk(run.model.items, torch.eye(16), 9)[0]


def test_a_sketch_is_a_sum_over_stretches(vectors_of_titles):
    """And the first items of a catalogue that has grown are known by it."""
    _, _, found = vectors_of_titles
    parts = [sums_of(found[a:b], a) for a, b in ((0, 7), (7, 7), (7, ITEMS))]
    whole = sketched("v", ITEMS, sums_of(found, 0))
    assert [sum(terms) for terms in zip(*parts)] == pytest.approx(sums_of(found, 0), rel=1e-9)
    assert not whole.differs(sketched("v", ITEMS, [sum(terms) for terms in zip(*parts)]))
    dealt = FixedShares(16, lambda: Shares(ITEMS, found, CPU.world), None, CPU, file="v")
    for content in (Fixed(16, lambda: found, None, torch.device("cpu"), file="v"), dealt):
        assert content.sketch() == whole and content.sketch(9) == sketched("v", 9, sums_of(found[:9], 0))
        assert content.sketch(9).differs(whole)
    assert whole.size == pytest.approx(found.norm().item())


def test_an_encoder_that_stays_is_digested_once(config, monkeypatch):
    """What is kept beside the dataset and the checkpoint know it by the same digits."""
    digested = []
    real = encoders.digest_of
    monkeypatch.setattr(
        encoders, "digest_of", lambda tensors, said="": digested.append(len(tensors)) or real(tensors, said)
    )
    job.run(config({"name": "text"}, "train.max_steps=1", "eval.splits=[]"))
    assert len(digested) == 1


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


def test_a_table_starts_from_its_texts(folder, config):
    """Rows whose texts are alike start alike, with the spread that a table's rows have."""
    tower = {"name": "id", "text": None, "start": {"text": {"encoder": str(folder / "encoder")}}}
    items = build(config(tower), CPU).model.items
    weight = items.weight.detach()
    assert torch.equal(weight[3], weight[5])  # neither has a text
    assert weight.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)


def test_items_that_training_never_saw_are_recommended(folder, config, tmp_path):
    """Beside the others, with the score that a known item of the same text has; of a cached tower by their vectors."""
    tower = tmp_path / "tower.yaml"
    tower.write_text(f"encoder: {json.dumps(str(folder / 'encoder'))}\n")
    new, file = (
        pa.table({"item_id": [1007, 1011], "title": [titles()[7], titles()[11]]}),
        tmp_path / "new.parquet",
    )
    pq.write_table(new, file)
    section = read_tower(str(tower))
    written, count, width = encode(str(folder / "data"), section, str(tmp_path / "all.parquet"), CPU)
    of_new = encode(str(folder / "data"), section, str(tmp_path / "new-vectors.parquet"), CPU, str(file))
    assert (count, width, of_new[1:]) == (ITEMS, 16, (2, 16))
    towers = {
        "text": ({"name": "text"}, file),
        "cached": ({"name": "text", "mode": "cached", "text": None, "vectors": str(written)}, of_new[0]),
    }
    for name, (asked, items) in towers.items():
        result = job.run(config(asked, "train.max_steps=1", "eval.splits=[]", run=name))
        run = open_run(result.path)
        recommend(run, tmp_path / "recs.parquet", k=ITEMS + 2, exclude="none", new_items=items)
        write_item_vectors(run, tmp_path / "items.parquet", items)
        vectors = pq.read_table(tmp_path / "items.parquet").to_pylist()
        assert [row["item_id"] for row in vectors] == [*range(ITEMS), 1007, 1011]
        for known, unseen in ((7, ITEMS), (11, ITEMS + 1)):
            assert vectors[unseen]["vector"] == pytest.approx(vectors[known]["vector"], abs=1e-4)
        for row in pq.read_table(tmp_path / "recs.parquet").to_pylist()[:20]:
            scores = dict(zip(row["item_ids"], row["scores"], strict=True))
            assert len(scores) == ITEMS + 2 and row["scores"] == sorted(row["scores"], reverse=True)
            for known in (7, 11):
                assert scores[1000 + known] == pytest.approx(scores[known], rel=1e-4, abs=1e-4)
    with pytest.raises(UserError, match="give new items a column vector"):
        recommend(run, tmp_path / "recs.parquet", new_items=file)
    pq.write_table(new.set_column(0, "item_id", pa.array([1007, 11])), file)
    with pytest.raises(UserError, match="has 1 items that the catalogue knows"):
        recommend(run, tmp_path / "recs.parquet", new_items=file)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([1007, 1007], "has 1 ids more than once (1007 is the first)"),
        ([1007, None], "has 1 items without an item_id"),
        (["1007", "abc"], "item_id 'abc' of '{file}' is not an integer id"),
        (["1007", ""], "item_id '' of '{file}' is empty"),
        (["0", "007"], "item_id '007' of '{file}' would become another id"),
        ([True, False], "column item_id of '{file}' is of type bool"),
        ([[1], [2]], "column item_id of '{file}' is of type list"),
    ],
)
def test_ids_of_new_items_are_ids(folder, config, tmp_path, ids, sentence):
    file, parts = tmp_path / "new.parquet", build(config({"name": "text"}), CPU)
    run = SimpleNamespace(model=parts.model, data=parts.data)
    pq.write_table(pa.table({"item_id": ids, "title": ["red", "blue"]}), file)
    with pytest.raises(UserError, match=re.escape(sentence.format(file=file))):
        unseen_items(run, file)


def test_columns_of_new_items_have_names_of_their_own(tmp_path):
    columns = [pa.array([1]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, ["item_id", "title", "title"]), tmp_path / "new.parquet")
    with pytest.raises(UserError, match="has several columns 'title'"):
        read_items(tmp_path / "new.parquet")


def test_nothing_is_encoded_for_a_file_that_cannot_be_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TextReader, "encoded", None)
    section = TextSection(encoder=str(folder / "encoder"), batch=7)  # of which nothing has been kept
    for out, sentence in ((tmp_path, "is a folder"), (tmp_path / "no/v.parquet", "there is no folder")):
        with pytest.raises(UserError, match=sentence):
            encode(str(folder / "data"), section, str(out), CPU)


def test_a_file_of_new_items_has_to_be_there(tmp_path):
    with pytest.raises(UserError, match=r"no file '.*' with items"):
        read_items(tmp_path / "nowhere.parquet")


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


def test_the_first_layers_of_a_tuned_encoder_can_stay(config):
    items = build(config({"name": "text", "mode": "tuned", "freeze": 1}), CPU).model.items
    names = [name for name, _ in items.named_parameters() if name.startswith("encoder.")]
    assert names and all(".layer.1." in name for name in names)


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
    assert build(config({"name": "id", "text": None}), CPU).model.watched() == ({}, None)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "overrides", "sentence"),
    [
        ({"name": "text", "text": {"encoder": "./nowhere"}}, [], "no folder './nowhere' with an encoder"),
        ({"name": "text", "text": {"encoder": "package:no_such_package"}}, [], "make setup-encoders"),
        ({"name": "text", "mode": "cached", "text": None}, [], "mode cached reads vectors from a file"),
        ({"name": "text", "mode": "cached", "vectors": "no.parquet"}, [], "no file 'no.parquet'"),
        ({"name": "text", "mode": "tuned", "text": None}, [], "mode tuned needs an encoder"),
        ({"name": "text"}, ["model.table=mapped", "objective=full_softmax"], "use model.table=local"),
        ({"name": "text"}, ["model.similarity.item_bias=true"], "item_bias is a number for each row"),
        ({"name": "fused"}, ["optimizer=lazy_adam", "objective=full_softmax"], "use optimizer=adamw"),
        (
            {"name": "text", "mode": "tuned", "freeze": 2},
            [],
            "freeze is 2, and the encoder, a BertModel, has 2",
        ),
        (
            {"name": "text", "mode": "tuned"},
            ["optimizer.groups=[{match: ^tables.items.encodr, lr: 0.1}]"],
            "leaves: names begin with tables.items.head, tables.items.encoder, input, encoder$",
        ),
        (
            {"name": "text", "mode": "tuned", "refresh": 2},
            ["objective=in_batch"],
            "candidates outside of the batch",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(config, tower, overrides, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        build(config(tower, *overrides), CPU)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mode", ["frozen", "tuned"])
def test_what_cannot_be_read_is_refused_before_there_is_a_run(folder, config, tmp_path, mode):
    """Or the folder of a run with a slip in it would be there, and be in the way of the next attempt."""
    for wrong, sentence in (
        ({"fields": ["titel"]}, "reads column 'titel', which is none of the items': did you mean 'title'"),
        ({"template": "{title"}, "can't be read"),
        ({"max_tokens": 2}, "max_tokens is 2, and the encoder puts 2 marks around a text"),
    ):
        text = {"encoder": str(folder / "encoder"), **wrong}
        with pytest.raises(UserError, match=sentence):
            job.run(config({"name": "text", "mode": mode, "text": text}, *SHORT))
        assert not (tmp_path / "run").exists()


def test_odd_encoders_are_refused(folder, config, tmp_path, monkeypatch):
    def refused(encoder):
        with pytest.raises(UserError) as found:
            build(config({"name": "text", "text": {"encoder": str(encoder)}}), CPU).model.items.catalogue()
        assert "\n" not in str(found.value)
        return str(found.value)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in (folder / "encoder").iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    assert "has no weights" in refused(pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert "are a pickle (pytorch_model.bin)" in refused(pickled)
    (pickled / "model.safetensors").write_bytes(b"not safe, and not long enough")
    assert "can't be loaded" in refused(pickled)
    make_image_encoder(tmp_path / "vit")
    assert "is a vit, which reads no text" in refused(tmp_path / "vit")
    some = {"embeddings.LayerNorm.bias": torch.zeros(16)}
    save_file(some, pickled / "model.safetensors", metadata={"format": "pt"})
    assert "has no weights for embeddings.LayerNorm.weight" in refused(pickled)
    (pickled / "config.json").unlink()
    assert "has no config.json" in refused(pickled)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refused("nobody/no-such-encoder")


def test_who_asks_the_hub_says_so_once(monkeypatch, caplog, capfd):
    """And not of each time that there was no answer."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    transformers()

    def load(encoder, local_files_only=False):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
        raise OSError("no answer\nat all")

    with pytest.raises(UserError, match=r"can't be loaded \(no answer\)"):
        loaded("nobody/nothing", load)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "encoder 'nobody/nothing' is fetched from the hub"
    ]
    assert "Retrying" not in capfd.readouterr().err


def test_code_that_comes_with_an_encoder_is_not_run(tmp_path, monkeypatch):
    """Nor is anybody asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Mine: pass\n")
    mine = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "mine.Mine")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": mine}))
    with pytest.raises(UserError, match="comes with code of its own, which is never run"):
        config_of(str(tmp_path))
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "was_run").exists()


def test_odd_texts_have_vectors(folder, caplog):
    reader = TextReader(TextSection(encoder=str(folder / "encoder"), max_tokens=8), CPU)
    texts = ["", None, "   \n ", "red " * 2_500_000, "🙂" * 40, "סבון لليدين", "a\0b\u202e red"]
    tokens = reader.tokens_of(lambda name: pa.array(texts), ["title"], len(texts))
    assert tokens.lengths_n.tolist()[:4] == [2, 2, 2, 8] and tokens.lengths_n.max() == 8
    assert "3 of 7 items have no text (title)" in caplog.text
    assert encoded(reader.encoder(), tokens, CPU, 4).own_RE.isfinite().all()
    short = TextReader(TextSection(encoder=str(folder / "encoder"), max_tokens=2), CPU)
    with pytest.raises(UserError, match=r"max_tokens is 2, .* set it to 3 at least"):
        short.tokens_of(lambda name: pa.array(texts), ["title"], len(texts))


def encoder_like(folder, path, name, **settings):
    """A tiny encoder of another kind, with the tokenizer of the folder's."""
    import transformers as package

    shutil.copytree(folder / "encoder", path, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 18, "hidden_size": 16}
    torch.manual_seed(0)
    package.AutoModel.from_config(getattr(package, name)(**layers | settings)).save_pretrained(path)
    return str(path)


def test_encoders_that_are_narrower_outside_than_inside(folder, config, tmp_path):
    """OPT's small ones give vectors as wide as a word's, Electra takes words narrower than what it gives."""
    opt = {"word_embed_proj_dim": 8, "ffn_dim": 32, "pad_token_id": 0}
    opt = encoder_like(folder, tmp_path / "opt", "OPTConfig", **opt)
    for tower in ({"mode": "tuned"}, {"mode": "adapters", "adapters": {"name": "prompt", "size": 3}}):
        items = build(config({"name": "text", "text": {"encoder": opt}, **tower}), CPU).model.items
        assert items.content.all().shape == (ITEMS, 8)
    electra = encoder_like(
        folder, tmp_path / "electra", "ElectraConfig", embedding_size=8, intermediate_size=32
    )
    tower = {"mode": "adapters", "adapters": {"name": "prompt", "size": 3}, "text": {"encoder": electra}}
    loss, gradients = first_step(build(config({"name": "text", **tower}), CPU))
    assert gradients["tables.items.encoder.model.prompt.vectors"].shape == (3, 8)


def test_an_encoder_that_counts_places_from_its_padding_has_fewer(folder, config, tmp_path):
    """RoBERTa: with two marks, and places for 7 of which one is the padding's and one before it."""
    settings = {"intermediate_size": 32, "max_position_embeddings": 7, "pad_token_id": 1}
    text = {"encoder": encoder_like(folder, tmp_path / "roberta", "RobertaConfig", **settings)}
    items = build(config({"name": "text", "mode": "tuned", "text": text}), CPU).model.items
    assert items.content.items.lengths_n.max() == 5 and items.catalogue().isfinite().all()
    tower = {"mode": "adapters", "adapters": {"name": "prompt", "size": 1}, "text": text}
    with pytest.raises(UserError, match="has places for 5"):
        build(config({"name": "text", **tower}), CPU)


def test_templates():
    columns = {"title": ["a  b", None], "tags": [["x", "y"], []], "year": [1999, 2000]}

    def texts(fields, template=None):
        return Template(fields, template).texts(lambda name: pa.array(columns[name]), 2)

    assert texts(["title", "tags"]) == ["a b x y", ""]
    assert texts([], "{title} ({year})") == ["a b (1999)", "(2000)"]
    assert Template([], "{title.real}").names == ["title.real"]  # a column, and nothing of a value
    for wrong in ("no field", "{title", "{}", "{title!r}", "{title:>99999999999}"):
        with pytest.raises(UserError, match="template"):
            Template(["title"], wrong)
    for column in ([b"\xff"], [{"a": 1}], [[{"a": 1}]]):
        with pytest.raises(UserError, match="which is no text"):
            as_texts("title", pa.array(column), 1)
    assert as_texts("title", pa.array(["a", None]).dictionary_encode(), 2) == ["a", ""]


def test_files_of_vectors(tmp_path):
    ids, file = pa.array([4, 7, 9]), tmp_path / "v.parquet"
    pq.write_table(as_table(pa.array([9, 8, 4, 7]), torch.arange(8.0).view(4, 2)), file)
    assert read_file(str(file), ids).tolist() == [[4, 5], [6, 7], [0, 1]]
    fsspec.filesystem("memory").pipe_file("/v.parquet", file.read_bytes())
    assert read_file("memory://v.parquet", ids).tolist() == [[4, 5], [6, 7], [0, 1]]
    for where, sentence in (("memory://w.parquet", "no file"), ("abc://v.parquet", "Protocol not known")):
        with pytest.raises(UserError, match=sentence):
            read_file(where, ids)
    with pytest.raises(UserError, match="no vector for 1 of 3 items"):
        read_file(str(file), pa.array([4, 5, 9]))
    lists = {
        "one length": [[1.0], [1.0, 2.0], [1.0]],
        "NaN": [[1.0], [float("nan")], [1.0]],
        "lists of floats": ["a", "b", "c"],
    }
    for sentence, column in lists.items():
        pq.write_table(pa.table({"item_id": ids, "vector": column}), file)
        with pytest.raises(UserError, match=sentence):
            read_file(str(file), ids)
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="can't be read"):
        read_file(str(file), ids)
