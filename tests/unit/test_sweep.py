"""A sweep: the small one that ships, from its file to its report; members that fail; what its files may not say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from gr.errors import UserError
from gr.programs import sweep as program
from gr.train import cells
from gr.train.sweep import figures, report
from gr.train.sweep.backends.base import Resources
from gr.train.sweep.plan import Budget, Dial, SweepConfig, members_of, read_sweep
from gr.train.sweep.results import Row, laws_of, row_of
from gr.train.sweep.run import Outcome
from gr.train.sweep.sweep import _data, sweep
from tests.programs import run_python


@pytest.fixture(autouse=True)
def started(monkeypatch) -> list[list[str]]:
    """Trainings are forked, which spares their imports; the commands are kept."""
    commands: list[list[str]] = []

    def start(command, log=None, begun=None):
        commands.append(list(command))
        done = run_python(command[1:])
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(cells, "exit_status", start)
    return commands


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def test_the_small_sweep_runs_and_is_not_repeated(out, started, capsys):
    assert sweep("scaling/small", out)
    assert len(started) == 6
    found = json.loads((out / "results.json").read_text())
    assert len(found["members"]) == 6 and not any(m["why"] for m in found["members"])
    for member in found["members"]:
        assert member["flops"] == pytest.approx(member["values"]["flops"], rel=0.1)  # of steps as a whole
        assert member["tokens"] == member["steps"] * 32 * 31
        assert member["measured"]["training_loss"] > 1 and "loss" in member["measured"]
        assert member["objective"] == "sampled softmax, 32 negatives"
    law, above, training = found["laws"]
    assert [x["of"]["metric"] for x in found["laws"]] == ["loss", "loss", "training_loss"]
    assert 0 < above["of"]["floor"] < min(m["measured"]["loss"] for m in found["members"])
    assert set(above["compute"]) == {"without E"} and training["held_out"]
    assert set(law["compute"]) == {"without E", "with E"} and len(law["fitted"]) == 5
    assert law["compute"]["without E"]["coefficients"]["alpha"] > 0 and len(law["held_out"]) == 1
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "hstu-width8-flops2e+08" in page and "http-equiv" not in page
    assert (out / "scaling.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "[6/6]" in printed and "L(C) without E" in printed and "held out" in printed

    # again, with something in the way of one member: it fails, and what is there stays
    gone = out / "members" / "hstu-width8-flops2e+08"
    shutil.rmtree(gone)
    gone.mkdir()
    (gone / "something").write_text("in the way")
    started.clear()
    assert not sweep("scaling/small", out, workers=2)
    assert len(started) == 1 and f"run.dir={gone}" in started[0]
    rows = json.loads((out / "results.json").read_text())["members"]
    assert [bool(row["why"]) for row in rows] == [True] + 5 * [False]
    said = capsys.readouterr().out
    assert said.count(f"hstu-width8-flops2e+08 failed: {rows[0]['why']}") == 2 and not rows[0]["measured"]


def test_members_are_every_width_budget_and_combination(tmp_path):
    plan, file = read_sweep("scaling/small")
    plan = plan.model_copy(update={"budgets": [], "grid": {"train.seed": [1, 2], "train.max_steps": [3]}})
    found, left_out = members_of(plan, file, tmp_path, "data", ["train.threads=1"])
    assert not left_out
    assert [m.cell.name for m in found][:2] == [f"hstu-width8-seed{s}-max_steps3" for s in (1, 2)]
    assert len(found) == 4 and all(
        m.config.train.max_steps == 3 and m.config.train.threads == 1 for m in found
    )
    wide = found[-1].config
    assert (wide.model.dim, wide.model.encoder.heads, wide.model.encoder.qk_dim) == (16, 2, 8)
    assert wide.optimizer.lr == 0.004 and wide.log.every_steps == 1 and not wide.log.plots


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dial": None, "budgets": []}, "nothing differs between members"),
        ({"grid": {"train.seed": [1]}, "members": [{}]}, "grid and members both say"),
        ({"set": {"run.dir": "x"}}, r"run\.dir is the sweep's own"),
        ({"dial": {"widths": [8, 8]}}, "stands in it twice"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(change, message):
    raw = read_sweep("scaling/small")[0].model_dump(mode="json") | change
    with pytest.raises(ValueError, match=message):
        SweepConfig.model_validate(raw)


def test_a_dial_and_budgets_that_cannot_be(out, tmp_path):
    with pytest.raises(UserError, match=r"dial\.widths has 50, which 3 heads of about 16 cannot share"):
        Dial(widths=[50], head=16).overrides(50, "hstu")
    with pytest.raises(UserError, match=r"the dial doesn't know model\.encoder other"):
        Dial(widths=[50]).overrides(50, "other")
    plan, file = read_sweep("scaling/small")
    plan = plan.model_copy(update={"budgets": [Budget(flops=1e9), Budget(flops=1e12)]})
    data = _data(plan, out)
    found, left_out = members_of(plan, file, tmp_path, data)
    assert [m.cell.name for m in found] == ["hstu-width16-flops1e+09"]
    assert (
        len(left_out) == 3 and "'hstu-width8-flops1e+09' is left out: 1e+09 operations are 191" in left_out[0]
    )
    with pytest.raises(UserError, match="no member of the sweep has data enough"):
        members_of(plan.model_copy(update={"budgets": [Budget(flops=1e12)]}), file, tmp_path, data)


def test_data_of_another_sweep_are_refused_though_this_one_does_not_say_what_differs(tmp_path):
    plan, _ = read_sweep("scaling/small")
    few = plan.model_copy(update={"options": {**plan.options, "records": 40, "seed": 7}})
    made = _data(few, tmp_path)
    assert _data(few, tmp_path) == made
    silent = few.model_copy(update={"options": {k: v for k, v in few.options.items() if k != "seed"}})
    with pytest.raises(UserError, match=r"was made with seed=7, and the sweep asks for \d"):
        _data(silent, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": {"model.dim": [8, "wide"]}, "budgets": []},
            r"member 'hstu-width8-dimwide' of the sweep can't be: config key 'model\.dim'",
        ),
        (
            {"families": {"din": {"config": "ml-1m-ctr/dcn"}}, "dial": None},
            "family 'din' has model.name two_tower, which has no loss over the catalogue",
        ),
    ],
)
def test_a_member_or_a_family_that_cannot_be_is_named(tmp_path, change, message):
    plan, file = read_sweep("scaling/small")
    raw = plan.model_dump(mode="json") | {"dataset": None, "set": {}} | change
    with pytest.raises(UserError, match=message):
        members_of(SweepConfig.model_validate(raw), file, tmp_path, "data")


def test_a_two_tower_model_is_a_member_like_another(out, tmp_path, started):
    plan, file = read_sweep("scaling/hstu-dp")
    assert list(plan.families) == ["hstu", "transformer", "two-tower"]
    small, _ = read_sweep("scaling/small")
    raw = small.model_dump(mode="json") | {
        "families": {"two-tower": {"config": "synthetic-dp/two-tower"}},
        "dial": {"widths": [8], "head": 8, "aspect": 16},
        "budgets": [2e8],
    }
    members, _ = members_of(SweepConfig.model_validate(raw), file, tmp_path, _data(small, out))
    (member,) = members
    assert member.config.model.encoder.hidden == 32 and member.cell.name == "two_tower-width8-flops2e+08"
    trained = cells.train_cell(member.cell, tmp_path / "log")
    row = row_of(Outcome(member, trained), small)
    assert not row.why and row.flops == pytest.approx(2e8, rel=0.1) and row.measured["loss"] > 1
    (tmp_path / "members/two_tower-width8-flops2e+08/metrics.jsonl").write_text("")
    empty = row_of(Outcome(member, cells.train_cell(member.cell, tmp_path / "log")), small)
    assert "has no row of training" in empty.why


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workers", "0"], "--workers is 0: 1 is the least"),
        (["--cpus", "0"], "--cpus is 0: 1 is the least"),
        (["--gpus", "-1"], "--gpus is -1: 0 is the least"),
        (["--sbatch", "-p 'gpu"], "can't be read (No closing quotation): close its quotes"),
    ],
)
def test_the_program_refuses_numbers_and_words_that_cannot_be(tmp_path, capsys, words, says):
    assert program.main(["--config", "scaling/small", "--out", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_sbatch_refuses_is_said_in_its_words(tmp_path, monkeypatch):
    from gr.train.sweep.backends.slurm import Slurm

    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: gpu' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"^sbatch refuses 'one': error: invalid partition: gpu$"):
        Slurm(Resources()).run("one", ["true"], tmp_path / "one.txt")


def test_places_that_cannot_be_are_refused_before_anything_is_made(tmp_path, capsys):
    (tmp_path / "file").write_text("something")
    (tmp_path / "half/data").mkdir(parents=True)
    for out, says in (
        (tmp_path / "file", "is a file: give a folder"),
        (Path("/dev/null/x"), "'/dev/null' is not a folder to write in"),
        (tmp_path / "half", "holds no dataset (manifest.json is missing): move it away"),
    ):
        assert program.main(["--config", "scaling/small", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_why_members_failed_is_told_once_and_what_is_not_there_is_not_fitted(capsys):
    plan, _ = read_sweep("scaling/small")
    rows = [Row(f"one-{n}", "hstu", {}, "", why="no [disk] left") for n in range(6)]
    report.show(plan, rows, laws_of(plan, rows))
    said = capsys.readouterr().out
    assert "one-0, one-1, one-2, one-3 and 2 more failed: no [disk] left\n" in said
    assert said.count("no [disk] left") == 1 and "needs" not in said
    assert "hstu: no member has finished, so that there is nothing to fit" in said


def test_a_family_without_a_law_is_in_the_picture_by_its_name():
    from matplotlib.figure import Figure

    plan, _ = read_sweep("scaling/small")
    rows = [
        Row(
            f"one-{n}",
            "hstu",
            {},
            "",
            parameters=9,
            tokens=9,
            flops=10.0**n,
            measured={"loss": 5.0 / n, "training_loss": 5.0},
        )
        for n in (1, 2)
    ]
    law = next(law for law in laws_of(plan, rows) if law.quantity.metric == "loss")
    axes = Figure().subplots()
    figures._scaling(axes, law, rows, "#123456")
    assert law.chosen is None
    assert axes.get_legend_handles_labels()[1] == ["hstu: too few points for a law"]


@pytest.mark.parametrize("count", [3, 16])
def test_a_law_of_size_and_data_is_printed_where_members_tell_it(capsys, count):
    plan, _ = read_sweep("scaling/small")
    pairs = [(10.0**n, 10.0**d) for n in (4, 5, 6, 7) for d in (5, 6, 7, 8)][:: 16 // count][:count]
    rows = [
        Row(
            f"one-{size:g}-{tokens:g}",
            "hstu",
            {},
            "",
            parameters=int(size),
            tokens=int(tokens),
            steps=1,
            flops=6 * size * tokens,
            measured={"loss": 1.7 + 400 * size**-0.34 + 410 * tokens**-0.28, "training_loss": 5.0},
        )
        for size, tokens in pairs
    ]
    laws = laws_of(plan, rows)
    report.show(plan, rows, laws)
    said = " ".join(capsys.readouterr().out.split())
    law = next(law for law in laws if law.quantity.metric == "loss")
    if count == 16:
        assert law.size_and_data.coefficients["beta"] == pytest.approx(0.28, rel=0.01)
        assert said.count("by L(N, D), ") == 1
        return
    assert law.size_and_data is None and not law.optima and "by L(N, D), " not in said
    assert "hstu: L(N, D) isn't told: 3 members of 3 sizes and 3 amounts of data are too few for five" in said


def test_the_program_refuses_in_a_sentence(tmp_path):
    done = run_python(["launch/sweep.py", "--config", "scaling/smal", "--out", tmp_path])
    assert done.returncode == 2 and "did you mean 'scaling/small'?" in done.stderr
