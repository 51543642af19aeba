"""Progress says how far, how fast and how long, on a terminal and elsewhere, from the first advance on."""

from __future__ import annotations

import io
import re

from rich.console import Console

from gr import progress
from gr.progress import BarProgress, PlainProgress, clock


def test_clock():
    assert [clock(s) for s in (0, 59.4, 59.6, 3599.4, 3722)] == ["0 s", "59 s", "1:00", "59:59", "1:02:02"]


def test_plain_lines(monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    text = io.StringIO()
    with PlainProgress(text).stage("reading", 3000, "actions") as stage:
        stage.advance(1000)
        stage.advance(1500)
    lines = text.getvalue().splitlines()
    assert re.fullmatch(r"reading: 1,000 of 3,000 actions, [\d,]+/s, \d+ s left", lines[0])
    assert re.fullmatch(r"reading: 2,500 actions in 0\.\d s, [\d,]+/s", lines[2]), "the total was an estimate"


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
