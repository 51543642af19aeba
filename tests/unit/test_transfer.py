"""A run that starts from another's weights, whose catalogue is another one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.processes import Processes
from gr.train import checkpoint, job
from gr.train.exporting import export
from gr.train.parts import build
from gr.train.reproduction.transfer import Adapted, hypotheses_of, read_transfer, transfer
from gr.train.runs import open_run
from gr.train.saved_weights import SavedWeights
from tests.end_to_end.tiny import CONFIG, make_dataset, stopped_and_resumed, weights
from tests.packages import needs
from tests.towers import make_encoder, titles

CPU = Processes(torch.device("cpu"))
SHORT = ("train.max_steps=3", "eval.splits=[valid]", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    needs("transformers")
    path = tmp_path_factory.mktemp("transfer")
    for name, items in (("source", 60), ("target", 45)):
        make_dataset(path / name, items=items, described={"title": titles(items)[::-1]})
    make_encoder(path / "encoder")
    return path


@pytest.fixture
def config(folder, monkeypatch):
    monkeypatch.setattr(job, "plot_run", lambda folder, shown: None)

    def load(data, run, *overrides, tower=None, head=None):
        file = folder / f"{run}.yaml"
        file.write_text(CONFIG.format(run=folder / run, data=folder / data))
        text = {"name": "text", "text": {"encoder": str(folder / "encoder")}, **(tower or {"mode": "tuned"})}
        text |= {} if head is None else {"head": head}
        return configs.load(file, [f"model.item_tower={json.dumps(text)}", *SHORT, *overrides])

    return load


@pytest.fixture
def source(folder, config):
    """A trained run on the source, with a tuned tower."""
    if not (folder / "trained" / "checkpoints").exists():
        job.run(config("source", "trained"))
    return folder / "trained"


def adapted(name="houlsby", size=4):
    return {"mode": "adapters", "adapters": {"name": name, "size": size}}


def trained_onto(folder, source, config, name="houlsby", run="adapted", *overrides):
    return config(
        "target",
        run,
        f"model.adapters={{name: {name}, size: 4}}",
        f"train.start_from={source}",
        *overrides,
        tower=adapted(name),
        head={"frozen": True},
    )


def test_all_is_taken_but_rows_of_the_other_catalogue(folder, config, source, capsys):
    given = {n.removeprefix("model/"): t for n, t in weights(source).items() if n.startswith("model/")}
    model = build(config("target", "taken", f"train.start_from={source}"), CPU).model
    own = dict(model.named_whole())
    assert {n for n in given if n in own} == set(given) and len(given) == len(own)
    assert all(torch.equal(own[name], values) for name, values in given.items())
    said = capsys.readouterr().out
    numbers = sum(values.numel() for values in given.values())
    assert f"starting from run '{source}', step 3: {len(given)} tensors, {numbers:,} numbers" in said
    ids = config("target", "ids", f"train.start_from={source}", tower={"mode": "frozen", "name": "fused"})
    assert "item_ids" in build(ids, CPU).model.tables
    said = capsys.readouterr().out
    assert "left there" in said and "tables.items.encoder" in said


@pytest.mark.parametrize("name", ["houlsby", "lora"])
def test_adapters_begin_as_their_source_and_are_all_that_is_kept(folder, config, source, name):
    """The scores of the source's model on the other catalogue, to the bit; a checkpoint of what trains; resumed as if
    it hadn't stopped; evaluated and exported onto the source's weights."""
    whole = build(config("target", "whole", f"train.start_from={source}"), CPU)
    run = trained_onto(folder, source, config, name, f"kept-{name}")
    parts = build(run, CPU)
    request = next(iter(parts.evaluation.requests("valid")))
    first = whole.model.eval().scores(request.batch)
    assert torch.equal(parts.model.eval().scores(request.batch), first)
    training = {n for n, _ in parts.model.named_dense()}
    assert training and all("adapter" in n for n in training)

    rows = job.run(run).metrics
    kept = {n.removeprefix("model/") for n in weights(Path(run.run.dir)) if n.startswith("model/")}
    assert kept == training
    opened = open_run(run.run.dir)
    scores = opened.model.scores(request.batch)
    assert not torch.equal(scores, first)
    still = {n: p for n, p in opened.model.named_whole() if n not in training}
    assert all(torch.equal(p, dict(whole.model.named_whole())[n]) for n, p in still.items())

    halves = trained_onto(folder, source, config, name, f"halves-{name}")

    assert stopped_and_resumed(halves).metrics == rows
    one, other = weights(Path(run.run.dir)), weights(Path(halves.run.dir))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)

    made = export(run.run.dir, folder / f"export-{name}")
    assert set(made.sizes) == training and made.frozen
    assert torch.equal(open_run(folder / f"export-{name}").model.scores(request.batch), scores)


def test_a_frozen_encoder_is_as_the_source_tuned_it(folder, config, source):
    """Its vectors are formed once; adapters of sequences alone train."""
    run = trained_onto(folder, source, config, "houlsby", "user", "model.item_tower.adapters=frozen")
    parts, whole = build(run, CPU), build(config("target", "w", f"train.start_from={source}"), CPU)
    assert torch.equal(parts.model.items.catalogue(), whole.model.items.catalogue())
    assert all(name.startswith("encoder.") for name, _ in parts.model.named_dense())
    job.run(run)
    assert torch.equal(open_run(run.run.dir).model.items.catalogue(), parts.model.items.catalogue())


def test_a_run_can_start_from_an_export_and_from_adapters(folder, config, source):
    export(source, folder / "source-export")
    one = build(config("target", "one", f"train.start_from={folder / 'source-export'}"), CPU).model
    given = weights(source)
    assert all(torch.equal(p, given[f"model/{n}"]) for n, p in one.named_whole())
    job.run(first := trained_onto(folder, source, config, "lora", "first"))
    second = trained_onto(folder, first.run.dir, config, "lora", "second")
    before, now = dict(open_run(first.run.dir).model.named_whole()), build(second, CPU).model.named_whole()
    assert all(torch.equal(p, before[n]) for n, p in now)


def test_what_was_trained_onto_other_weights_is_not_loaded(folder, config, source):
    moved = folder / "moved"
    shutil.copytree(source, moved)
    run = trained_onto(folder, moved, config, "lora", "onto-moved")
    job.run(run)
    job.run(config("source", "other", "train.seed=2"))
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="moved"):
        open_run(run.run.dir)
    shutil.copytree(folder / "other", moved)
    with pytest.raises(UserError, match="was trained onto frozen weights that are others now"):
        open_run(run.run.dir)
    shutil.rmtree(moved)
    assert job.resume(run.run.dir, [f"train.start_from={source}", "train.max_steps=4"]).finished


def test_a_head_is_not_taken_to_another_encoder(folder, config):
    """A run whose encoder stayed as it came has trained its head for that one."""
    frozen = {"mode": "frozen"}
    job.run(config("source", "of-frozen", tower=frozen))
    start = f"train.start_from={folder / 'of-frozen'}"
    other = {"text": {"encoder": str(make_encoder(folder / "other-encoder", seed=1))}}
    for mode in ("frozen", "tuned"):
        build(config("target", "same", start, tower={"mode": mode}), CPU)
        with pytest.raises(UserError, match="was trained onto another encoder than"):
            build(config("target", "other", start, tower={"mode": mode, **other}), CPU)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.start_from=nowhere"], "nowhere"),
        (["model.adapters=houlsby"], "is frozen, and nothing has trained it: set train.start_from"),
        (["train.start_from=SOURCE", "train.start_from.checkpoint=77"], "has no checkpoint '77'"),
        (
            ["train.start_from=SOURCE", "data.max_length=30"],
            r"is \[20, 16\] in run .* and \[30, 16\] in this model",
        ),
        (["train.start_from=SOURCE", "model.encoder=sasrec", "model.adapters=lora"], "hasn't trained it"),
        (["train.start_from=SOURCE", "model.adapters=prompt"], "adapters prompt stand before the tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(config, source, overrides, sentence):
    given = [override.replace("SOURCE", str(source)) for override in overrides]
    with pytest.raises(UserError, match=sentence) as refused:
        build(config("target", "refused", *given, tower={"mode": "frozen"}), CPU)
    assert "\n" not in str(refused.value)


def test_nothing_to_train_is_refused(config, source):
    still = [f"train.start_from={source}", "model.adapters=frozen"]
    with pytest.raises(UserError, match="nothing of the model trains"):
        build(config("target", "still", *still, tower={"mode": "frozen"}, head={"frozen": True}), CPU)


def test_the_table_of_adapters_starts_its_processes_itself(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="start it without torchrun, and say how many with --processes"):
        transfer(read_transfer("adapters"), None)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("eval.splits=[test]", "needs split 'valid': add it to eval.splits"),
        ("eval.ks=[5]", "shows hr@10: add its k"),
    ],
)
def test_the_table_of_adapters_refuses_what_leaves_it_empty(tmp_path, override, sentence):
    """Before data is prepared and anything is trained."""
    with pytest.raises(UserError, match=re.escape(sentence)):
        transfer(read_transfer("adapters"), None, data=str(tmp_path), out=str(tmp_path), overrides=[override])
    assert not list(tmp_path.iterdir())


def test_the_table_of_adapters():
    """Every row has a config; hypotheses are told by paired seeds."""
    table = read_transfer("adapters")
    assert table is not None and read_transfer("ml-1m") is None
    for direction in table.directions:
        for method in ("full", *table.methods):
            for overrides in table.parts.values():
                loaded = configs.load(f"transfer/{direction.name}-{method}", overrides)
                assert loaded.train.start_from is not None and loaded.eval.splits == ["valid", "test"]
    name = table.directions[0].name

    def row(method, part, *values):
        return Adapted(name, method, part, 10, [{"hr@10": value, "epoch": 0} for value in values])

    found = [row("full", "both", 0.5, 0.6), row("scratch", "", 0.3, 0.41), row("lora", "both", 0.55, 0.55)]
    told = {(f.high, f.low): f.verdict for f in hypotheses_of(found, table)}
    assert told == {
        ("full, both", "scratch"): "confirmed",
        ("lora, both", "full, both"): "undecided",
        ("lora, both", "scratch"): "confirmed",
    }


def test_a_checkpoint_of_adapters_is_small(folder, config, source):
    job.run(run := trained_onto(folder, source, config, "lora", "small"))
    sizes = [
        sum(
            torch.Size(size).numel()
            for size in SavedWeights(checkpoint.newest(path / "checkpoints")).sizes.values()
        )
        for path in (source, Path(run.run.dir))
    ]
    assert sizes[1] < sizes[0] / 5
