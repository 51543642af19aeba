"""Tables that are loaded whole are not filled before; those that have grown are, and a run that froze some is."""

from __future__ import annotations

import json

import pytest
import torch

from gr import config as configs
from gr.embeddings import table as tables
from gr.embeddings.local import LocalTable
from gr.embeddings.table import TableSpec, rows_come_later
from gr.processes import Processes
from gr.train import job
from gr.train.comparison import compare
from gr.train.exporting import export
from gr.train.runs import open_run
from tests.end_to_end.tiny import CONFIG, make_dataset, weights
from tests.packages import needs

CPU = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set").path


@pytest.fixture
def drawn(monkeypatch):
    """Rows whose first values are asked for from now on."""
    rows, real = [], tables.truncated_normal_rows

    def counted(key, wanted, *rest):
        rows.append(len(wanted))
        return real(key, wanted, *rest)

    monkeypatch.setattr(tables, "truncated_normal_rows", counted)
    return rows


def config(folder, data, name, *overrides):
    (folder / f"{name}.yaml").write_text(CONFIG.format(run=folder / name, data=data))
    return configs.load(folder / f"{name}.yaml", ["train.max_steps=9", "eval.splits=[test]", *overrides])


def steps(run):
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("table", ["local", "mapped", "torchrec"])
def test_what_is_loaded_is_not_drawn_and_goes_on_to_the_same_bits(data, tmp_path, drawn, table):
    if table == "torchrec":
        needs("torchrec")
    given = (f"model.table={table}", "model.similarity={item_bias: true, normalize: false}")
    whole = job.run(config(tmp_path, data, "whole", *given))
    stopped = job.run(config(tmp_path, data, "stopped", *given, "train.max_steps=4"))
    assert sum(drawn) == 2 * 60
    drawn.clear()
    done = job.resume(stopped.path, ["train.max_steps=9"])
    opened = open_run(done.path)
    compare(str(done.path))
    export(done.path, tmp_path / "exported")
    open_run(tmp_path / "exported")
    assert drawn == []
    assert steps(done) == steps(whole)
    one, other = weights(whole.path), weights(done.path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    kept = open_run(whole.path).model.items
    assert torch.equal(opened.model.items.vectors(0, 60), kept.vectors(0, 60))


def test_a_run_without_a_checkpoint_and_one_that_froze_something_begin_filled(data, tmp_path, drawn):
    begun = config(tmp_path, data, "begun")
    run = job.run(begun)
    drawn.clear()
    for checkpoint in (run.path / "checkpoints").iterdir():
        (checkpoint / "complete.json").unlink()
    again = job.resume(run.path)
    assert drawn == [60] and steps(again) == steps(run)
    froze = config(tmp_path, data, "froze", f"train.start_from={again.path}", "train.max_steps=4")
    froze = job.run(froze)
    drawn.clear()
    assert job.resume(froze.path, ["train.max_steps=9"]).finished and drawn == [60]


def test_a_table_that_will_be_loaded_holds_zeros_until_then():
    spec = TableSpec("items", 10, 4, 0.02, seed=1)
    with rows_come_later():
        later = LocalTable(LocalTable.Config(), spec, CPU)
    with rows_come_later(False):
        filled = LocalTable(LocalTable.Config(), spec, CPU)
    assert not later.weight.any() and torch.equal(filled.weight, LocalTable(LocalTable.Config(), spec).weight)
    assert filled.weight.all()
