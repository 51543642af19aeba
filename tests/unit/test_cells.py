"""Cells: trained once, gone on with, refused where they changed; and what a published table makes of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gr import config as configs
from gr.errors import UserError
from gr.shipped import find_config, find_table, table_names
from gr.train import cells, job
from gr.train.cells import Cell, Trained, is_finished, train_cells
from gr.train.folder import RunFolder
from gr.train.reproduction import reproduce as reproduction
from gr.train.reproduction.table import Measured, Row, read_table
from gr.train.reproduction.transfer import read_transfer
from gr.train.reproduction.views import print_table
from gr.train.selection import metric_names
from tests.end_to_end.tiny import assert_same_run, make_dataset, write_config

SHORT = ("train.epochs=1", "train.max_steps=6", "eval.splits=[test]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cells")
    make_dataset(path / "data")
    write_config(path, path / "data", path / "run")
    return path


def cell(folder: Path, name: str, *overrides: str, processes: int = 1) -> Cell:
    return Cell(name, folder / "run.yaml", str(folder / name), (*SHORT, *overrides), processes)


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Nothing is started: the commands are kept, and each seems to end well."""
    kept: list[list[str]] = []
    monkeypatch.setattr(cells, "exit_status", lambda command, *more: kept.append(list(command)) or 0)
    return kept


def test_a_cell_is_trained_once_and_an_interrupted_one_goes_on(folder, monkeypatch):
    whole, broken = cell(folder, "whole"), cell(folder, "broken")

    def interrupt(run: RunFolder) -> None:
        if any(run.checkpoints.glob("step-*")):  # of step 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        config = configs.load(broken.config, [*broken.overrides, f"run.dir={broken.folder}"])
        job.run(config, on_step=interrupt)
    assert not is_finished(whole) and not is_finished(broken)
    results = train_cells([whole, broken])
    assert [r.cell for r in results] == [whole, broken] and is_finished(whole) and is_finished(broken)
    assert_same_run(Path(whole.folder), Path(broken.folder))
    assert [r.config.train.max_steps for r in results] == [6, 6]
    monkeypatch.setattr(
        cells, "exit_status", lambda command, *more: pytest.fail("what is finished is started again")
    )
    assert train_cells([whole, broken]) == results


def test_a_changed_cell_is_refused_before_any_is_trained(folder, commands):
    new, there = cell(folder, "new"), cell(folder, "there", "train.seed=1")
    job.run(configs.load(there.config, [*there.overrides, f"run.dir={there.folder}"]))
    kept = cell(folder, "there", "train.seed=1", "log.every_steps=3", "train.threads=1")
    assert train_cells([kept])[0].config.log.every_steps == 1, "what doesn't change the result is no change"
    with pytest.raises(UserError, match=r"there' is there and was trained with train\.seed=1, not 2: choose"):
        train_cells([new, cell(folder, "there", "train.seed=2")])
    make_dataset(folder / "other", users=151)
    with pytest.raises(
        UserError, match=r"was trained on another dataset than '.*other' \(generation \w+, not"
    ):
        train_cells([new, cell(folder, "there", "train.seed=1", f"data.path={folder / 'other'}")])
    with pytest.raises(UserError, match="'new' and 'new' both train in"):
        train_cells([new, cell(folder, "new")])
    with pytest.raises(UserError, match="asks for 0 processes"):
        train_cells([cell(folder, "none", processes=0)])
    with pytest.raises(UserError, match="unknown config key"):
        train_cells([new, cell(folder, "typo", "train.sed=1")])
    assert not commands and not Path(new.folder).exists()


def test_a_training_that_fails_or_is_stopped_is_said(folder, monkeypatch, capsys):
    monkeypatch.setattr(cells, "exit_status", lambda command, *more: 1)
    with pytest.raises(UserError, match="training 'ends' failed"):
        train_cells([cell(folder, "ends")])
    monkeypatch.setattr(cells, "exit_status", lambda command, *more: 0)
    assert f"\n1 of 1, ends: {folder / 'ends'}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="training 'ends' was stopped; run the same command again to go on"):
        train_cells([cell(folder, "ends")])


def test_cells_are_started_as_a_person_would(folder, commands):
    for processes in (1, 2):
        with pytest.raises(UserError, match="was stopped"):
            train_cells([cell(folder, "start", processes=processes)])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    wanted = ["--config", str(folder / "run.yaml"), f"run.dir={folder / 'start'}", *SHORT]
    program = ["-m", "gr.programs.train"]
    assert commands == [[sys.executable, *program, *wanted], [sys.executable, *torchrun, *program, *wanted]]


def rows_that_disagree() -> list[dict]:
    """Validation: ndcg@10 is best at step 2, mrr at step 3.  The test's figure is its step."""
    train = {"kind": "train", "step": 1, "data_digest": "abc"}
    found = [train]
    for step, ndcg, mrr in ((1, 0.1, 0.1), (2, 0.9, 0.2), (3, 0.5, 0.7), (4, 0.3, 0.3)):
        at = {"kind": "eval", "epoch": step - 1, "step": step}
        found.append({**at, "split": "valid", "ndcg@10": ndcg, "mrr": mrr})
        found.append({**at, "split": "test", "ndcg@10": step, "hr@10": step, "mrr": step})
    return found


@pytest.mark.parametrize(
    ("overrides", "metric", "step"),
    [
        ([], "ndcg@10", 2),
        (
            ["train.early_stopping={metric: mrr}", "eval.splits=[valid, test]", "data.split.holdout=2"],
            "mrr",
            3,
        ),
        (["eval.ks=[50]"], "mrr", 3),
    ],
)
def test_the_epoch_is_chosen_by_the_runs_own_metric(overrides, metric, step, capsys):
    config = configs.load("ml-1m/hstu", overrides)
    row = Row(name="HSTU", config="hstu.yaml", published={}, source="", valid=True)
    measured = Measured(row)
    costs = [
        {"step": 1, "step_s": 9.0},
        *({"epoch_s": s, "peak_mib": 700.2, "trained": 1234} for s in (1, 4, 2)),
    ]
    cell = Cell("HSTU", find_config("ml-1m/hstu"), "run")
    measured.add(Trained(cell, config, rows_that_disagree(), costs))
    assert [r["step"] for r in measured.last] == [4] and measured.digests == ["abc"]
    assert [r["step"] for r in measured.result] == [step]
    table = read_table("ml-1m").model_copy(update={"columns": ["ndcg@10"], "costs": True})
    print_table(table, [measured])
    said = capsys.readouterr().out
    assert f"chosen by valid {metric} ({step})" in said
    assert all(text in said for text in ("s an epoch", "1,234", " 2.0 ", " 700 ")), (
        "the median of three epochs"
    )
    only = Measured(row)
    only.add(Trained(Cell("HSTU", "", ""), config, rows_that_disagree()), last=False)
    assert not only.last and not only.digests and [r["step"] for r in only.chosen] == [step]


def test_a_table_is_not_rebuilt_from_a_run_that_was_trained_otherwise(folder, tmp_path):
    there = configs.load("ml-1m/hstu", ["train.epochs=3"])
    run = tmp_path / "ml-1m" / "hstu-seed1"
    RunFolder.make(configs.override(there, [f"run.dir={run}"]), configs.to_yaml(there), {})
    with pytest.raises(UserError, match=r"was trained with train\.epochs=3, not 101"):
        reproduction.reproduce("ml-1m", None, rows=["hstu"], out=str(tmp_path), data=str(folder / "data"))


@pytest.mark.parametrize("name", [name for name in table_names() if read_transfer(name) is None])
def test_every_row_of_every_table_measures_its_columns(name):
    table = read_table(name)
    for row in table.rows:
        config = configs.load(find_table(name).parent / row.config)
        assert set(table.columns) <= set(metric_names(config)), row.config
        assert not row.valid or "valid" in config.eval.splits


def test_the_cells_of_a_table(folder, tmp_path, monkeypatch):
    """A row for each seed; one more with a validation action where the row's own protocol holds none out."""
    asked: list[Cell] = []

    class Enough(Exception):
        pass

    def note(wanted):
        asked.extend(wanted)
        raise Enough

    monkeypatch.setattr(reproduction, "train_cells", note)
    data = str(folder / "data")
    with pytest.raises(Enough):
        reproduction.reproduce(
            "ml-1m", None, rows=["hstu", "bert4rec"], seeds=[1, 2], processes=3, out="o", data=data
        )
    assert [c.folder for c in asked] == [
        *("o/ml-1m/bert4rec-seed1", "o/ml-1m/bert4rec-seed2"),
        *("o/ml-1m/hstu-seed1", "o/ml-1m/hstu-seed1-holdout2"),
        *("o/ml-1m/hstu-seed2", "o/ml-1m/hstu-seed2-holdout2"),
    ]
    assert {c.processes for c in asked} == {3}
    for found in asked:
        config = configs.load(found.config, found.overrides)
        held_out = 2 if "holdout2" in found.folder or "bert4rec" in found.folder else 1
        assert config.data.split.holdout == held_out and config.data.path == data
        assert f"seed{config.train.seed}" in found.folder
