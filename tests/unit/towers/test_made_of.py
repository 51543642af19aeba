"""A run is opened with what its items were made of in training, and with nothing else."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.errors import UserError
from gr.modality import encoder as encoders
from gr.modality.vectors import as_table
from gr.train import checkpoint, job
from gr.train.checkpoint import find_checkpoint
from gr.train.exporting import export
from gr.train.folder import RunFolder
from gr.train.parts import build
from gr.train.runs import open_run
from tests.end_to_end.tiny import make_dataset
from tests.towers import CPU, ITEMS, SHORT, make_encoder, make_titled, titles


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


def test_an_encoder_that_stays_is_digested_once(config, monkeypatch):
    """What is kept beside the dataset and the checkpoint know it by the same digits."""
    digested = []
    real = encoders.digest_of
    monkeypatch.setattr(
        encoders, "digest_of", lambda tensors, said="": digested.append(len(tensors)) or real(tensors, said)
    )
    job.run(config({"name": "text"}, "train.max_steps=1", "eval.splits=[]"))
    assert len(digested) == 1
