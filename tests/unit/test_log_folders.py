"""Folders as Spark and Hive write them: order by number, columns in names, parts without an ending, tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gr.data.making.files import natural
from tests.unit.logs_common import COLUMNS, NOW, make, refusal, write, write_text

ASIDE_TOO = {"on_bad_rows": "quarantine"}


def with_fields(**fields: object) -> dict[str, object]:
    return {**COLUMNS, "fields": fields}


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("glob", ["", "/*/part-*.parquet"])
def test_files_are_in_the_order_of_their_numbers(tmp_path, timed, glob):
    for day in (2, 10, 1):
        for part in (1, 10, 2):
            name = f"day-{day}/part-{part}.parquet"
            write(tmp_path / "log", name, i=[100 * day + part], t=[NOW] if timed else None)
    columns = COLUMNS if timed else {"user": "u", "item": "i"}
    made = make(f"{tmp_path}/log{glob}", tmp_path / "out", columns=columns)
    assert [row[0] for row in made.rows[1]] == [101, 102, 110, 201, 202, 210, 1001, 1002, 1010]
    said = [
        f"no times: a user's order is that of the 9 files by the numbers in their names, from "
        f"'{tmp_path}/log/day-1/part-1.parquet' to '{tmp_path}/log/day-10/part-10.parquet', and of the rows in them"
    ]
    assert made.said == made.facts["assumptions"] == ([] if timed else said)


def test_natural_order():
    names = [
        "a",
        "a.csv",
        "a1",
        "a01",
        "a2",
        "a10",
        "a10b",
        "a/b",
        "a-1/b",
        "b",
        "2024-1-2",
        "2024-01-10",
        "",
    ]
    assert sorted(names, key=natural) == [
        "", "2024-1-2", "2024-01-10", "a", "a/b", "a01", "a1", "a2", "a10", "a10b", "a-1/b", "a.csv", "b",
    ]  # fmt: skip


# -- columns in names --------------------------------------------------------------------------------------------------


def hive(folder: Path, *names: str, **columns: object) -> Path:
    """A file in each folder, whose item is the folder's number."""
    for n, name in enumerate(names, 1):
        write(folder, f"{name}/part-0.parquet", i=[n], **columns)
    return folder


def test_folders_as_fields(tmp_path):
    log = hive(
        tmp_path / "log",
        "dt=2024-01-31/hour=08",
        "dt=2024-02-01/hour=9",
        "dt=__HIVE_DEFAULT_PARTITION__/hour=10",
    )
    columns = with_fields(dt="dt", hour="hour", n={"column": "hour", "type": "integer"})
    made = make(log, tmp_path / "out", columns=columns)
    fields = ("dt", "hour", "n")
    assert [made.column(f)[1] for f in fields] == [
        ["2024-01-31", "2024-02-01", ""],
        ["08", "9", "10"],
        [8, 9, 10],
    ]


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("h=8", "h=10"), [8, 10]),
        (("h=-8", "h=0"), [-8, 0]),
        (("h=8", "h=08"), ["8", "08"]),
        (("h=8", "h=__HIVE_DEFAULT_PARTITION__"), ["8", ""]),
        (("h=8", "h="), ["8", ""]),
        (("h=a%2Fb%3A%20c", "h=caf%C3%A9"), ["a/b: c", "café"]),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_types_of_columns_in_names(tmp_path, names, values, ending):
    for n, name in enumerate(names, 1):
        if ending == "parquet":
            write(tmp_path / "log", f"{name}/p.parquet", i=[n], t=[n])
        else:
            write_text(tmp_path / "log", f"u,i,t\n1,{n},{n}\n", f"{name}/p.csv")
    made = make(tmp_path / "log", tmp_path / "out", columns=with_fields(h="h"))
    assert made.column("h") == {1: values}


def test_folders_as_user_item_time_type_and_value(tmp_path):
    log = hive(tmp_path / "a", "user=8/kind=buy/v=1.5", "user=10/kind=ev%20ent/v=true", u=None)
    columns = {"user": "user", "item": "i", "time": "t", "action_type": "kind", "value": "v"}
    made = make(log, tmp_path / "out", columns=columns)
    assert made.rows == {8: [(1, NOW)], 10: [(2, NOW)]} and made.column("value") == {8: [1.5], 10: [1.0]}
    assert made.dataset.manifest.action_type_names == ["buy", "ev ent"]
    log = hive(tmp_path / "b", "u=8", "u=008", u=None)  # one that is no plain integer makes all of them text
    assert set(make(log, tmp_path / "out").rows) == {"8", "008"}
    log = hive(tmp_path / "c", "u=8", "u=__HIVE_DEFAULT_PARTITION__", "u=", u=None)
    made = make(log, tmp_path / "out", **ASIDE_TOO)
    assert set(made.rows) == {8} and made.quarantined == {"u: missing": 2}
    log = hive(tmp_path / "d", "t=2024-01-31", "t=2024-01-01", t=None)
    made = make(log, tmp_path / "out", time_unit="iso")
    assert made.rows == {1: [(2, 1704067200), (1, 1706659200)]}
    assert "'2024-01-01' is not a whole number of time_unit 's'; set time_unit: iso" in refusal(
        log, tmp_path / "no"
    )


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_all_columns_in_names(tmp_path, ending):
    for name in ("u=1/i=5/t=4", "u=1/i=6/t=3"):
        if ending == "parquet":
            write(tmp_path / "log", f"{name}/p.parquet", u=None, i=None, t=None, x=[1, 2])
        else:
            write_text(tmp_path / "log", "x,y\n1,2\n1,2\n", f"{name}/p.csv")
    assert make(tmp_path / "log", tmp_path / "out").rows == {1: [(6, 3), (6, 3), (5, 4), (5, 4)]}


def test_names_and_files_together(tmp_path):
    log = hive(tmp_path / "log", "dt=a")
    write(log, "dt=b/part-0.parquet", i=[2], dt=["own"])
    made = make(log, tmp_path / "out", columns=with_fields(dt="dt"))
    assert made.column("dt") == {1: ["a", "own"]}
    assert made.said == ["column 'dt' is in the files and in the names of their folders: the files' is read"]
    one = make(log / "dt=a" / "part-0.parquet", tmp_path / "out", columns=with_fields(dt="dt"))
    assert one.column("dt") == {1: ["a"]}
    write(log, "part-1.parquet", i=[3])
    said = f"'{log}/part-1.parquet' has no column 'dt'"
    assert refusal(log, tmp_path / "no", columns=with_fields(dt="dt")).startswith(said)
    said = f"'{log}/dt=a/part-0.parquet' has no column 'dtt': did you mean 'dt'?"
    assert refusal(log, tmp_path / "no", columns=with_fields(dt="dtt")) == said


def test_a_glob_may_name_folders(tmp_path):
    log = hive(tmp_path / "log", "dt=1", "dt=2", "dt=10")
    write_text(log, "broken", "_temporary/part-0.parquet")
    for glob in ("*", "dt=*", "dt=*/*"):
        assert make(f"{log}/{glob}", tmp_path / "out", columns=with_fields(dt="dt")).column("dt") == {
            1: [1, 2, 10]
        }
    assert make(f"{log}/dt=1*", tmp_path / "out").rows == {1: [(1, NOW), (3, NOW)]}


def test_bad_rows_show_the_folders_column(tmp_path):
    write(tmp_path / "log", "dt=a%20b/part-0.parquet", u=[1, None])
    made = make(tmp_path / "log", tmp_path / "out", columns=with_fields(dt="dt"), **ASIDE_TOO)
    [row] = pq.read_table(made.dataset.path / "quarantine").to_pylist()
    assert json.loads(row["record"]) == {"u": None, "i": 2, "t": NOW + 1, "dt": "a b"}


# -- what is data ------------------------------------------------------------------------------------------------------


def parts(folder: Path, *names: str) -> Path:
    """Parquet files without an ending, and what Spark writes beside them."""
    for n, name in enumerate(names, 1):
        write(folder, name, i=[n])
        write_text(folder, "crc", f".{name}.crc")
    write_text(folder, "", "_SUCCESS")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("part-00000-1c9f-c000", "part-00001-1c9f-c000"),
        ("000000_0", "000001_0"),
        ("part-0-a.c000", "part-1-a.c000"),
    ],
)
def test_parts_without_an_ending(tmp_path, names):
    log = parts(tmp_path / "log", *names)
    expected = {1: [(1, NOW), (2, NOW)]}
    assert make(log, tmp_path / "out", format="parquet").rows == expected
    assert make(f"{log}/*", tmp_path / "out", format="parquet").rows == expected
    listed = ", ".join(f"'{n}'" for n in names)
    assert refusal(log, tmp_path / "no") == (
        f"no data file at '{log}' by the names ({listed}): set format to parquet or csv if these are data, or name "
        "them by a glob"
    )
    assert refusal(log / names[0], tmp_path / "no").endswith("set format to parquet or csv")


def test_parts_of_text_without_an_ending(tmp_path):
    write_text(tmp_path / "log", "1\x012\x013\n", "000000_0")
    (tmp_path / "log" / "000001_0.gz").write_bytes(gzip.compress(b"1\x015\x014\n"))
    form = {"delimiter": "\x01", "names": ["u", "i", "t"]}
    assert make(tmp_path / "log", tmp_path / "out", format="csv", csv=form).rows == {1: [(2, 3), (5, 4)]}


def test_nothing_is_left_out_without_a_word(tmp_path):
    log = parts(tmp_path / "log", "part-0")
    write(log, "a.parquet", i=[7])
    write_text(log, "# notes", "README.md")
    made = make(log, tmp_path / "out")
    assert made.rows == {1: [(7, NOW)]}
    assert made.said == [
        f"left out of '{log}', not data by their names: 'README.md', 'part-0'; set format, or name the files by a "
        "glob, if these are data"
    ]
    made = make(log, tmp_path / "out", format="parquet")
    assert made.rows == {1: [(7, NOW), (1, NOW)]} and "'README.md'; set format" in made.said[0]
    write_text(log, "", "part-1")  # damaged, or not written to its end
    assert refusal(log, tmp_path / "no", format="parquet").startswith(
        f"cannot read '{log}/part-1' as Parquet"
    )


@pytest.mark.parametrize(("folder", "kind"), [("_delta_log", "Delta"), (".hoodie", "Hudi")])
def test_tables_of_versions_are_refused(tmp_path, folder, kind):
    log = hive(tmp_path / "log", "dt=a")
    write_text(log, "{}", f"{folder}/00000.json")
    assert refusal(log, tmp_path / "no").startswith(
        f"'{log}' is a {kind} table, whose folder holds rows that were"
    )
    assert make(f"{log}/*/*.parquet", tmp_path / "out").rows == {1: [(1, NOW)]}
