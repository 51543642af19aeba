"""CSV that isn't as it should be: quotes left open, other characters before them, marks, blank lines, names again."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from gr.data.making import csv_quotes
from gr.data.making.csv_files import line_of, read_csv
from gr.data.making.csv_quotes import ClosedQuotes
from gr.data.making.files import find_files
from gr.data.making.schema import Csv
from tests.unit.logs_common import ASIDE, COLUMNS, NOW, make, refusal, write_text

HEAD = "u,i,t,q\n"
WITH_TEXT = {"columns": {**COLUMNS, "fields": {"q": "q"}}}
BROKEN = "has quotes that aren't closed on their line, or text after a closing one"
FIX = "set csv.escape, csv.newlines_in_values or csv.quote if values are written so"


def well_formed(line: str, escape: str) -> bool:
    """Whether a line of values, cut at commas, closes its quotes; character by character."""
    state = "start"  # of a value; or inside of one without quotes, of one with, or after the closing one
    at = 0
    while at < len(line):
        c = line[at]
        if escape and c == escape and state != "closed":
            if at + 1 == len(line):
                return False
            at, state = at + 1, "quoted" if state == "quoted" else "plain"
        elif state == "quoted":
            if line[at : at + 2] == '""':
                at += 1
            elif c == '"':
                state = "closed"
        elif c == ",":
            state = "start"
        elif state == "closed":
            return False
        elif state == "start":
            state = "quoted" if c == '"' else "plain"
        at += 1
    return state != "quoted"


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.text('a",\\', max_size=9), min_size=1, max_size=6),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    last=st.booleans(),
    escape=st.sampled_from(["", "\\"]),
    piece=st.sampled_from([1, 5, 1000]),
)
def test_lines_that_break_are_found_whatever_the_pieces(lines, end, last, escape, piece):
    content = end.join(lines) + (end if last else "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_quotes, "PIECE_BYTES", piece)
        closed = ClosedQuotes(pa.BufferReader(content.encode()), ",", '"', escape, 3)
        found = closed.read().decode().split(end)
    expected = content.split(end)
    assert len(found) == len(expected)
    for line, was in zip(found, expected):
        if well_formed(was, escape):
            assert line == was
        else:
            assert line.count(",") == 3 and closed.original(line) == was


@pytest.mark.parametrize("form", [{}, {"escape": "\\"}])
def test_what_begins_as_a_mark_does_is_a_line_of_its_own(tmp_path, form):
    """Zeros stand first in what comes in the place of a broken line."""
    lines = ["u,i,t", '7,"open,1', "\0x,1,2,3,4", "\0,1,2,3,4", "\0" + "0,1,2,3,4", "7,8,9"]
    (file,) = find_files(str(write_text(tmp_path, "\n".join(lines) + "\n")))
    stream = read_csv(file, Csv(**form), ["u"])
    assert sum(batch.num_rows for batch in stream.batches) == 1
    found = sorted((bad.record, bad.text, bad.problem) for bad in stream.malformed)
    too_many = "has 5 columns instead of 3"
    assert found == [(n, lines[n + 1], too_many if n else BROKEN) for n in range(4)]


def test_a_file_without_ends_of_lines_is_not_gathered(monkeypatch):
    monkeypatch.setattr(csv_quotes, "PIECE_BYTES", 1000)
    monkeypatch.setattr(csv_quotes, "LONGEST", 5000)
    content = b"7" * 50_000 + b'"\n1,2\n'
    source = pa.BufferReader(content)
    closed = ClosedQuotes(source, ",", '"', "", 3)
    assert closed.read(10) == b"7" * 10 and source.tell() < 10_000
    rest = closed.read()
    assert rest.startswith(b"7" * 45_000) and rest.endswith(b"\n1,2\n")


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.text('a",', max_size=7), min_size=1, max_size=6))
def test_a_line_is_a_record(tmp_path_factory, lines):
    """None is swallowed by another one: what Arrow reads and what is left out are all lines that aren't blank."""
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    file.write_text("\n".join(lines) + "\n")
    form = Csv(names=["x", "y"])
    (found,) = find_files(str(file))
    stream = read_csv(found, form, ["x"])
    rows = sum(batch.num_rows for batch in stream.batches)
    records = sorted([*(stream.record(n) for n in range(rows)), *(bad.record for bad in stream.malformed)])
    filled = [n for n, line in enumerate(lines, 1) if line]
    assert records == list(range(len(filled))) and [line_of(found, form, r) for r in records] == filled
    for bad in stream.malformed:
        assert bad.text == lines[filled[bad.record] - 1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_quote_left_open_swallows_no_action(tmp_path, encoding):
    text = f'{HEAD}1,5,{NOW},"open\n\n1,6,{NOW + 1},5" screen\n1,7,{NOW + 2},"a, ""b"""\n'
    file = tmp_path / "log.csv"
    file.write_bytes(text.encode(encoding))
    form = {**WITH_TEXT, "csv": {"encoding": encoding}}
    assert refusal(file, tmp_path / "out", **form) == (
        f"'{file}', line 2: '1,5,{NOW},\"open' {BROKEN}; {FIX}, {ASIDE}"
    )
    made = make(file, tmp_path / "out", on_bad_rows="quarantine", **form)
    assert made.rows == {1: [(6, NOW + 1), (7, NOW + 2)]} and made.column("q") == {1: ['5" screen', 'a, "b"']}
    assert made.quarantined == {"quotes that aren't closed on their line, or text after a closing one": 1}
    assert made.facts["stages"][0]["actions"] == 3


def test_a_backslash_before_quotes_is_said_and_read(tmp_path):
    file = write_text(tmp_path, f'{HEAD}1,5,{NOW},"say \\"hi\\", now"\n1,6,{NOW + 1},plain\n')
    assert f"; {FIX}" in refusal(file, tmp_path / "out", **WITH_TEXT)
    made = make(file, tmp_path / "out", csv={"escape": "\\"}, **WITH_TEXT)
    assert made.column("q") == {1: ['say "hi", now', "plain"]}


def test_values_of_several_lines_are_asked_for(tmp_path):
    file = write_text(tmp_path, f'{HEAD}1,5,{NOW},"a\nb"\n1,6,{NOW + 1},c\n')
    assert f"line 2: '1,5,{NOW},\"a' {BROKEN}" in refusal(file, tmp_path / "out", **WITH_TEXT)
    made = make(file, tmp_path / "out", csv={"newlines_in_values": True}, **WITH_TEXT)
    assert made.column("q") == {1: ["a\nb", "c"]}


@pytest.mark.parametrize(
    "head",
    ["\ufeffu,i,t", '\ufeff"u","i","t"', "\n\nu,i,t", '"u","i","t","two\nlines"', "u,i,t\r"],
)
def test_headers_of_every_kind(tmp_path, head):
    more = "," * head.count("lines")
    file = write_text(tmp_path, f"{head}\n1,5,{NOW}{more}\n\n1,x,{NOW}{more}\n")
    said = refusal(file, tmp_path / "out", item_ids="integer")
    line = len(file.read_bytes().split(b"\n")) - 1
    assert said.startswith(f"'{file}', line {line}, column 'i': 'x' is not an integer id")
    assert make(file, tmp_path / "out").rows == {1: [("5", NOW), ("x", NOW)]}


def test_names_that_come_again_are_no_action(tmp_path):
    """Files put together, and a header where csv.names says that there is none."""
    columns = {"user": "user", "item": "item"}
    file = write_text(tmp_path, "user,item\na,x\nuser,item\nb,user\n")
    where = f"'{file}', line 3: 'user,item' has the columns' names again"
    fix = "leave csv.names out if each file names its columns"
    assert refusal(file, tmp_path / "out", columns=columns) == f"{where}; {fix}, {ASIDE}"
    made = make(file, tmp_path / "out", columns=columns, on_bad_rows="quarantine")
    assert made.rows == {"a": [("x",)], "b": [("user",)]} and made.quarantined == {"names of the columns": 1}
    form = {"columns": columns, "csv": {"names": ["user", "item"]}}
    assert refusal(file, tmp_path / "no", **form).startswith(f"'{file}', line 1: 'user,item' has the")
    again = write_text(tmp_path, "user,item\n7,8\nuser,item\n9,8\n")  # integers, names aside
    made = make(again, tmp_path / "out", columns=columns, on_bad_rows="quarantine")
    assert made.rows == {7: [(8,)], 9: [(8,)]}


def test_an_ending_in_capitals_is_unpacked_too(tmp_path):
    file = tmp_path / "LOG.CSV.GZ"
    file.write_bytes(gzip.compress(f"u,i,t\n1,5,{NOW}\n".encode()))
    assert make(file, tmp_path / "out").rows == {1: [(5, NOW)]}
