"""Runs whose folder is a URL: trained, ended at any moment, gone on with, evaluated, exported; a real S3 server."""

import json

import pytest
import torch

from gr.errors import UserError
from gr.train import checkpoint, job
from gr.train.comparison import compare
from gr.train.exporting import export
from gr.train.folder import RunFolder
from gr.train.place import StorePath
from gr.train.runs import find_checkpoint, open_run
from gr.train.saved_weights import SavedWeights

STEPS = "train.max_steps=13"


@pytest.fixture
def at(store, config, request):
    """A run's URL of the test's own, and its config."""
    url = f"s3://data/runs/{request.node.name.replace('[', '-').replace(']', '')}"
    return url, lambda *overrides: config(f"run.dir={url}", STEPS, *overrides)


class Killed(BaseException):
    """Nobody catches this."""


def killed_after(steps):
    def on_step(folder):
        steps.append(folder)
        if len(steps) == 11:
            raise Killed

    return on_step


def metrics(store, url):
    return store.get(f"{url.removeprefix('s3://')}/metrics.jsonl").decode()


def weights(path):
    saved = SavedWeights(path)
    return {name: list(saved.rows(name, range(size[0] if size else 1))) for name, size in saved.sizes.items()}


def test_a_run_in_a_store_that_was_killed_goes_on_as_if_nothing_had_been(at, store, config, tmp_path):
    url, of_url = at
    setting = "checkpoint.asynchronous=true"  # the other tests write in step
    whole = job.run(config(f"run.dir={tmp_path / 'whole'}", STEPS, setting))
    with pytest.raises(Killed):
        job.run(of_url(setting, "log.plots=true"), on_step=killed_after([]))
    folder = RunFolder(url)
    assert [step for step, _ in checkpoint.listed(folder.checkpoints)] == [8, 10]  # kept, and the epoch's end
    store.forget()
    done = job.resume(url)
    assert done.finished and str(done.path) == url
    assert metrics(store, url) == (whole.path / "metrics.jsonl").read_text()
    last = find_checkpoint(folder, "last")
    one, other = weights(last), weights(find_checkpoint(RunFolder(whole.path), "last"))
    assert one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )
    names = store.names(url.removeprefix("s3://data/"))
    assert {name.rpartition("/")[2] for name in names} >= {
        "config.yaml",
        "environment.json",
        "timing.jsonl",
        "training.png",
    }
    of_last = [
        a.key.rpartition("/")[2] for a in store.asked if a.method == "PUT" and f"/{last.name}/" in a.key
    ]
    assert of_last[-1] == "complete.json" and len(of_last) == 4  # one of the rank, .metadata, state.json
    there = compare(url).results["hstu"].row()
    here = compare(str(whole.path)).results["hstu"].row()
    assert {k: v for k, v in there.items() if "second" not in k} == {
        k: v for k, v in here.items() if "second" not in k
    }
    manifest = export(url, tmp_path / "exported")
    assert manifest.step == 13 and open_run(tmp_path / "exported").step == 13
    out = f"{url}-exported"
    assert export(url, out) == manifest
    exported = [a.key.rpartition("/")[2] for a in store.asked if a.method == "PUT" and "-exported/" in a.key]
    assert exported[-1] == "export.json" and set(exported) == {"export.json", *manifest.files}
    for file in (tmp_path / "exported").iterdir():
        assert store.get(f"{out.removeprefix('s3://')}/{file.name}") == file.read_bytes()
    with pytest.raises(UserError, match=rf"'{out}' exists: choose another --out"):
        export(url, out)
    assert job.resume(url, ["train.max_steps=13"]).finished  # its end is its end


def test_checkpoints_in_a_store_are_kept_skipped_and_pruned(at, store):
    url, of_url = at
    job.run(of_url("checkpoint.keep=2", "checkpoint.every_steps=3"))
    folder = RunFolder(url)
    steps = [step for step, _ in checkpoint.listed(folder.checkpoints)]
    assert steps[-2:] == [12, 13] and len(steps) <= 3  # and the best
    key = url.removeprefix("s3://") + "/checkpoints/step-00000013"
    content = store.get(f"{key}/__0_0.distcp")
    store.put(f"{key}/__0_0.distcp", content[:-7])
    assert str(checkpoint.newest(folder.checkpoints)) == f"{url}/checkpoints/step-00000012"
    with pytest.raises(
        UserError, match=r"step-00000013' is damaged \(__0_0.distcp is not what was written\)"
    ):
        find_checkpoint(folder, "13")
    store.put(f"{key}/__0_0.distcp", content)
    for name in ("__0_0.distcp", "state.json"):
        store.put(f"data/{url.removeprefix('s3://data/')}/checkpoints/step-00000099/{name}", b"x")
    assert [
        step for step, _ in checkpoint.listed(folder.checkpoints)
    ] == steps  # nothing made that one complete
    checkpoint.prune(folder.checkpoints, 1, 13, None)
    assert {
        name.split("/")[-2] for name in store.names(f"{url.removeprefix('s3://data/')}/checkpoints/")
    } == {"step-00000013"}


def test_a_checkpoint_that_cannot_be_brought_there_ends_the_run_with_a_sentence(at, store, monkeypatch):
    url, of_url = at
    monkeypatch.setenv("GR_STORE_ATTEMPTS", "2")
    store.fault = lambda asked: "503" if asked.method == "PUT" and "step-00000008/" in asked.key else None
    with pytest.raises(
        UserError, match=rf"checkpoint '{url}/checkpoints/step-00000008' can't be written \(.*older ones"
    ):
        job.run(of_url())
    store.forget()
    assert str(checkpoint.newest(RunFolder(url).checkpoints)).endswith("step-00000004")
    store.fault = lambda asked: (
        "503" if asked.key.endswith("complete.json") and asked.method == "GET" else None
    )
    with pytest.raises(OSError, match="at 2 attempts"):  # no answer is no damage
        checkpoint.newest(RunFolder(url).checkpoints)
    store.forget()
    assert job.resume(url).finished


def test_a_place_in_a_store_is_taken_once(at, store):
    url, of_url = at
    store.put(f"{url.removeprefix('s3://')}/letter.txt", b"dear")
    with pytest.raises(UserError, match=f"'{url}' exists and is not empty: choose another run.dir"):
        job.run(of_url())
    with pytest.raises(UserError, match=f"no run at '{url}'"):
        job.resume(url)
    store.delete(f"{url.removeprefix('s3://')}/letter.txt")
    job.run(of_url("train.max_steps=1"))
    with pytest.raises(UserError, match=f"'{url}' already holds a run: continue it with --resume {url}"):
        job.run(of_url())
    store.put(f"{url.removeprefix('s3://')}/export.json", json.dumps({}).encode())
    with pytest.raises(UserError, match=r"export '.*' is damaged \(export.json is not what was written\)"):
        open_run(url)


def test_a_process_that_writes_nothing_leaves_what_others_wrote(at, store):
    url, _ = at
    key = f"{url.removeprefix('s3://')}/metrics.jsonl"
    store.put(key, b"1\n")
    main, other = RunFolder(url), RunFolder(url)
    main.metrics.write_text("1\n2\n")
    (other.here / "rank1-trace.json").write_text("{}")
    main.push()
    other.push()
    assert (
        store.get(key) == b"1\n2\n" and store.get(key.replace("metrics.jsonl", "rank1-trace.json")) == b"{}"
    )


def test_a_place_in_a_store_behaves_as_a_path(store):
    place = StorePath("s3://data/places/a.b")
    assert (place.name, place.suffix, str(place.parent), str(place.with_name("c"))) == (
        "a.b",
        ".b",
        "s3://data/places",
        "s3://data/places/c",
    )
    assert not place.exists() and not place.is_dir() and list(place.iterdir()) == []
    (place / "x" / "y").write_text("text")
    (place / "z").touch()
    assert place.is_dir() and not place.is_file() and (place / "x" / "y").is_file()
    assert {p.name for p in place.iterdir()} == {"x", "z"} and (place / "x/y").read_text() == "text"
    place.copy_tree(place.with_name("copy"))
    assert place.with_name("copy").tree() == place.tree() == {"x/y": 4, "z": 0}
    place.remove_tree()
    assert not place.exists() and place.with_name("copy").exists()
