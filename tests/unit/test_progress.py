"""Progress says how far, how fast and how long, on a terminal and elsewhere, from the first advance on."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from gr import config as configs
from gr.progress import BarProgress, PlainProgress, clock, speed
from gr.train import job
from gr.train.evaluation import Evaluation
from gr.train.folder import RunFolder, read_rows
from gr.train.log import StepProgress
from gr.train.trainer import Trainer
from tests.end_to_end.tiny import make_dataset, write_config


def test_clock():
    assert [clock(s) for s in (0, 59.4, 59.6, 3599.4, 3722)] == ["0 s", "59 s", "1:00", "59:59", "1:02:02"]


def test_what_is_slow_has_a_speed():
    assert [speed(rate) for rate in (0, 0.0437, 4, 9.94, 9.96, 1234.5)] == [
        "0",
        "0.044",
        "4",
        "9.9",
        "10",
        "1,234",
    ]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds(monkeypatch) -> Clock:
    passed = Clock()
    monkeypatch.setattr("time.monotonic", passed)
    monkeypatch.setattr("time.perf_counter", passed)
    return passed


def test_plain_lines_come_after_a_second_and_then_every_ten(seconds):
    text = io.StringIO()
    with PlainProgress(text).stage("reading", 3000, "actions") as stage:
        for _ in range(25):
            seconds.now += 0.5
            stage.advance(100)
    assert text.getvalue().splitlines() == [
        "reading: 200 of 3,000 actions, 200/s, 14 s left",
        "reading: 2,200 of 3,000 actions, 200/s, 4 s left",
        "reading: 2,500 actions in 12.5 s, 200/s",  # the total was an estimate
    ]


def test_what_was_done_before_counts_in_the_total_and_not_in_the_rate(seconds):
    text = io.StringIO()
    with PlainProgress(text).stage("training", 1000, "steps", 900) as stage:
        seconds.now += 2
        stage.show("loss 0.5")
        stage.advance(20)
        stage.say("a line that stays")
    assert text.getvalue().splitlines() == [
        "training: 920 of 1,000 steps, 8 s left, loss 0.5",
        "a line that stays",
        "training: 20 steps in 2.0 s, 10/s",
    ]
    text = io.StringIO()
    with PlainProgress(text).stage("training", 1000, "steps", 1000):
        seconds.now += 2
    assert text.getvalue() == "", "nothing was done"


def test_the_rate_after_an_evaluation_does_not_count_its_time(seconds, capsys):
    progress = StepProgress(100, 0, active=True)
    for step in range(1, 31):
        if step == 16:
            with progress.pause():
                seconds.now += 500
                progress.say("epoch 1  test")
        seconds.now += 0.5
        progress.update(0, 2, step, 1.25, samples=128, actions=1000)
        assert progress.window.samples_per_s == pytest.approx(256)
        assert progress.window.actions_per_s == pytest.approx(2000)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    rates = "epoch 1/2, loss 1.2500, 256 samples/s, 2,000 tokens/s"
    assert lines[0] == f"training: 2 of 100 steps, 49 s left, {rates}"
    assert lines[1] == "epoch 1  test"
    assert lines[2] == f"training: 16 of 100 steps, 44:27 left, {rates}", "evaluations will come again"
    assert lines[-1] == "training: 30 steps in 8:35, 0.058/s"


def test_a_run_writes_rates_without_its_evaluations(seconds, tmp_path, monkeypatch):
    """Steps of a second and evaluations of an hour: timing.jsonl has the steps' rate."""
    make_dataset(tmp_path / "data")
    file = write_config(tmp_path, tmp_path / "data", tmp_path / "run")
    evaluate, step = Evaluation.run, Trainer.step
    monkeypatch.setattr(Evaluation, "run", lambda *a, **k: (seconds_pass(3600), evaluate(*a, **k))[1])
    monkeypatch.setattr(Trainer, "step", lambda *a, **k: (seconds_pass(1), step(*a, **k))[1])

    def seconds_pass(number):
        seconds.now += number

    job.run(configs.load(file, ["eval.every_steps=3", "eval.baselines=[popularity]", "train.epochs=1"]))
    *rows, epoch = read_rows(RunFolder(tmp_path / "run").timing)
    assert epoch["epoch"] == 0 and epoch["epoch_s"] >= 0 and epoch["peak_mib"] > 0 and epoch["trained"] > 0
    assert len(rows) == 10 and {row["samples_per_s"] for row in rows[1:]} == {
        16.0
    }  # before the first there is none


def test_other_ranks_are_quiet(capsys):
    progress = StepProgress(100, 0, active=False)
    progress.update(0, 1, 1, 1.0, 128, 1000)
    progress.say("nothing")
    progress.close()
    assert capsys.readouterr().out == "" and progress.window.samples_per_s > 0


def test_a_bar_shows_its_rate_after_one_advance(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console",
        lambda **_: Console(file=screen, force_terminal=True, width=80, color_system=None),
    )
    with BarProgress().stage("scoring", 200, "users [b]") as stage:
        stage.advance(120)
        stage.bar.refresh()
    shown = screen.getvalue()
    assert re.search(r"scoring .*120 of 200 users \[b\], [\d,]+/s, 0 s left", shown)
    assert re.search(r"scoring .*120 users \[b\] in 0\.\d s, [\d,]+/s", shown)
    assert "…" not in shown


def test_a_narrow_terminal_cuts_the_end_of_the_status(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console",
        lambda **_: Console(file=screen, force_terminal=True, width=60, color_system=None),
    )
    with BarProgress().stage("training", 100, "steps") as stage:
        stage.show("epoch 1/1, loss 10.0129, 2,340 samples/s")
        stage.advance(40)
        stage.bar.refresh()
    assert re.search(r"training     [━╺╸ ]+ 40 of 100 steps, 0 s left, ep…", screen.getvalue())
