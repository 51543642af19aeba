"""Exports, and the files that programs are asked with, at URLs: read as where they were made; a real S3 server."""

import re
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr import config as configs
from gr.data.dataset import SequenceDataset
from gr.errors import UserError
from gr.modality.reader import TextSection
from gr.processes import Processes
from gr.programs import describe, evaluate, rank as rank_program, recommend as recommend_program
from gr.train import job, place
from gr.train.comparison import compare
from gr.train.encoding import encode
from gr.train.exporting import export
from gr.train.item_heads import item_heads
from gr.train.runs import open_run
from gr.train.starting import start
from tests.end_to_end.tiny import CONFIG, make_dataset
from tests.towers import make_encoder, titles
from tests.unit import test_ranking_run as ranking, test_two_tower_run as two_tower

LARGEST = 40 * 16 * 4  # bytes in a file: the table of 60 rows x 16 takes two
SHORT = ("train.max_steps=5", "checkpoint.every_steps=null", "eval.splits=[test]")


def trained(folder, text, data, *overrides):
    (folder / "tiny.yaml").write_text(text.format(run=folder / "run", data=data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "plot_run", lambda folder, shown: None)  # a picture takes longer than the run
        return job.run(configs.load(folder / "tiny.yaml", [*SHORT, *overrides])).path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of titled items, a run on it, and its export; nobody may change them."""
    folder = tmp_path_factory.mktemp("made")
    dataset = make_dataset(folder / "set", described={"title": titles(60)})
    run = trained(folder, CONFIG, dataset.path)
    export(run, folder / "exported", largest=LARGEST)
    return folder


@pytest.fixture(params=["s3", "memory", "file"])
def url(request, made, tmp_path):
    """Where a copy of ``made`` is: the test's own."""
    if request.param == "file":
        shutil.copytree(made, tmp_path / "made")
        return f"file://{tmp_path / 'made'}"
    if request.param == "s3":
        request.getfixturevalue("store")
    found = f"{request.param}://data/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"
    files, root = fsspec.core.url_to_fs(found)
    files.put(f"{made}/", f"{root}/", recursive=True)
    return found


def put(url, content):
    files, path = fsspec.core.url_to_fs(url)
    files.pipe_file(path, content)


def get(url):
    files, path = fsspec.core.url_to_fs(url)
    return files.cat_file(path)


def figures(path, **options):
    done = compare(str(path), **options)
    return done.step, done.epoch, {n: replace(r, seconds=0.0) for n, r in done.results.items()}


def served(path, data, users, out):
    given = ["--run", str(path), "--data-path", str(data), "--users", str(users), "--k", "7"]
    assert recommend_program.main([*given, "--out", str(out)]) == 0
    return pq.read_table(fsspec.open(str(out)).open())


def test_an_export_at_a_url_scores_as_the_one_it_is_a_copy_of(url, made, tmp_path):
    assert figures(f"{url}/exported", data_path=f"{url}/set") == figures(made / "exported")
    put(f"{url}/users.txt", b"1\n2\n77\n")
    (tmp_path / "users.txt").write_text("1\n2\n77\n")
    here = served(made / "exported", made / "set", tmp_path / "users.txt", tmp_path / "recs.parquet")
    assert served(f"{url}/exported", f"{url}/set", f"{url}/users.txt", f"{url}/recs.parquet").equals(here)
    assert len(here) == 3


def test_an_export_that_was_written_to_a_url_is_read_from_there(url, made, tmp_path):
    manifest = export(made / "run", f"{url}/new/exported", largest=LARGEST)
    one, other = (open_run(path).model for path in (f"{url}/new/exported", made / "run"))
    given = dict(other.named_whole())
    assert manifest.step == 5 and all(torch.equal(p, given[name]) for name, p in one.named_whole())
    with pytest.raises(UserError, match="is an export already: copy the folder"):
        export(f"{url}/new/exported", tmp_path / "again")
    with pytest.raises(UserError, match="is an export, which has weights and no moments: go on with the run"):
        job.resume(f"{url}/new/exported")


def test_a_run_starts_from_an_export_at_a_url(url, made):
    config = configs.load(made / "tiny.yaml", [f"train.start_from={url}/exported"])
    begun = open_run(made / "run").model
    with torch.no_grad():
        for name, parameter in begun.named_whole():
            parameter.fill_(7 if name.startswith("encoder.") else 0)
    start(begun, config, Processes(torch.device("cpu")))
    given = dict(open_run(made / "run").model.named_whole())
    assert all(torch.equal(p, given[n]) for n, p in begun.named_whole() if n.startswith("encoder."))


@pytest.mark.parametrize("large", [False, True], ids=["whole", "in ranges"])
def test_a_file_of_an_export_is_asked_for_twice_however_many_tensors_it_has(store, made, monkeypatch, large):
    if large:
        monkeypatch.setattr(place, "WHOLE_BYTES", 0)
    files, root = fsspec.core.url_to_fs("s3://data/asked")
    files.put(f"{made}/exported/", f"{root}/", recursive=True)
    store.forget()
    open_run("s3://data/asked")
    names = [name for name in store.names("asked/") if name.endswith("safetensors")]
    assert len(names) > 2
    for name in names:
        assert len(store.gets(name)) <= 2


FILES = ["config.yaml", "items.parquet", "model-00002-of-*.safetensors", "*.index.json", "export.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["flipped", "cut", "missing"])
def test_damage_of_an_export_in_a_store_is_named(store, made, name, change):
    at = f"s3://data/damaged-{change}-{re.sub('[^a-z]', '', name)}"
    files, root = fsspec.core.url_to_fs(at)
    files.put(f"{made}/exported/", f"{root}/", recursive=True)
    (file,) = (made / "exported").glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if change == "missing":
        files.rm_file(f"{root}/{file.name}")
    else:
        put(f"{at}/{file.name}", bytes(content) if change == "flipped" else bytes(content[:-1]))
    how = {"missing": "is missing", "cut": r"(has [\d,]+ bytes, not [\d,]+|is not what was written)"}
    sentence = (
        rf"^export '{at}' is damaged \({file.name} {how.get(change, 'is not what was written')}\): copy it"
    )
    with pytest.raises(UserError, match=sentence):
        open_run(at)


@pytest.mark.parametrize("fault", ["403", "503"])
def test_a_store_that_does_not_answer_is_no_damage(store, made, monkeypatch, capsys, fault):
    monkeypatch.setenv("GR_STORE_ATTEMPTS", "2")
    files, root = fsspec.core.url_to_fs(at := f"s3://data/silent-{fault}")
    files.put(f"{made}/exported/", f"{root}/", recursive=True)
    fix = {"403": "see to your access to it", "503": "see to the store and the network"}[fault]
    for ending in ("", "config.yaml", "safetensors"):
        store.fault = lambda asked, ending=ending: (
            fault if asked.method == "GET" and asked.key.endswith(ending) else None
        )
        assert evaluate.main([at, "--data-path", str(made / "set")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: cannot read '{at}' (") and fix in said and said.count("\n") == 1
    assert "damaged" not in said


def test_what_is_no_run_and_no_export_at_a_url(store, capsys):
    for nothing in ("s3://data/nothing", "s3://nothing", "memory://nothing"):
        assert evaluate.main([nothing]) == 2
        assert capsys.readouterr().err.startswith(f"error: no run at '{nothing}' (config.yaml is missing)")


def test_requests_in_a_store_are_ranked_by_an_export_there(store, tmp_path):
    ranking.make_dataset(tmp_path / "data")
    export(trained(tmp_path, ranking.CONFIG, tmp_path / "data"), "s3://data/ranking/exported")
    asked = {"user_id": [3, 5], "item_ids": [[1, 2], [4]]}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(asked), buffer)
    store.put("data/ranking/asked.parquet", buffer.getvalue().to_pybytes())
    pq.write_table(pa.table(asked), tmp_path / "asked.parquet")
    at, here = "s3://data/ranking", str(tmp_path)
    for run, files in ((f"{at}/exported", at), (f"{here}/run", here)):
        given = ["--run", run, "--requests", f"{files}/asked.parquet", "--out", f"{files}/scores.parquet"]
        assert rank_program.main(given) == 0
    there = pq.read_table(pa.BufferReader(store.get("data/ranking/scores.parquet")))
    assert there.equals(pq.read_table(tmp_path / "scores.parquet"))


def test_requests_that_are_not_there_or_not_read_are_said(store, made, tmp_path, monkeypatch, capsys):
    ranking.make_dataset(tmp_path / "data")
    run = trained(tmp_path, ranking.CONFIG, tmp_path / "data")
    given = ["--run", str(run), "--out", str(tmp_path / "out.parquet"), "--requests"]
    assert rank_program.main([*given, "s3://data/no.parquet"]) == 2
    assert "there is no file 's3://data/no.parquet' with requests" in capsys.readouterr().err
    store.put("data/text.parquet", b"no Parquet")
    assert rank_program.main([*given, "s3://data/text.parquet"]) == 2
    assert "'s3://data/text.parquet' cannot be read as Parquet (" in capsys.readouterr().err
    monkeypatch.setenv("GR_STORE_ATTEMPTS", "2")
    store.fault = lambda asked: "503" if "users" in asked.key else None
    asked = ["--run", str(made / "exported"), "--users", "s3://data/users.csv", "--out", str(tmp_path / "o")]
    assert recommend_program.main(asked) == 2
    assert "see to the store and the network" in capsys.readouterr().err


def test_item_heads_of_an_export_in_a_store(store, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "plot_run", lambda folder, shown: None)
    two_tower.make_dataset(tmp_path / "data", rows=300)
    run = job.run(two_tower.load(tmp_path, tmp_path / "data", "train.max_steps=3")).path
    export(run, "s3://data/heads/exported")
    here, there = item_heads(open_run(run)), item_heads(open_run("s3://data/heads/exported"))
    assert torch.equal(here.heads_JIK, there.heads_JIK) and torch.equal(here.bias, there.bias)


def test_items_at_a_url_are_encoded_and_described(url, made, tmp_path, capsys):
    make_encoder(tmp_path / "encoder")
    section, cpu = TextSection(encoder=str(tmp_path / "encoder")), Processes(torch.device("cpu"))
    put(f"{url}/items.parquet", (made / "set" / "catalogue.parquet").read_bytes())
    written, count, _ = encode(f"{url}/set", section, None, cpu, f"{url}/items.parquet")
    assert (written, count) == (f"{url}/items.vectors.parquet", 60)
    if url.startswith("file://"):
        file, _, _ = encode(f"{url}/set", section, None, cpu)
        assert file == str(SequenceDataset(f"{url}/set").path / "vectors.parquet")
        assert np.array_equal(pq.read_table(file)["item_id"], np.arange(60))
    else:
        with pytest.raises(UserError, match="say with --out which file to write"):
            encode(f"{url}/set", section, None, cpu)
    assert describe.main([f"{url}/set", "--plot", f"{url}/figure.png"]) == 0
    assert f"figure: {url}/figure.png" in capsys.readouterr().out
    assert get(f"{url}/figure.png").startswith(b"\x89PNG")
