"""Exports: the run's scores to the bit, files that others read, damage that is named, and nothing read but weights."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from gr import config as configs
from gr.errors import UserError
from gr.processes import Axis, Processes
from gr.train import checkpoint, exporting, job, slices, tensor_files
from gr.train.comparison import compare
from gr.train.cursor import Cursor
from gr.train.exported import fingerprint, is_export, load, read_manifest, to_json
from gr.train.exporting import export, summary
from gr.train.recommend import recommend, write_item_vectors
from gr.train.runs import open_run
from gr.train.saved_weights import SavedWeights
from tests.end_to_end.tiny import CONFIG, make_dataset, weights
from tests.packages import needs
from tests.unit import test_ranking_run as ranking

SHORT = ("train.max_steps=5", "checkpoint.every_steps=null", "eval.splits=[test]")
LARGEST = 40 * 16 * 4  # bytes in a file: the table of 60 rows x 16 takes two


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The folder of a trained run; nobody may change it."""
    return trained(tmp_path_factory.mktemp("runs"), CONFIG, dataset.path)


def trained(folder, text, data, *overrides):
    file = folder / "tiny.yaml"
    file.write_text(text.format(run=folder / "run", data=data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "plot_run", lambda folder, shown: None)  # a picture takes longer than the run
        return job.run(configs.load(file, [*SHORT, *overrides])).path


def figures(path, **options):
    """All results of an evaluation but its speed."""
    done = compare(str(path), **options)
    return done.step, done.epoch, {n: replace(r, seconds=0.0) for n, r in done.results.items()}


def served(path, out):
    """What it recommends, with all vectors."""
    opened, files = open_run(path), [out / f"{name}.parquet" for name in ("lists", "users", "items")]
    recommend(opened, files[0], k=20, user_vectors=files[1])
    write_item_vectors(opened, files[2])
    return [pq.read_table(file) for file in files]


@pytest.mark.parametrize(("table", "bias"), [("local", False), ("mapped", True), ("torchrec", True)])
def test_an_export_scores_as_its_run_to_the_bit(dataset, tmp_path, table, bias):
    if table == "torchrec":
        needs("torchrec")
    path = trained(
        *(tmp_path, CONFIG, dataset.path, f"model.table={table}"),
        f"model.similarity={{item_bias: {str(bias).lower()}, normalize: {str(not bias).lower()}}}",
    )
    done = export(path, tmp_path / "exported", largest=LARGEST)
    assert len(done.tensors) > 2, "the table was to be cut"
    evaluated, recommended = figures(path), served(path, tmp_path)
    shutil.rmtree(path)
    assert figures(tmp_path / "exported") == evaluated
    assert served(tmp_path / "exported", tmp_path) == recommended


def test_an_export_of_a_ranking_model_scores_as_its_run_to_the_bit(tmp_path):
    data = tmp_path / "data"
    ranking.make_dataset(data)
    path = trained(tmp_path, ranking.CONFIG, data)
    export(path, tmp_path / "exported")
    evaluated = figures(path, baselines=["prior"])
    shutil.rmtree(path)
    assert figures(tmp_path / "exported", baselines=["prior"]) == evaluated
    with pytest.raises(UserError, match="can't search the catalogue"):
        recommend(open_run(tmp_path / "exported"), tmp_path / "r.parquet")


def test_the_files_are_safetensors_as_others_read_them(run, tmp_path, dataset):
    expected = {n.removeprefix("model/"): t for n, t in weights(run).items() if n.startswith("model/")}
    export(run, tmp_path / "one")
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert (
        found.keys() == expected.keys() and not (tmp_path / "one" / "model.safetensors.index.json").exists()
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    done = export(run, tmp_path / "many", largest=LARGEST)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in expected.values())
    joined: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "many").glob("*.safetensors")):
        entries = load_file(file)
        assert 0 < sum(4 * value.numel() for value in entries.values()) <= LARGEST or len(entries) == 1
        assert {index["weight_map"].pop(key) for key in entries} == {file.name}
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        for key, value in entries.items():
            name = key.partition("[")[0]
            joined[name] = torch.cat([joined[name], value]) if name in joined else value
    assert not index["weight_map"] and joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], value) for name, value in expected.items())
    assert any("[40:60]" in part.key for parts in done.tensors.values() for part in parts)

    items = pq.read_table(tmp_path / "many" / "items.parquet").to_pydict()
    assert items["item_id"] == dataset.catalogue["item_id"].to_pylist() and items["row"] == list(range(60))
    split = configs.load(run / "config.yaml").data.split.build()
    assert items["training_count"] == dataset.catalogue.under(split).training_counts.tolist()
    files = {file.name for file in (tmp_path / "many").iterdir()}
    assert files == {*done.files, "export.json"}, "and nothing else, no pickle"
    text = "\n".join(summary(done, run, tmp_path / "many"))
    numbers = sum(value.numel() for value in expected.values())
    assert f"parameters {numbers:,} (float32)" in text and "tables.items.weight 60 x 16" in text
    assert f"python -m gr evaluate --run {tmp_path}/many" in text and all(name in text for name in done.files)


def test_the_same_checkpoint_gives_the_same_bytes(run, tmp_path):
    one, two = (export(run, tmp_path / name) for name in ("one", "two"))
    assert one.files == two.files
    assert (tmp_path / "one/export.json").read_bytes() == (tmp_path / "two/export.json").read_bytes()


class Asked:
    """The parts of checkpoints that are read from now on, as (tensor, offsets)."""

    def __init__(self, monkeypatch):
        self.parts, real = [], dcp.FileSystemReader.read_data

        def read_data(reader, plan, planner):
            self.parts += [(item.storage_index.fqn, tuple(item.storage_index.offset)) for item in plan.items]
            return real(reader, plan, planner)

        monkeypatch.setattr(dcp.FileSystemReader, "read_data", read_data)


def test_neither_evaluation_nor_export_reads_a_moment(run, tmp_path, monkeypatch):
    """Whoever asks for them is seen; and with their bytes gone all the same is read."""
    asked = Asked(monkeypatch)
    expected = served(run, tmp_path)
    assert {name.split("/")[0] for name, _ in asked.parts} == {"model"}
    asked.parts.clear()
    export(run, tmp_path / "exported")
    assert {name.split("/")[0] for name, _ in asked.parts} == {"model"}

    shutil.copytree(run, tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    described = dcp.FileSystemReader(path).read_metadata()
    lost = [place for index, place in described.storage_data.items() if index.fqn.startswith("optimizer/")]
    assert len(lost) > 20
    for place in lost:
        with (path / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(b"\xff" * place.length)
    monkeypatch.setattr(checkpoint, "damaged", lambda path, processes=None: None)  # it would see that
    assert served(tmp_path / "run", tmp_path) == expected
    export(tmp_path / "run", tmp_path / "again")
    assert served(tmp_path / "again", tmp_path) == expected
    with pytest.raises(BaseException, match=r"weights_only|invalid|magic|Unpickl"):
        job.resume(tmp_path / "run", ["train.max_steps=6"])


def test_parts_of_a_checkpoint_are_read_once_and_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "PART_NUMBERS", 70)
    values = torch.randn(50, 14, generator=torch.Generator().manual_seed(0))
    held = slices.Slices([50, 14], [([0, 0], values[:30]), ([30, 0], values[30:])])
    held = held.cut() if hasattr(held, "cut") else held
    path = checkpoint.save(
        tmp_path, {"model/tables.a.weight": held}, Cursor("g"), {}, Processes(torch.device("cpu"))
    )
    asked = Asked(monkeypatch)
    saved, parts = SavedWeights(path), tensor_files.layout({"tables.a.weight": (50, 14)}, 20 * 14 * 4)
    assert [part.key for entries in parts.values() for part in entries] == [
        *("tables.a.weight[0:20]", "tables.a.weight[20:40]", "tables.a.weight[40:50]")
    ]
    largest = 0

    def rows(part):
        nonlocal largest
        for stretch in saved.rows(part.name, range(part.start, part.stop)):
            largest = max(largest, len(stretch))
            yield stretch

    for file, entries in parts.items():
        tensor_files.write(tmp_path / file, entries, rows)
    assert largest == 5, "parts of 70 numbers are five rows"
    assert len(asked.parts) == len(set(asked.parts)) == 10

    monkeypatch.setattr(tensor_files, "BLOCK_NUMBERS", 30)
    for first, last, left, right in ((0, 50, 0, 14), (17, 43, 3, 9), (19, 20, 13, 14), (40, 40, 0, 14)):
        found = torch.full((last - first, right - left), torch.nan)
        with tensor_files.TensorReader(tmp_path, parts) as reader:
            reader.read_into("tables.a.weight", (first, left), found)
        assert torch.equal(found, values[first:last, left:right])


def test_a_table_that_was_saved_by_columns_is_exported_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "PART_NUMBERS", 60)
    values = torch.randn(50, 14, generator=torch.Generator().manual_seed(0))
    parts = [([0, first], values[:, first : first + 4]) for first in (0, 4, 8, 12)]
    held = slices.Slices([50, 14], parts)
    held = held.cut() if hasattr(held, "cut") else held
    path = checkpoint.save(
        tmp_path, {"model/tables.a.weight": held}, Cursor("g"), {}, Processes(torch.device("cpu"))
    )
    saved, files = SavedWeights(path), tensor_files.layout({"tables.a.weight": (50, 14)}, 20 * 14 * 4)
    for file, entries in files.items():
        tensor_files.write(
            tmp_path / file, entries, lambda part: saved.rows(part.name, range(part.start, part.stop))
        )
    found = torch.full((50, 14), torch.nan)
    with tensor_files.TensorReader(tmp_path, files) as reader:
        reader.read_into("tables.a.weight", (0, 0), found)
    assert torch.equal(found, values)


@pytest.fixture
def exported(run, tmp_path):
    export(run, tmp_path / "exported", largest=LARGEST)
    return tmp_path / "exported"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


FILES = ["config.yaml", "items.parquet", "model-00002-of-*.safetensors", "*.index.json"]


@pytest.mark.parametrize("name", [*FILES, "export.json"])
@pytest.mark.parametrize("change", [flip, cut, type(FILES).pop], ids=["flipped", "cut", "missing"])
def test_damage_is_named_when_an_export_is_opened(exported, name, change):
    (file,) = exported.glob(name)
    change(file) if change in (flip, cut) else file.unlink()
    how = {flip: "is not what was written", cut: r"(has [\d,]+ bytes, not [\d,]+|is not what was written)"}
    sentence = (
        rf"^export '.*exported' is damaged \({file.name} {how.get(change, 'is missing')}\): copy it again"
    )
    for look in (lambda: open_run(exported), lambda: compare(str(exported))):
        with pytest.raises(UserError, match=sentence):
            look()


def test_of_several_processes_each_reads_some_files_and_one_finds_the_damage(exported):
    model, files = open_run(exported).model, list(read_manifest(exported).files)
    assert len(files) > 3
    for name in files:
        content, refused = (exported / name).read_bytes(), []
        flip(exported / name)
        for rank in range(3):
            try:
                load(exported, model, world=Axis(rank, 3))
            except UserError:
                refused.append(rank)
        (exported / name).write_bytes(content)
        assert len(refused) == 1, name


def test_an_export_does_not_train_and_has_one_checkpoint(run, exported, tmp_path):
    (step,) = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()]
    assert is_export(exported) and not is_export(run) and open_run(exported, str(step)).step == step == 5
    for name in ("best", "4"):
        with pytest.raises(
            UserError, match=rf"is of step 5 and has no checkpoint '{name}': leave --checkpoint out"
        ):
            open_run(exported, name)
    with pytest.raises(UserError, match="is an export, which has weights and no moments: go on with the run"):
        job.resume(exported)
    with pytest.raises(UserError, match="is an export already: copy the folder"):
        export(exported, tmp_path / "again")


def test_where_the_data_and_the_rows_are_may_change_and_nothing_else(run, exported, dataset, tmp_path):
    before = figures(exported)
    moved = shutil.copytree(dataset.path, tmp_path / "mo:ved # 1")
    assert figures(exported, data_path=str(moved)) == before == figures(run, data_path=str(moved))
    other = make_dataset(tmp_path / "other", users=40)
    for path in (run, exported):
        with pytest.raises(
            UserError, match=rf"^'{other.path}' is not the dataset that run '{path}' was trained on"
        ):
            open_run(path, data_path=str(other.path))
        with pytest.raises(UserError, match=r"no sequence dataset at 'nowhere' \(manifest.json is missing\)"):
            open_run(path, data_path="nowhere")
    with pytest.raises(UserError, match="is not the dataset that run"):
        export(run, tmp_path / "new", overrides=[f"data.path={other.path}"])
    with pytest.raises(UserError, match=r"'model\.dim' cannot change when exporting \(16 -> 8\)"):
        export(run, tmp_path / "new", overrides=["model.dim=8"])
    export(run, tmp_path / "mapped", overrides=["model.table=mapped", "eval.ks=[10]"])
    assert configs.load(tmp_path / "mapped" / "config.yaml").model.table.name == "mapped"
    tables = [open_run(path).model.items for path in (run, tmp_path / "mapped")]
    assert torch.equal(*(table.vectors(0, 60) for table in tables))
    assert not (tmp_path / "new").exists()


def test_an_export_of_another_model_is_refused(exported):
    opened = open_run(exported)
    smaller = configs.override(opened.config, ["model.encoder.layers=1"])
    (exported / "config.yaml").write_text(configs.to_yaml(smaller))
    manifest = read_manifest(exported)
    files = {**manifest.files, "config.yaml": fingerprint(exported / "config.yaml")}
    (exported / "export.json").write_text(to_json(replace(manifest, files=files)))
    with pytest.raises(UserError, match=r"^export '.*' has parameter '.*', which this model has not"):
        open_run(exported)


def test_nothing_half_written_is_left(run, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"^'.*taken' exists: choose another --out, or remove it$"):
        export(run, tmp_path / "taken")
    with pytest.raises(UserError, match="no run at"):
        export(tmp_path / "none", tmp_path / "new")
    with pytest.raises(UserError, match="has no checkpoint '3'"):
        export(run, tmp_path / "new", "3")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "fingerprint", full)
        with pytest.raises(UserError, match=r"^cannot write '.*new' \(No space left on device\): make room"):
            export(run, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
        with pytest.raises(
            UserError, match=r"^an export of [\d.]+ KiB doesn't fit in '.*', which has 100 B free"
        ):
            export(run, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_numbers_that_are_none_and_checkpoints_that_go_meanwhile_are_named(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    real = SavedWeights.rows

    def broken(self, name, rows):
        for values in real(self, name, rows):
            values.view(-1)[0] = np.nan if name.startswith("tables.") else 0
            yield values

    with monkeypatch.context() as patch:
        patch.setattr(SavedWeights, "rows", broken)
        with pytest.raises(
            UserError, match=r"parameter 'tables\.items\.weight' in checkpoint .* NaN or infinity"
        ):
            export(tmp_path / "run", tmp_path / "new")

    def gone(self, name, rows):
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
        yield from real(self, name, rows)

    monkeypatch.setattr(SavedWeights, "rows", gone)
    with pytest.raises(UserError, match=r"changed while it was read .* perhaps because its training went on"):
        export(tmp_path / "run", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
