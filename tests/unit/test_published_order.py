"""Tables of several protocols: published figures beside one of them; the order of rows, decided over seeds or not."""

from __future__ import annotations

import pytest

from gr.train.reproduction.order import steps_of
from gr.train.reproduction.table import Measured, PublishedTable, Row, print_table, read_table

ROWS = [
    Row(name=name, config=f"{name}.yaml", published=published, source="x", valid=True)
    for name, published in (("low", {"auc/like": 0.7}), ("high", {"auc/like": 0.8}), ("own", {}))
]
TABLE = PublishedTable(
    dataset="ml-1m-ctr",
    columns=["auc/like"],
    rows=ROWS,
    protocols={"leaky": {"leaky": True}, "clean": {}},
    published_under="leaky",
)


def measured(figures):
    """figures: (protocol, row) -> a figure a seed."""
    found = []
    for (protocol, name), values in figures.items():
        row = TABLE.under(protocol, next(r for r in ROWS if r.name == name))
        rows = [{"auc/like": value, "epoch": 1} for value in values]
        found.append(Measured(row, last=rows, chosen=rows, selection="auc/like"))
    return found


def test_published_figures_stand_beside_their_own_protocol_alone(capsys):
    leaky, clean = (TABLE.under(protocol, ROWS[0]) for protocol in TABLE.protocols)
    assert (leaky.name, leaky.published) == ("low, leaky", {"auc/like": 0.7})
    assert (clean.name, clean.published, clean.protocol) == ("low, clean", {}, "clean")
    assert TABLE.under("", ROWS[0]) is ROWS[0]
    print_table(TABLE, measured({("leaky", "low"): [0.71], ("clean", "low"): [0.65]}))
    said = capsys.readouterr().out
    assert "low, leaky published" in said and "low, clean published" not in said


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        ([0.70, 0.71, 0.72], [0.80, 0.81, 0.83], "confirmed"),
        ([0.70, 0.71, 0.72], [0.60, 0.61, 0.63], "refuted"),
        ([0.70, 0.71, 0.72], [0.75, 0.70, 0.71], "undecided"),
        ([0.70], [0.80], "undecided"),  # one seed says nothing of its luck
    ],
)
def test_an_order_is_confirmed_refuted_or_undecided(low, high, verdict):
    found = measured({("clean", "low"): low, ("clean", "high"): high, ("clean", "own"): low})
    (step,) = steps_of(TABLE, found)
    assert (step.worse, step.better, step.verdict) == ("low, clean", "high, clean", verdict)
    assert step.published == pytest.approx(0.1) and (step.error is None) == (len(low) == 1)


def test_the_published_table_of_pre_ranking_is_read_and_its_order_is_the_papers():
    table = read_table("ml-1m-ctr")
    assert table.published_under == "leaky" and list(table.protocols) == ["leaky", "clean"]
    published = [row.published["auc/like"] for row in table.rows if row.published]
    assert len(published) == 9 and max(published) == 0.8974
