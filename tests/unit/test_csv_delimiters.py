"""A repeated delimiter (``::``) is one only where nothing stands inside of it."""

from __future__ import annotations

import pytest

from gr.data.making import csv_files
from gr.data.making.csv_files import line_of, read_csv
from gr.data.making.files import find_files
from gr.data.making.schema import Csv
from gr.data.making.sources.base import make_source
from gr.errors import UserError

FORM = Csv(delimiter="::", names=["user", "item", "time"])
GOOD = [b"1", b"2", b"5", b"8"]
LINES = [
    "1::2::3",
    "1:9:2::4",
    "2::2::3",
    "7::7",
    "7:x7:x7",
    "5::2::3",
    "6::6::6::6",
    "6::6:",
    "8::2::",
    "9::9:9",
]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "log.dat").write_text("\n".join(LINES) + "\n")
    return find_files(str(tmp_path / "log.dat"))[0]


@pytest.mark.parametrize("block_bytes", [32, 2**20])
def test_rows_and_record_numbers(file, block_bytes):
    stream = read_csv(file, FORM, ["user", "time"], block_bytes)
    batches = list(stream.batches)
    assert all(batch.schema.names == ["user", "time"] for batch in batches)
    users = [user for batch in batches for user in batch.column("user").to_pylist()]
    assert users == GOOD
    for row, user in enumerate(users):
        record = stream.record(row)
        assert LINES[record].startswith(user.decode() + "::")
        assert line_of(file, FORM, record) == record + 1
    found = {bad.record: (bad.text, bad.problem) for bad in stream.malformed}
    assert {record: text for record, (text, _) in found.items()} == {n: LINES[n] for n in (1, 3, 4, 6, 7, 9)}
    assert found[1][1] == "has text inside of a delimiter '::'"
    assert found[3][1] == "has 2 columns instead of 3"
    assert len(stream.malformed) == 6, "each of them once"


@pytest.mark.parametrize("chunk_rows", [1, 100])
def test_preparing_counts_or_refuses_them(file, tmp_path, chunk_rows, monkeypatch):
    monkeypatch.setattr(csv_files, "BLOCK_BYTES", 32)
    schema = {
        "columns": {"user": "user", "item": "item"},
        "csv": {"delimiter": "::", "names": ["user", "item", "time"]},
        "chunk_rows": chunk_rows,
    }
    log = make_source("log", {**schema, "on_bad_rows": "quarantine"}).prepare(
        file.path, str(tmp_path / "out")
    )
    assert log.actions == 4 and log.manifest.provenance["quarantined"] == {"wrong number of columns": 6}
    with pytest.raises(UserError, match=r"log.dat', line \d+: '.*' has (text inside|2 columns)"):
        make_source("log", schema).prepare(file.path, str(tmp_path / "refused"))
