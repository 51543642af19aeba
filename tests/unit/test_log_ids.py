"""Ids, types and values are what was written, or refused: text, floats, empty ones, booleans, lists."""

from __future__ import annotations

import gzip
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.logs_common import ASIDE, COLUMNS, NOW, make, refusal, write, write_text

ASIDE_TOO = {"on_bad_rows": "quarantine"}
TYPED = {**COLUMNS, "action_type": "a"}


@pytest.mark.parametrize(
    "text",
    ["007", "08", "0x1F", "0X1f", "-0", "-07", "+7", " 7", "7 ", "1e3", "7.0", "٧", "9223372036854775808"],
)
@pytest.mark.parametrize(("column", "key"), [("i", "item_ids"), ("u", "user_ids"), ("a", "action_types")])
def test_text_among_integers_is_never_merged(tmp_path, text, column, key):
    write(tmp_path / "log", "a.parquet", u=[7, 8], i=[7, 8], a=[7, 31])
    write(
        tmp_path / "log",
        "b.parquet",
        **{"u": ["7", "8"], "i": ["7", "8"], "a": ["7", "31"], column: [text, "8"]},
    )
    said = refusal(tmp_path / "log", tmp_path / "out", columns=TYPED)
    assert said.startswith(f"'{tmp_path}/log/b.parquet', row group 0, row 0, column '{column}': {text!r} ")
    assert f"; set {key}: string if " in said and said.endswith(ASIDE)
    assert f"set {key}: string" in refusal(
        tmp_path / "log", tmp_path / "out", columns=TYPED, **{key: "integer"}
    )
    made = make(tmp_path / "log", tmp_path / "out", columns=TYPED, **{key: "string"})
    everything = {str(i) for rows in made.rows.values() for i, _ in rows} | {str(u) for u in made.rows}
    assert text in everything | set(made.dataset.manifest.action_type_names)
    aside = make(tmp_path / "log", tmp_path / "out", columns=TYPED, **ASIDE_TOO)
    assert sum(aside.quarantined.values()) == 1 and aside.dataset.actions == 3


def test_text_after_the_sample_of_a_csv(tmp_path):
    rows = "".join(f"{n % 9},{10 + n % 2},{n + 1}\n" for n in range(150_000))
    text = f"u,i,t\n{rows}3,0010,150001\n3,0x0B,150002\n"
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode(), 1))
    said = refusal(tmp_path / "log.csv.gz", tmp_path / "out")
    assert (
        "line 150002, column 'i': '0010' would become another id as an integer; set item_ids: string" in said
    )
    made = make(tmp_path / "log.csv.gz", tmp_path / "out", item_ids="string")
    assert set(made.dataset.catalogue["item_id"].to_pylist()) == {"10", "11", "0010", "0x0B"}


@pytest.mark.parametrize(("kind", "bits"), [(pa.float16(), 11), (pa.float32(), 24), (pa.float64(), 53)])
def test_integers_that_went_through_floats(tmp_path, kind, bits):
    for sign in (1, -1):
        values = np.array([sign * (2**bits - 1), sign * 2**bits, 3], kind.to_pandas_dtype())
        log = write(tmp_path, i=pa.array(values, kind))
        said = refusal(log, tmp_path / "no")
        assert f"row 1, column 'i': {float(values[1])} is a float{kind.bit_width} of 2^{bits} or more" in said
        assert "write the column as integers or text" in said
        for form in ({}, {"item_ids": "string"}):
            made = make(log, tmp_path / "out", **ASIDE_TOO, **form)
            assert [str(i) for i, _ in made.rows[1]] == [str(sign * (2**bits - 1)), "3"]


def test_fields_keep_large_integers(tmp_path):
    columns = {**COLUMNS, "fields": {"f": "f"}}
    write(tmp_path / "log", "a.parquet", f=[2**53 + 1, 5])
    assert make(tmp_path / "log", tmp_path / "out", columns=columns).column("f") == {1: [2**53 + 1, 5]}
    write(tmp_path / "log", "b.parquet", f=[1.5])
    said = refusal(tmp_path / "log", tmp_path / "no", columns=columns)
    assert "column 'f': 9007199254740993 becomes a float64 of 2^53 or more" in said
    fields = {"f": {"column": "f", "type": "float"}}  # asked for
    make(tmp_path / "log", tmp_path / "out", columns={**COLUMNS, "fields": fields})
    fields = {"f": {"column": "f", "type": "integer"}}
    log = write(tmp_path, f=[2.0**60])
    assert "is a float64 of 2^53 or more" in refusal(
        log, tmp_path / "no", columns={**COLUMNS, "fields": fields}
    )
    exact = pa.array([Decimal(2**60 + 1)], pa.decimal128(38, 0))
    assert make(write(tmp_path, f=exact), tmp_path / "out", columns=columns).column("f") == {
        1: [str(2**60 + 1)]
    }
    exact = pa.array([Decimal(2**40 + 1)], pa.decimal128(18, 0))
    assert make(write(tmp_path, f=exact), tmp_path / "out", columns=columns).column("f") == {1: [2**40 + 1]}


def test_decimal_ids(tmp_path):
    ids = pa.array([Decimal(2**60 + 1), Decimal(2**70)], pa.decimal128(30, 0))
    assert make(write(tmp_path, i=ids), tmp_path / "out", **ASIDE_TOO).rows == {1: [(2**60 + 1, NOW)]}
    halves = pa.array([Decimal("5.00"), Decimal("5.50")])
    made = make(write(tmp_path, i=halves), tmp_path / "out", item_ids="string")
    assert made.rows == {1: [("5", NOW), ("5.50", NOW + 1)]}


@pytest.mark.parametrize("empty", ["", " ", "\t "])
@pytest.mark.parametrize("column", ["u", "i", "a"])
def test_empty_ids_are_missing(tmp_path, empty, column):
    names = {"u": ["x", "x"], "i": ["p", "q"], "a": ["k", "l"], column: [empty, "z"]}
    log = write(tmp_path, **names)
    said = f"'{log}', row group 0, row 0, column '{column}': the value is missing; {ASIDE}"
    assert refusal(log, tmp_path / "out", columns=TYPED) == said
    made = make(log, tmp_path / "out", columns=TYPED, **ASIDE_TOO)
    assert made.quarantined == {f"{column}: missing": 1} and made.dataset.actions == 1


def test_empty_ids_of_csv_and_catalogue(tmp_path):
    log = write_text(tmp_path, 'u,i,t\na,x,1\n,y,2\nNA,z,3\n"",z,3\n')
    made = make(log, tmp_path / "out", csv={"null_values": ["NA"]}, **ASIDE_TOO)  # '' is not among them
    assert made.rows == {"a": [("x", 1)]} and made.quarantined == {"u: missing": 3}
    pq.write_table(pa.table({"id": ["x", ""]}), tmp_path / "items.parquet")
    catalogue = {"path": str(tmp_path / "items.parquet"), "item": "id"}
    said = f"'{tmp_path}/items.parquet', row 1, column 'id': the value is missing; correct the catalogue"
    assert refusal(write(tmp_path, i=["x"]), tmp_path / "no", catalogue=catalogue) == said


def test_catalogue_ids_are_not_merged(tmp_path):
    items, log = tmp_path / "items.parquet", write(tmp_path, i=[7])
    catalogue = {"path": str(items), "item": "id"}
    pq.write_table(pa.table({"id": ["7", "007"]}), items)
    assert refusal(log, tmp_path / "out", catalogue=catalogue) == (
        f"'{items}', row 1, column 'id': '007' would become another id as an integer, where the log has integers; "
        "correct the catalogue"
    )
    pq.write_table(pa.table({"id": [7.0, 2.0**53]}), items)
    assert "is a float64 of 2^53 or more" in refusal(log, tmp_path / "out", catalogue=catalogue)


@pytest.mark.parametrize("name", ["u.item", "items.txt", "items"])
def test_catalogue_format(tmp_path, name):
    file = write_text(tmp_path, "1|One\n2|Two\n", name)
    form = {"path": str(file), "item": "id", "csv": {"delimiter": "|", "names": ["id", "title"]}}
    log = write(tmp_path, i=[2, 1])
    made = make(log, tmp_path / "out", catalogue={**form, "format": "csv"})
    assert made.dataset.catalogue["title"].to_pylist() == ["One", "Two"]
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "items.parquet")
    write_text(tmp_path / "folder", "x", "README")
    (tmp_path / "items.parquet").rename(tmp_path / "folder" / "items.parquet")
    made = make(log, tmp_path / "out", catalogue={"path": str(tmp_path / "folder"), "item": "id"})
    assert made.said == [
        f"left out of '{tmp_path}/folder', not data by their names: 'README'; set catalogue.format, or name the files "
        "by a glob, if these are data"
    ]
    if name != "items.txt":
        assert refusal(log, tmp_path / "no", catalogue=form) == (
            f"'{file}' is neither .parquet nor .csv by its name: set catalogue.format to parquet or csv"
        )


def test_booleans(tmp_path):
    log = write(tmp_path, c=[True, False, None])
    assert (
        str(make(log, tmp_path / "out", columns={**COLUMNS, "value": "c"}).column("value")[1])
        == "[1.0, 0.0, nan]"
    )
    fields = {"c": "c", "n": {"column": "c", "type": "float"}}
    made = make(log, tmp_path / "out", columns={**COLUMNS, "fields": fields})
    assert made.column("c") == {1: ["true", "false", ""]} and str(made.column("n")[1]) == "[1.0, 0.0, nan]"
    made = make(log, tmp_path / "out", columns={**COLUMNS, "action_type": "c"}, **ASIDE_TOO)
    assert made.column("type") == {1: [1, 0]} and made.quarantined == {"c: missing": 1}
    assert made.dataset.manifest.action_type_names == ["false", "true"]
    text = write_text(tmp_path, "u,i,t,c\n1,1,1,True\n1,2,2,false\n1,3,3,\n1,4,4,yes\n")
    made = make(text, tmp_path / "out", columns={**COLUMNS, "value": "c"}, **ASIDE_TOO)
    assert str(made.column("value")[1]) == "[1.0, 0.0, nan]" and made.quarantined == {"c: is not a number": 1}
    assert "type bool cannot be used as item; map another column" in refusal(
        log, tmp_path / "no", columns={**COLUMNS, "item": "c"}
    )


def test_booleans_and_integers_are_not_the_same_types(tmp_path):
    write(tmp_path / "log", "a.parquet", a=[True])
    write(tmp_path / "log", "b.parquet", a=[1])
    assert refusal(tmp_path / "log", tmp_path / "out", columns=TYPED) == (
        f"'{tmp_path}/log/b.parquet', column 'a': type int64, where other files have bool; write all files with the "
        "same type"
    )


def test_values_that_32_bits_cannot_hold(tmp_path):
    columns = {**COLUMNS, "value": "v"}
    made = make(write(tmp_path, v=[2**24 + 1, 2**24, 3]), tmp_path / "out", columns=columns)
    assert made.column("value") == {1: [2.0**24, 2.0**24, 3.0]}
    assert (
        made.said
        == made.facts["doubts"]
        == [
            "column 'v': 1 integers have more digits than a value of 32 bits and were rounded: keep them as a field to "
            "have them exact"
        ]
    )
    made = make(write(tmp_path, v=[float("inf"), 1e300, 2.5]), tmp_path / "out", columns=columns, **ASIDE_TOO)
    assert made.quarantined == {"v: is not a finite number of 32 bits": 2}
    made = make(write(tmp_path, v=["", "2.5"]), tmp_path / "out", columns=columns)  # empty is missing
    assert str(made.column("value")[1]) == "[nan, 2.5]"


def test_a_row_a_user_is_refused_with_the_remedy(tmp_path):
    for nested in (
        [[1, 2]],
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array([[1]], pa.list_(pa.int64(), 1)),
    ):
        said = refusal(write(tmp_path, i=nested), tmp_path / "out")
        assert "cannot be used as item; the log has one row an action, so explode the lists first" in said
    said = refusal(write(tmp_path, i=[{"id": 1}]), tmp_path / "out")
    assert "cannot be used as item; write its parts as columns of their own" in said
    columns = {**COLUMNS, "fields": {"f": "f"}}
    assert "explode the lists first" in refusal(write(tmp_path, f=[["a"]]), tmp_path / "out", columns=columns)
    made = make(write_text(tmp_path, 'u,i,t\n1,"[1, 2]",1\n2,[4],2\n'), tmp_path / "out")  # lists in text
    assert made.said == made.facts["doubts"]
    assert "'[1, 2]' looks like a list, and is read as one id" in made.said[0]


def test_an_unsigned_id_that_no_integer_holds_is_said_to_be_too_large(tmp_path):
    file = write(tmp_path, "log.parquet", u=pa.array([7, 2**63 + 5], pa.uint64()))
    assert refusal(file, tmp_path / "out") == (
        f"'{file}', row group 0, row 1, column 'u': {2**63 + 5} is larger than any integer id, 2^63 - 1; "
        f"set user_ids: string if ids are text, {ASIDE}"
    )
    assert sorted(make(file, tmp_path / "out", user_ids="string").rows) == ["7", str(2**63 + 5)]
