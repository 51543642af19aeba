"""Item towers of pictures: what is read, and what can't be."""

from __future__ import annotations

import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.modality.image_reader import ImageReader, ImageSection
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train.parts import build
from tests.end_to_end.tiny import CONFIG
from tests.packages import needs
from tests.towers import ITEMS, make_image_encoder, make_pictures, make_titled

needs("transformers", "PIL")
CPU = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    make_titled(path / "data")
    make_image_encoder(path / "vit")
    make_pictures(path / "pictures")
    (path / "tiny.yaml").write_text(CONFIG.format(run=path / "run", data=path / "data"))
    return path


def built(folder, tower, **image):
    section = {"encoder": str(folder / "vit"), "images": str(folder / "pictures"), "size": 16, **image}
    plain = ("model.input.dropout=0", "model.encoder.dropout=0")
    asked = [f"model.item_tower={json.dumps({**tower, 'image': section})}", *plain]
    return build(configs.load(folder / "tiny.yaml", asked), CPU)


def test_frozen_and_tuned_form_the_same_rows_and_gradients_flow(folder, caplog):
    frozen, tuned = (built(folder, {"name": "image", "mode": mode}) for mode in ("frozen", "tuned"))
    rows = frozen.model.items.catalogue()
    assert torch.equal(rows, tuned.model.items.catalogue())
    assert "1 of 60 items have no picture" in caplog.text and "3 pictures can't be read" in caplog.text
    assert torch.equal(rows[4], rows[6]) and torch.equal(rows[4], rows[8]) and torch.equal(rows[4], rows[9])
    assert len(rows.unique(dim=0)) == ITEMS - 3
    part = tuned.model.supervise(next(tuned.batches.epoch(0)).share, 7)
    tuned.engine.forward_backward([part], StepContext(7), part.count)
    assert all(p.grad is not None for _, p in tuned.model.items.named_parameters())
    assert tuned.model.items.encoder.model.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["mae", "swin", "resnet"])
def test_encoders_of_every_kind(folder, kind):
    make_image_encoder(folder / kind, kind)
    pooling = "mean" if kind == "swin" else "cls"
    image = {"encoder": str(folder / kind), "pooling": pooling}
    items = built(folder, {"name": "fused", "mode": "tuned"}, **image).model.items
    first, again = items.content.all(), items.content.all()
    assert first.isfinite().all() and torch.equal(first, again)
    assert len(first.unique(dim=0)) > ITEMS // 2


def test_a_folder_a_zip_and_a_parquet_file_hold_the_same(folder, tmp_path):
    files = sorted((folder / "pictures").iterdir())
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as out:
        for file in files:
            out.write(file, f"inside/{file.name}")
    ids = [int(file.stem) for file in files]
    table = pa.table({"item_id": ids, "image": [file.read_bytes() for file in files]})
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=7)
    found = []
    for where in (folder / "pictures", tmp_path / "all.zip", tmp_path / "all.parquet"):
        section = ImageSection(encoder=str(folder / "vit"), images=str(where), size=16)
        items = ImageReader(section, CPU).items_in(pa.table({"item_id": list(range(ITEMS))}))
        found.append(items.inputs(torch.arange(ITEMS))[0])
        assert set(items.bad) == {"6", "8", "9"} and "9000 x 9000 pixels" in items.bad["9"]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0].abs().max() <= 1 and not found[0][4].any()


def test_what_is_refused(folder, tmp_path):
    (tmp_path / "no.zip").write_bytes(b"PK")
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / "no.parquet")
    (tmp_path / "empty").mkdir()
    sentences = {
        "nowhere": "no pictures at",
        "no.zip": "can't be read",
        "no.parquet": "has no column image",
        "empty": "none of the 60 items has a picture",
    }
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence):
            built(folder, {"name": "image", "mode": "tuned"}, images=str(tmp_path / name))
    with pytest.raises(UserError, match="a tower of name text reads no image"):
        built(folder, {"name": "text", "mode": "cached", "vectors": "x"})
