"""Appending newer actions: what comes out is what preparing everything at once gives, up to the numbers of items."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from gr import config as configs
from gr.data.dataset import SequenceDataset
from gr.data.describe_tables import preparation_tables
from gr.data.hashing import hash_ids
from gr.data.making.sources.base import make_source
from gr.data.making.sources.log import ActionLog
from gr.errors import UserError
from gr.processes import Processes
from gr.programs import prepare as program
from gr.train import job
from gr.train.changes import check_growing
from gr.train.comparison import compare
from gr.train.parts import build
from tests.end_to_end.tiny import CONFIG, tensors_in, weights
from tests.unit.logs_common import Notes

SCHEMA = {
    "columns": {
        "user": "who",
        "item": "what",
        "time": "at",
        "action_type": "how",
        "value": "worth",
        "fields": {"shop": "shop"},
    }
}


def log(
    seed: int, first: int, actions: int = 3000, users: int = 400, items: int = 80, text=False
) -> pa.Table:
    """A day of actions in no order, from second ``first`` on."""
    rng = np.random.default_rng(seed)
    who, what = rng.integers(0, users, actions) * 7, rng.integers(0, items, actions)
    return pa.table(
        {
            "who": pa.array([f"u{n}" for n in who.tolist()]) if text else who,
            "what": pa.array([f"i{n:03d}" for n in what.tolist()]) if text else what,
            "at": first + rng.integers(0, 86400, actions),
            "how": pa.array(np.array(["click", "buy", "view"])[rng.integers(0, 3 if seed else 2, actions)]),
            "worth": rng.random(actions).astype(np.float32),
            "shop": rng.integers(0, 5, actions),
        }
    )


def days(folder: Path, text=False) -> Path:
    """Three days; the second brings new users, items and a type, the third late actions."""
    (folder / "logs").mkdir(parents=True)
    late = log(9, 1_000_000, 50, text=text)
    for number, table in enumerate(
        [
            log(0, 1_000_000, users=300, items=60, text=text),
            log(1, 1_086_400, text=text),
            pa.concat_tables([log(2, 1_172_800, users=500, items=90, text=text), late]),
        ]
    ):
        pq.write_table(table, folder / "logs" / f"day-{number}.parquet")
    return folder / "logs"


def prepared(source: str, out: Path, **options) -> SequenceDataset:
    return make_source("log", {**SCHEMA, **options}).prepare(source, str(out))


def content(dataset: SequenceDataset) -> dict:
    """By raw ids: user -> their actions in order, and item -> its count."""
    ids = dataset.catalogue.ids.to_pylist()
    names = dataset.manifest.action_type_names
    found = {}
    for block in range(len(dataset.manifest.blocks)):
        rows = dataset.read_block(block)
        columns = [
            [ids[i] for i in rows.items_A.tolist()],
            rows.timestamps_A.tolist(),
            [names[t] for t in rows.columns["type"].tolist()],
            rows.columns["value"].tolist(),
            rows.columns["shop"].tolist(),
        ]
        actions = list(zip(*columns, strict=True))
        for number, user in enumerate(rows.users_R.tolist()):
            found[user] = actions[rows.offsets_R1[number] : rows.offsets_R1[number + 1]]
    counts = dict(zip(ids, dataset.catalogue["count"].to_pylist(), strict=True))
    return {"users": list(found.items()), "counts": {i: c for i, c in counts.items() if c}}


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
@pytest.mark.parametrize(
    "options",
    [{}, {"partitions": 8, "chunk_rows": 500}, {"duplicates": "drop_exact"}, {"max_user_actions": 9}],
    ids=["", "partitions", "drop_exact", "capped"],
)
def test_days_appended_are_what_preparing_them_at_once_gives(tmp_path, text, options):
    logs = days(tmp_path, text)
    grown = prepared(f"{logs}/day-0.parquet", tmp_path / "grown", **options)
    generations = [grown.manifest.generation]
    before = grown.catalogue.ids.to_pylist()
    for day in (1, 2):
        grown = ActionLog.append(f"{logs}/day-{day}.parquet", str(tmp_path / "grown"))
        generations.append(grown.manifest.generation)
        now = grown.catalogue.ids.to_pylist()
        assert now[: len(before)] == before and now[len(before) :] == sorted(now[len(before) :])
        before = now
    whole = prepared(f"{logs}/*.parquet", tmp_path / "whole", **options)
    assert content(grown) == content(whole)
    for what in ("users", "actions", "first_time", "last_time"):
        assert getattr(grown.manifest, what) == getattr(whole.manifest, what)
    assert [b.rows for b in grown.manifest.blocks] == [b.rows for b in whole.manifest.blocks]
    assert [b.first_hash for b in grown.manifest.blocks] == [b.first_hash for b in whole.manifest.blocks]
    assert grown.manifest.earlier == generations[:-1] and len(set(generations)) == 3
    assert grown.manifest.action_type_names == ["buy", "click", "view"]
    first, second = grown.manifest.provenance["appended"]
    assert first["late"] == 0 and 0 < second["late"] <= 50
    assert second["new_users"] > 0 and second["new_items"] > 0


@pytest.mark.parametrize("options", [{"max_user_actions": 2}, {"duplicates": "drop_exact"}])
def test_users_after_the_last_one_are_as_all_others(tmp_path, options):
    users = np.argsort(hash_ids(np.arange(30)))
    schema = {"columns": {"user": "u", "item": "i", "time": "t"}, **options}
    for name, some in (("old", users[:1]), ("new", users[1:])):
        twice = np.tile(np.repeat(some, 3), 2)
        pq.write_table(
            pa.table({"u": twice, "i": twice * 0, "t": np.arange(len(twice)) % 3}),
            tmp_path / f"{name}.parquet",
        )
    source = make_source("log", schema)
    source.prepare(str(tmp_path / "old.parquet"), str(tmp_path / "grown"))
    grown = ActionLog.append(str(tmp_path / "new.parquet"), str(tmp_path / "grown"))
    whole = source.prepare(str(tmp_path / "*.parquet"), str(tmp_path / "whole"))
    assert grown.manifest.generation == whole.manifest.generation


def test_the_generation_before_stays_readable_and_no_older_one(tmp_path):
    logs, path = days(tmp_path), tmp_path / "set"
    first = prepared(f"{logs}/day-0.parquet", path)
    known = content(first)
    second = ActionLog.append(f"{logs}/day-1.parquet", str(path))
    assert content(first) == known, "who has it open reads on"
    again = SequenceDataset(path, first.manifest.generation)
    assert again.manifest == first.manifest and content(again) == known
    assert SequenceDataset(path).manifest == second.manifest
    ActionLog.append(f"{logs}/day-2.parquet", str(path))
    assert sorted(p.name for p in path.iterdir()) == [
        *("catalogue-1.parquet", "catalogue-2.parquet", "manifest-1.json", "manifest.json"),
        *("sequences-1", "sequences-2"),
    ]
    with pytest.raises(UserError, match="has grown by 2 appends since the generation"):
        SequenceDataset(path, first.manifest.generation)
    prepared_again = make_source("log", SCHEMA).prepare(f"{logs}/day-0.parquet", str(path), overwrite=True)
    assert prepared_again.manifest.generation == first.manifest.generation


def test_a_killed_append_leaves_the_dataset_as_it_was(tmp_path):
    logs, path = days(tmp_path), tmp_path / "set"
    dataset = prepared(f"{logs}/day-0.parquet", path)
    known = content(dataset)
    code = (
        "import os, sys, shutil\n"
        "from gr.data import writing\n"
        "from gr.data.making.sources.log import ActionLog\n"
        "calls = 0\n"
        "def replace(a, b, replace=os.replace):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == int(sys.argv[3]): os.kill(os.getpid(), 9)\n"
        "    replace(a, b)\n"
        "writing.os.replace = replace\n"
        "ActionLog.append(sys.argv[1], sys.argv[2])\n"
    )
    for moment in (2, 4):  # of the renames: two of new files, the old manifest's, the new one's
        killed = subprocess.run([sys.executable, "-c", code, f"{logs}/day-1.parquet", str(path), str(moment)])
        assert killed.returncode == -signal.SIGKILL
        assert content(SequenceDataset(path)) == known
    grown = ActionLog.append(f"{logs}/day-1.parquet", str(path))
    assert content(grown) == content(prepared(f"{logs}/day-[01].parquet", tmp_path / "whole"))


def test_the_program_appends_and_says_what_is_wrong_in_one_sentence(tmp_path, capsys, monkeypatch):
    logs, path = days(tmp_path), tmp_path / "set"
    prepared(f"{logs}/day-0.parquet", path)
    assert program.main(["append", "--to", str(path), "--source", f"{logs}/day-1.parquet"]) == 0
    assert "users" in capsys.readouterr().out
    for arguments, sentence in [
        (["append", "--out", str(path), "--source", "x"], "takes --to, and not --out"),
        (["append", "--to", str(path)], "reads the newer actions from --source"),
        (["append", "--to", str(tmp_path / "none"), "--source", "x"], "no sequence dataset at"),
        (["log", "--source", "x"], "takes --out, and not --to"),
    ]:
        assert program.main(arguments) != 0
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, change, sentence",
    [
        ({"filter": {"min_item_count": 2}}, {}, "was filtered by counts"),
        ({"duplicates": "drop_exact", "time_unit": "ms"}, {}, "keeps seconds"),
        ({}, {"what": ["a", "b"]}, "'a' is not an integer id"),
    ],
)
def test_what_cannot_be_appended_exactly_is_refused(tmp_path, options, change, sentence):
    logs, path = days(tmp_path), tmp_path / "set"
    if options.get("time_unit") == "ms":
        options = {**options, "on_bad_rows": "fail", "earliest": "1970-01-01"}
    dataset = prepared(f"{logs}/day-0.parquet", path, **options)
    file = tmp_path / "new.parquet"
    table = log(1, 1_086_400, 2)
    for name, values in change.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, file)
    with pytest.raises(UserError, match=sentence):
        ActionLog.append(str(file), str(path))
    assert SequenceDataset(path).manifest == dataset.manifest
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing is left lying about"


def test_a_schema_of_other_columns_is_refused(tmp_path):
    logs, path = days(tmp_path), tmp_path / "set"
    dataset = prepared(f"{logs}/day-0.parquet", path)
    less = {"columns": {name: SCHEMA["columns"][name] for name in ("user", "item", "time")}}
    said = f"column 'shop' of '{path}' is of type int64, and the log gives none: give the schema that"
    with pytest.raises(UserError, match=said):
        ActionLog.append(f"{logs}/day-1.parquet", str(path), schema=less)
    assert SequenceDataset(path).manifest == dataset.manifest


def grown(
    folder: Path, first: dict, second: dict, *settings: str, **schema
) -> tuple[SequenceDataset, list[str]]:
    """A dataset of the actions ``first`` with ``second`` appended; and what was said about that."""
    for name, columns in (("first", first), ("second", second)):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    prepared(f"{folder}/first.parquet", folder / "set", **schema)
    notes = Notes()
    made = ActionLog.append(
        f"{folder}/second.parquet", str(folder / "set"), settings=settings, progress=notes
    )
    return made, notes.said


def actions(what=(1, 2), at=(10, 20), **more) -> dict:
    return {"who": [1] * len(what), "what": what, "at": at, **more}


BARE = {"columns": {"user": "who", "item": "what", "time": "at"}}


@pytest.mark.parametrize(
    ("schema", "settings", "sentence"),
    [
        ({"filter": {"min_item_count": 1}}, ["filter.min_item_count=0"], "was filtered by counts"),
        (
            {},
            ["duplicates=drop_exact"],
            "was prepared with duplicates keep, which holds for all of it, and not with",
        ),
        (
            {"max_user_actions": 5},
            ["max_user_actions=null"],
            "was prepared with max_user_actions 5, which holds for",
        ),
        ({}, ["item_ids=string"], "has item_ids of type integer, and the schema says string"),
        ({}, ["users={path: x.parquet, user: who}"], "users describes users, of whom"),
    ],
)
def test_what_held_for_the_first_log_holds_for_those_appended(tmp_path, schema, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        grown(tmp_path, actions(), actions(at=(30, 40)), *settings, **{**BARE, **schema})
    other = tmp_path / "other.yaml"
    other.write_text("columns: {user: who, item: what, time: at}\n")
    if "filter" in schema:  # not by another schema either
        with pytest.raises(UserError, match=sentence):
            ActionLog.append(f"{tmp_path}/second.parquet", str(tmp_path / "set"), schema=other)
    assert not SequenceDataset(tmp_path / "set").manifest.earlier


def test_items_that_the_catalogue_no_longer_lists_keep_what_was_known_of_them(tmp_path):
    items = tmp_path / "items.csv"
    items.write_text("id,title,price\n1,one,3\n2,two,4\n")
    schema = {**BARE, "catalogue": {"path": str(items), "item": "id"}}
    first, said = grown(tmp_path, actions(), actions((3, 4), (30, 40)), **schema)
    assert first.catalogue["title"].to_pylist() == ["one", "two", None, None]
    assert "2 of 4 items are not in the catalogue: their columns are null" in said
    items.write_text("id,title\n3,three\n1,ONE\n")
    notes = Notes()
    second = ActionLog.append(f"{tmp_path}/second.parquet", str(tmp_path / "set"), progress=notes)
    assert second.catalogue["title"].to_pylist() == ["ONE", "two", "three", None]
    assert "price" not in second.catalogue.column_names, "which the schema's catalogue has no more"
    assert any("1 items of" in said and "keep what was known of them" in said for said in notes.said)
    third = ActionLog.append(f"{tmp_path}/second.parquet", str(tmp_path / "set"), schema=BARE)
    assert third.catalogue["title"].to_pylist() == ["ONE", "two", "three", None], "no catalogue is named"


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ([1.5, 2.5], [2**53 + 1, 3], "9007199254740993 becomes a float64 of 2.53 or more"),
        (["a", "b"], [2.0**60, 3.5], "is a float64 of 2.53 or more"),
        ([1, 2], ["07", "3"], "'07' would become another value as an integer"),
    ],
)
def test_no_value_becomes_another_for_the_type_that_the_dataset_has(tmp_path, first, second, sentence):
    schema = {"columns": {**BARE["columns"], "fields": {"x": "x"}}}
    with pytest.raises(UserError, match=sentence):
        grown(tmp_path, actions(x=first), actions(at=(30, 40), x=second), **schema)


def test_action_types_are_read_as_the_dataset_has_them_and_new_ones_are_said(tmp_path):
    schema = {"columns": {**BARE["columns"], "action_type": "how"}}
    with pytest.raises(UserError, match="'01' would become another id as an integer"):
        grown(tmp_path, actions(how=[1, 2]), actions(at=(30, 40), how=["1", "01"]), **schema)
    shutil.rmtree(tmp_path / "set")
    made, said = grown(tmp_path, actions(how=["a", "b"]), actions(at=(30, 40), how=["b", "c"]), **schema)
    assert made.manifest.action_type_names == ["a", "b", "c"]
    assert f"action types that '{tmp_path / 'set'}' had not: c" in said


def test_what_is_doubted_of_a_day_and_put_aside_of_it_is_shown_with_the_rest(tmp_path):
    schema = {**BARE, "time_unit": "ms", "on_bad_rows": "quarantine"}
    first = actions((1, 2, None), (1_700_000_000_000, 1_700_000_001_000, 1_700_000_002_000))
    made, _ = grown(tmp_path, first, actions((3, None), (1_700_000_003, 1_700_000_004)), **schema)
    console = Console(width=400)
    with console.capture() as shown:
        for table in preparation_tables(made):
            console.print(table)
    assert "in s: set time_unit: s if that is it" in shown.get()
    assert made.manifest.provenance["quarantined"] == {"what: missing": 2}
    found = [len(pq.read_table(tmp_path / "set" / f"quarantine{n}")) for n in ("", "-1")]
    assert found == [1, 1]


def test_repeats_within_a_second_that_the_dataset_kept_stay(tmp_path):
    """It was prepared from milliseconds, by which they are no repeats."""
    schema = {**BARE, "duplicates": "drop_exact"}
    first = actions((1, 1, 1), (10_001, 10_002, 10_002))
    made, _ = grown(tmp_path, first, actions((1, 1), (10, 30)), "time_unit=s", time_unit="ms", **schema)
    assert made.read_block(0).timestamps_A.tolist() == [10, 10, 30]


def test_the_working_folder_grows_too(tmp_path, monkeypatch):
    pq.write_table(pa.table(actions()), tmp_path / "first.parquet")
    prepared(f"{tmp_path}/first.parquet", tmp_path / "in" / "set", **BARE)
    monkeypatch.chdir(tmp_path / "in" / "set")
    assert ActionLog.append(f"{tmp_path}/first.parquet", ".").actions == 4
    assert os.listdir(tmp_path / "in") == ["set"] and not [n for n in os.listdir(".") if n.startswith(".")]


def test_who_reads_on_after_two_appends_is_told_what_became_of_the_files(tmp_path):
    made, _ = grown(tmp_path, actions(), actions(at=(30, 40)), **BARE)
    before = SequenceDataset(made.path, made.manifest.earlier[0])
    ActionLog.append(f"{tmp_path}/first.parquet", str(made.path))
    with pytest.raises(UserError, match="has grown by 2 appends since the generation"):
        before.read_block(0)


# -- runs ------------------------------------------------------------------------------------------------------------

RUN = ["eval.splits=[test]", "model.encoder.dropout=0.1", "train.epochs=1", "data.split.holdout=1"]
ONCE = ["data.split={name: chronological, period: 1d, start: 1000000}", "eval.splits=[test]"]


def configured(folder: Path, path: Path, *overrides: str) -> configs.RunConfig:
    file = folder / "tiny.yaml"
    file.write_text(CONFIG.format(run=folder / "run", data=path))
    return configs.load(file, ["train.global_batch=64", *overrides])


@pytest.mark.parametrize(
    "key, sentence",
    [
        ("schedule.name=cosine", "falls towards a last step"),
        ("model.input.features={user: {derived: user}}", "feature 'user' has a row for each user"),
    ],
)
def test_what_hangs_on_how_much_data_there_is_does_not_grow(tmp_path, key, sentence):
    logs, path = days(tmp_path), tmp_path / "set"
    prepared(f"{logs}/day-0.parquet", path)
    made = configured(tmp_path, path, *RUN, key)
    with pytest.raises(UserError, match=sentence):
        check_growing(made, SequenceDataset(path))


@pytest.mark.parametrize("optimizer", ["adamw", "lazy_adam"])
def test_a_run_goes_on_with_the_grown_data(tmp_path, optimizer, capsys):
    logs, path = days(tmp_path), tmp_path / "set"
    old = prepared(f"{logs}/day-0.parquet", path)
    change = [f"optimizer={{name: {optimizer}, lr: 0.01}}", *RUN]
    first = job.run(configured(tmp_path, path, *change))
    trained = weights(first.path)["model/tables.items.weight"]
    grown = ActionLog.append(f"{logs}/day-1.parquet", str(path))
    assert compare(str(first.path), "test").results, "its own generation is still there"
    steps: list[dict[str, torch.Tensor]] = []
    job.resume(first.path, ["train.epochs=2", "checkpoint.every_steps=1", "checkpoint.keep=100"])
    assert "the dataset has grown" in capsys.readouterr().out
    saved = sorted((first.path / "checkpoints").iterdir())
    steps = [tensors_in(p) for p in saved]
    table = steps[-1]["model/tables.items.weight"]
    assert table.shape == (grown.items, 16) and grown.items > old.items and len(trained) == old.items
    # rows of new items start from (seed, table, row): as in a run that begins with the grown data
    new = build(configured(tmp_path, path, *change), Processes(torch.device("cpu")))
    start = new.model.tables["items"].vectors(0, grown.items)
    after_one = next(s for p, s in zip(saved, steps) if len(s["model/tables.items.weight"]) == grown.items)
    moved = (after_one["model/tables.items.weight"][old.items :] - start[old.items :]).abs().max()
    assert moved <= 0.011, "one step of Adam away from where they start"
    state = json.loads((saved[-1] / "state.json").read_text())
    assert state["cursor"]["generation"] == grown.manifest.generation
    assert compare(str(first.path), "test").results


def test_an_epoch_that_was_begun_is_finished_with_what_it_began_with(tmp_path):
    logs, path = days(tmp_path), tmp_path / "set"
    old = prepared(f"{logs}/day-0.parquet", path)
    whole = job.run(configured(tmp_path, path, *RUN, f"run.dir={tmp_path}/whole"))
    stopped = job.run(configured(tmp_path, path, *RUN, "train.max_steps=2"))
    ActionLog.append(f"{logs}/day-1.parquet", str(path))
    job.resume(stopped.path, ["train.max_steps=null"])
    rows = [
        [r for r in job.RunFolder(p).read_metrics() if r["kind"] == "train"]
        for p in (whole.path, stopped.path)
    ]
    assert rows[0] == rows[1]
    ActionLog.append(f"{logs}/day-2.parquet", str(path))
    third = job.resume(stopped.path, ["train.epochs=2"])
    assert third.finished and old.manifest.generation in SequenceDataset(path).manifest.earlier


def test_day_after_day_appended_and_trained_is_one_pass_over_all_of_them(tmp_path):
    """What is held out and trained in each period is the same; the rows of items are numbered otherwise."""
    logs, path = days(tmp_path), tmp_path / "set"
    prepared(f"{logs}/day-0.parquet", path)
    result = job.run(configured(tmp_path, path, *ONCE))
    ActionLog.append(f"{logs}/day-1.parquet", str(path))
    result = job.resume(result.path)
    prepared(f"{logs}/day-[01].parquet", tmp_path / "whole")
    at_once = job.run(configured(tmp_path, tmp_path / "whole", *ONCE, f"run.dir={tmp_path}/at-once"))

    def told(rows):
        return [
            (r["epoch"], r["period"], r["users"], r["cold_targets"], r["repeated_targets"])
            for r in rows
            if r["kind"] == "eval"
        ]

    assert told(result.metrics) == told(at_once.metrics) and len(told(result.metrics)) == 2
    targets = [sum(r["targets"] for r in x.metrics if r["kind"] == "train") for x in (result, at_once)]
    assert targets[0] == targets[1]


def test_a_run_that_follows_picks_up_what_is_appended_and_gives_up_in_the_end(tmp_path):
    logs, path = days(tmp_path), tmp_path / "set"
    prepared(f"{logs}/day-0.parquet", path)
    followed: list[float] = []

    def on_step(folder) -> None:
        if not followed:
            followed.append(time.monotonic())
            ActionLog.append(f"{logs}/day-1.parquet", str(path))

    result = job.run(configured(tmp_path, path, *ONCE, "data.follow={every: 1, give_up: 2}"), on_step=on_step)
    assert result.finished
    assert [r["epoch"] for r in result.metrics if r["kind"] == "eval"] == [0, 1]
    assert weights(result.path)["model/tables.items.weight"].shape[0] == SequenceDataset(path).items
    assert os.path.exists(path / "manifest-0.json")
