"""Published tables: figures beside their protocol, hypotheses decided over seeds or not, what is printed and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from gr.shipped import table_names
from gr.train.reproduction.hypotheses import print_hypotheses, to_json
from gr.train.reproduction.table import Measured, PublishedTable, Row, hypotheses_of, read_table
from gr.train.reproduction.transfer import read_transfer
from gr.train.reproduction.views import print_table, save_table

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
    (one,) = hypotheses_of(TABLE, found)
    assert (one.where, one.low, one.high, one.verdict) == ("clean", "low", "high", verdict)
    assert one.published == pytest.approx(0.1) and (one.error is None) == (len(low) == 1)


def test_a_tables_own_pairs_are_tested_by_every_column_each_in_its_own_sense(capsys):
    table = PublishedTable(
        dataset="x",
        columns=["auc/like", "ne/like", "hr@10/cold"],  # a figure that this data doesn't give
        rows=ROWS,
        hypotheses=[["high", "low"], ["low", "own"]],
    )
    low = [{"auc/like": 0.70, "ne/like": 0.9}, {"auc/like": 0.72, "ne/like": 0.8}]
    high = [{"auc/like": 0.80, "ne/like": 0.7}, {"auc/like": 0.83, "ne/like": 0.5}]
    found = [Measured(row, chosen=figures) for row, figures in zip(ROWS, (low, high))]  # "own" wasn't trained
    auc, ne = hypotheses_of(table, found)
    assert (auc.metric, auc.high, auc.verdict) == ("auc/like", "high", "confirmed")
    assert auc.measured == pytest.approx(0.105) and auc.error == pytest.approx(0.005)
    assert (ne.metric, ne.verdict) == ("ne/like", "confirmed")  # lower is better
    assert ne.measured == pytest.approx(0.25) and ne.error == pytest.approx(0.05)
    assert [row["verdict"] for row in to_json([auc, ne])] == ["confirmed", "confirmed"]
    print_hypotheses([auc, ne])
    said = capsys.readouterr().out
    assert "+0.1050 ±0.0050" in said and "+0.2500 ±0.0500" in said


@pytest.mark.parametrize("name", [name for name in table_names() if read_transfer(name) is None])
def test_the_pairs_of_a_shipped_table_are_rows_of_it(name):
    table = read_table(name)
    rows = {Path(row.config).stem for row in table.rows}
    assert {config for pair in table.hypotheses for config in pair} <= rows


def test_no_figure_of_a_wide_table_is_cut(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    columns = [f"{kind}/{task}" for task in ("click", "long_view", "like") for kind in ("auc", "gauc", "ne")]
    table = PublishedTable(dataset="x", columns=columns, rows=ROWS, costs=True)
    figures = {column: 0.5 + 0.0123 * place for place, column in enumerate(columns)}
    rows = [{**figures, "epoch": 1}, {**figures, "epoch": 2}]
    costs = [{"epoch_s": 61.5, "peak_mib": 1234.0, "trained": 828224}]
    found = [Measured(row, last=rows, chosen=rows, selection="auc/click", costs=costs) for row in ROWS]
    print_table(table, found)
    said = capsys.readouterr().out
    assert "…" not in said and max(map(len, said.splitlines())) <= 80
    for value in figures.values():
        assert said.count(f"{value:.4f} ±0.0000") == 2 * len(ROWS)
    assert said.count("828,224") == said.count("1,234") == len(ROWS)
    assert save_table(table, found, tmp_path).stat().st_size > 10_000 and (tmp_path / "table.json").is_file()


def test_the_published_table_of_pre_ranking_is_read_and_its_order_is_the_papers():
    table = read_table("ml-1m-ctr")
    assert table.published_under == "leaky" and list(table.protocols) == ["leaky", "clean"]
    published = [row.published["auc/like"] for row in table.rows if row.published]
    assert len(published) == 9 and max(published) == 0.8974
