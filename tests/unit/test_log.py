"""Reading logs: what is refused and in which words, what is put aside, how ids and times are understood."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.making.log import LogReader
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import LogSchema
from gr.data.making.sources.base import make_source
from gr.errors import UserError

COLUMNS = {"user": "u", "item": "i", "time": "t"}
ASIDE = "correct it, or say on_bad_rows=quarantine to put such rows aside"


def read(source: Path | str, **schema) -> pa.Table:
    reader = LogReader(str(source), LogSchema.model_validate({"columns": COLUMNS, **schema}))
    return pa.concat_tables(reader.tables(3, Quarantine(None)))


def message(source: Path | str, **schema) -> str:
    with pytest.raises(UserError) as error:
        read(source, **schema)
    return str(error.value)


def parquet(folder: Path, row_group: int = 4, **columns) -> Path:
    path = folder / "log.parquet"
    rows = len(next(iter(columns.values()), [0, 0]))
    whole = {"u": [1] * rows, "i": [2] * rows, "t": [3] * rows} | columns
    pq.write_table(pa.table(whole), path, row_group_size=row_group)
    return path


def csv(folder: Path, text: str, name: str = "log.csv") -> Path:
    (folder / name).write_bytes(text.encode("latin-1"))
    return folder / name


def test_parquet_bad_rows_are_named(tmp_path):
    path = parquet(tmp_path, u=[1, 2, 3, 4, 5, None, 7])
    assert message(path) == f"'{path}', row group 1, row 1, column 'u': the value is missing; {ASIDE}"
    path = parquet(tmp_path, i=["1", "2", "x3"])
    assert message(path, item_ids="integer") == (
        f"'{path}', row group 0, row 2, column 'i': 'x3' is not an integer id; "
        f"set item_ids: string if ids are text, {ASIDE}"
    )
    path = parquet(tmp_path, i=[1.0, 2.5, float("nan")])
    assert message(path) == (
        f"'{path}', row group 0, row 1, column 'i': 2.5 is not an integer id; "
        f"set item_ids: string if ids are text, {ASIDE}"
    )
    path = parquet(tmp_path, t=["1", "2", "yesterday"])
    assert message(path) == (
        f"'{path}', row group 0, row 2, column 't': 'yesterday' is not a whole number of time_unit 's'; "
        f"check time_unit, {ASIDE}"
    )
    assert message(parquet(tmp_path, t=["2024-01-01", "2024-13-01"]), time_unit="iso") == (
        f"'{path}', row group 0, row 1, column 't': '2024-13-01' is not a time like 2024-01-31T12:30:00; {ASIDE}"
    )
    path = parquet(tmp_path, t=[1_700_000_000_000])
    assert message(path) == (
        f"'{path}', row group 0, row 0, column 't': 1700000000000 is not before 2200-01-01 in time_unit 's'; "
        f"set time_unit: ms if it is 2023-11-14 22:13:20, {ASIDE}"
    )
    path = parquet(tmp_path, v=["1", "", "x"])
    assert message(path, columns={**COLUMNS, "value": "v"}) == (
        f"'{path}', row group 0, row 2, column 'v': 'x' is not a number; {ASIDE}"
    )


def test_csv_bad_rows_are_named_by_line(tmp_path):
    path = csv(tmp_path, "u,i,t\n1,2,3\n\n4,5,6\n7,,9\n")  # the blank line counts as a line, not as a row
    assert message(path) == f"'{path}', line 5, column 'i': the value is missing; {ASIDE}"
    path = csv(tmp_path, "u,i,t\n1,2,3\n4,5\n")
    assert message(path) == f"'{path}', line 3: '4,5' has 2 columns instead of 3; {ASIDE}"
    path = csv(tmp_path, "u,i,t\n1,a,3\n1,caf\xe9,3\n")
    assert message(path) == f"'{path}', line 3, column 'i': 'caf\\\\xe9' is not an id in UTF-8; {ASIDE}"
    path = csv(tmp_path, "1::2::3\n4::5::6::7\n")
    form = {"delimiter": "::", "names": ["u", "i", "t"]}
    assert message(path, csv=form) == f"'{path}', line 2: '4::5::6::7' has 4 columns instead of 3; {ASIDE}"


def test_bad_layout_is_named(tmp_path):
    path = parquet(tmp_path)
    assert (
        message(path, columns={"user": "uu", "item": "i"})
        == f"'{path}' has no column 'uu': did you mean 'u'?"
    )
    path = csv(tmp_path, "user,item,t\n1,2,3\n")
    assert message(path, columns={"user": "users", "item": "item"}) == (
        f"'{path}' has no column 'users': did you mean 'user'?"
    )
    path = parquet(tmp_path, u=[[1], [2]])
    assert message(path) == (
        f"'{path}', column 'u': type list<element: int64> cannot be used as user; "
        "the log has one row an action, so explode the lists first (explode in Spark and pandas, unnest in SQL), "
        "or prepare it as lists if a row is a user's"
    )
    path = parquet(tmp_path)
    assert message(path, time_unit="iso") == (
        f"'{path}', column 't': numbers, not text in time_unit 'iso'; set time_unit to s, ms, us or ns"
    )
    assert message(tmp_path / "none*.parquet") == (
        f"no data file at '{tmp_path}/none*.parquet': check the path or the glob"
    )
    csv(tmp_path, "u,i,t\n1,2,3\n")
    assert (
        message(tmp_path)
        == f"'{tmp_path}' holds both Parquet and CSV files: set format, or name them by a glob"
    )
    assert read(tmp_path, format="csv").num_rows == 1
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    assert message(tmp_path / "broken.parquet").startswith(
        f"cannot read '{tmp_path}/broken.parquet' as Parquet ("
    )
    assert "check the URL and its access" in message("nosuchscheme://bucket/x.parquet")
    path = csv(tmp_path, "", "empty.csv")
    assert message(path) == f"'{path}' is empty: remove it, or give the columns' names as csv.names"


def test_damaged_row_group_is_named(tmp_path):
    path = parquet(tmp_path, row_group=1000, i=list(range(3000)))
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    assert message(path).startswith(f"cannot read '{path}', row group 1, columns 'u', 'i', 't' (")
    assert message(path).endswith("): the file is damaged; write it again or leave it out")


def test_a_page_that_is_not_what_its_checksum_says_is_named(tmp_path):
    table = pa.table({"u": list(range(3000)), "i": [2] * 3000, "t": [3] * 3000})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[10_000] ^= 16
    path.write_bytes(data)
    assert message(path).startswith(f"cannot read '{path}', row group 0, columns 'u', 'i', 't' (")
    assert "CRC" in message(path) and message(path).endswith(
        "the file is damaged; write it again or leave it out"
    )


def test_quarantine_keeps_what_is_wrong_and_counts_it(tmp_path):
    text = "u,i,t\n1,2,10\n1,,20\nx,2,30\n1,3,soon\n1,4\n1,5,50\n"
    path = csv(tmp_path, text)
    options = {"columns": COLUMNS, "user_ids": "integer", "item_ids": "integer", "on_bad_rows": "quarantine"}
    dataset = make_source("log", options).prepare(str(path), str(tmp_path / "out"))
    assert dataset.catalogue["item_id"].to_pylist() == [2, 5]
    provenance = dataset.manifest.provenance
    assert provenance["quarantined"] == {
        "i: missing": 1,
        "t: is not a whole number of time_unit 's'": 1,
        "u: is not an integer id": 1,
        "wrong number of columns": 1,
    }
    assert [(s["stage"], s["actions"]) for s in provenance["stages"]] == [
        ("rows of the log", 6),
        ("quarantined", 2),
        ("read", 2),
        ("dataset", 2),
    ]
    rows = pq.read_table(tmp_path / "out" / "quarantine").sort_by("row").to_pylist()
    assert [(r["row"], r["column"], r["reason"]) for r in rows] == [
        (1, "i", "the value is missing"),
        (2, "u", "'x' is not an integer id"),
        (3, "t", "'soon' is not a whole number of time_unit 's'"),
        (4, None, "has 2 columns instead of 3"),
    ]
    assert json.loads(rows[1]["record"]) == {"u": "x", "i": "2", "t": "30"}
    assert rows[3]["record"] == "1,4" and {r["file"] for r in rows} == {str(path)}


def test_records_are_counted_with_the_malformed_ones(tmp_path):
    path = csv(tmp_path, "1,2\n1,1,1\n1\n\n1,1,1,1\n1,1,1\n1,,1\n2,2\n,1,1\n")
    options = {"columns": COLUMNS, "on_bad_rows": "quarantine", "csv": {"names": ["u", "i", "t"]}}
    make_source("log", options).prepare(str(path), str(tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out" / "quarantine").sort_by("row").to_pylist()
    assert [(r["row"], r["column"]) for r in rows] == [
        (0, None),
        (2, None),
        (3, None),
        (5, "i"),
        (6, None),
        (7, "u"),
    ]


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 1000])
def test_quarantine_does_not_depend_on_the_chunk(tmp_path, chunk_rows):
    users: list[str | None] = [str(n) if n % 7 else ("n/a" if n % 2 else None) for n in range(100)]
    path = parquet(tmp_path, row_group=13, u=users, i=list(range(100)))
    options = {
        "columns": COLUMNS,
        "user_ids": "integer",
        "on_bad_rows": "quarantine",
        "chunk_rows": chunk_rows,
    }
    dataset = make_source("log", options).prepare(str(path), str(tmp_path / "out"))
    assert dataset.actions == sum(n % 7 != 0 for n in range(100))
    rows = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert [r["row_group"] * 13 + r["row"] for r in rows] == list(range(0, 100, 7))


def test_all_rows_bad(tmp_path):
    path = parquet(tmp_path, u=pa.nulls(3, pa.int64()))
    with pytest.raises(UserError, match=r"has no valid action \(3 x u: missing\): check the source"):
        make_source("log", {"columns": COLUMNS, "on_bad_rows": "quarantine"}).prepare(
            str(path), str(tmp_path / "out")
        )
    assert [p.name for p in tmp_path.iterdir()] == ["log.parquet"]


def test_types_of_ids(tmp_path):
    assert read(csv(tmp_path, "u,i,t\n1,-5,1\n2,7,2\n"))["item"].to_pylist() == [-5, 7]
    assert read(csv(tmp_path, "u,i,t\n1,007,1\n2,7,2\n"))["item"].to_pylist() == ["007", "7"]
    assert read(csv(tmp_path, "u,i,t\n1,1,1\n"), item_ids="string")["item"].to_pylist() == ["1"]
    assert read(parquet(tmp_path, u=[3.0, 4.0]))["user"].to_pylist() == [3, 4]
    encoded = pa.array(["b", "a", "b"]).dictionary_encode()
    assert read(parquet(tmp_path, u=encoded))["user"].to_pylist() == ["b", "a", "b"]
    assert read(parquet(tmp_path, u=pa.array([1, 2], pa.uint16())))["user"].type == pa.int64()
    assert read(parquet(tmp_path, u=[1, 2]), user_ids="string")["user"].to_pylist() == ["1", "2"]


def test_ids_of_float_columns_are_the_integers_they_were(tmp_path):
    """pandas makes floats of integers where one is missing."""
    path = parquet(tmp_path, u=[12345678901.0, 2.0, 1.5])
    assert read(path, user_ids="string")["user"].to_pylist() == ["12345678901", "2", "1.5"]
    path = parquet(tmp_path, u=[1.0, float("nan")])
    assert message(path, user_ids="string") == (
        f"'{path}', row group 0, row 1, column 'u': the value is missing; {ASIDE}"
    )


def test_types_come_from_files_that_have_them(tmp_path):
    """Not from an empty file's, which may be anything, nor from a column of nulls."""
    text = pa.array([], pa.string())
    pq.write_table(pa.table({"u": text, "i": text, "t": text, "v": text}), tmp_path / "a.parquet")
    nothing = pa.nulls(1)
    pq.write_table(pa.table({"u": [1], "i": [2], "t": [3], "v": nothing}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"u": [1], "i": [2], "t": [3], "v": [0.5]}), tmp_path / "c.parquet")
    table = read(tmp_path, columns={**COLUMNS, "value": "v", "fields": {"v": "v"}})
    assert table["user"].to_pylist() == [1, 1]
    assert str(table["value"].to_pylist()) == str(table["field.v"].to_pylist()) == "[nan, 0.5]"


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [([1], [2.5], [1.0, 2.5]), ([2.5], [1], [2.5, 1.0]), ([1], ["x"], ["1", "x"]), ([1], [2], [1, 2])],
)
def test_fields_have_one_type_in_all_files(tmp_path, first, second, both):
    for name, values in (("a", first), ("b", second)):
        pq.write_table(pa.table({"u": [1], "i": [2], "t": [3], "f": values}), tmp_path / f"{name}.parquet")
    table = read(tmp_path, columns={**COLUMNS, "fields": {"f": "f"}})
    assert table["field.f"].to_pylist() == both


def test_large_integers_are_numbers(tmp_path):
    path = parquet(tmp_path, v=[20_000_001, 2**60 + 1])
    columns = {**COLUMNS, "value": "v", "fields": {"v": {"column": "v", "type": "float"}}}
    table = read(path, columns=columns)
    assert table["value"].to_pylist() == [20_000_000.0, 2.0**60]
    assert table["field.v"].to_pylist() == [20_000_001.0, 2.0**60]


def test_columns_of_one_name_are_refused(tmp_path):
    twice = f"'{tmp_path}/log.%s' has more than one column 'u': give each a name of its own"
    columns = {"user": "u", "item": "i"}
    pq.write_table(pa.table([[1], [2], [3]], names=["u", "u", "i"]), tmp_path / "log.parquet")
    assert message(tmp_path / "log.parquet", columns=columns) == twice % "parquet"
    assert message(csv(tmp_path, "u,u,i\n1,2,3\n"), columns=columns) == twice % "csv"
    unread = read(csv(tmp_path, "u,i,x,x\n1,7,2,3\n"), columns=columns)
    assert unread.to_pydict() == {"user": [1], "item": [7]}


def test_times_beyond_the_resolution_are_bad_rows(tmp_path):
    pq.write_table(
        pa.table({"u": [1], "i": [2], "t": pa.array([0], pa.timestamp("ns"))}), tmp_path / "a.parquet"
    )
    late = pa.array([253_370_764_800], pa.timestamp("s"))  # the year 9999 has no nanoseconds in 64 bits
    pq.write_table(pa.table({"u": [1], "i": [2], "t": late}), tmp_path / "b.parquet")
    assert message(tmp_path) == (
        f"'{tmp_path}/b.parquet', row group 0, row 0, column 't': '9999-01-01 00:00:00.000' is beyond the "
        f"years that ns in 64 bits reach; {ASIDE}"
    )


def test_times(tmp_path):
    seconds = csv(tmp_path, "u,i,t\n1,2,10.25\n1,2,11\n")
    reader = LogReader(str(seconds), LogSchema.model_validate({"columns": COLUMNS}))
    ticks = pa.concat_tables(reader.tables(10, Quarantine(None)))["time"].to_pylist()
    assert (ticks, reader.ticks_per_second) == ([10_250_000, 11_000_000], 10**6)
    days = read(parquet(tmp_path, t=pa.array([0, 19_000], pa.date32())))
    assert days["time"].to_pylist() == [0, 19_000 * 86_400]
    text = "u,i,t\n1,2,1970-01-02\n1,2,1970-01-01T00:00:01Z\n1,2,1970-01-01 02:00:00+02:00\n"
    iso = read(csv(tmp_path, text), time_unit="iso", time_zone="UTC")
    assert iso["time"].to_pylist() == [86_400_000_000, 1_000_000, 0]


def test_files_of_different_time_resolution_agree(tmp_path):
    for name, unit, value in (("a", "ms", 1500), ("b", "s", 1), ("c", "us", 1_500_001)):
        column = pa.array([value], pa.timestamp(unit))
        pq.write_table(pa.table({"u": [1], "i": [2], "t": column}), tmp_path / f"{name}.parquet")
    assert read(tmp_path)["time"].to_pylist() == [1_500_000, 1_000_000, 1_500_001]
    pq.write_table(pa.table({"u": [1], "i": [2], "t": [3]}), tmp_path / "d.parquet")
    assert message(tmp_path) == (
        f"'{tmp_path}/d.parquet', column 't': not of a timestamp type, as it is in other files; "
        "write all files with the same type"
    )


def test_fields_values_and_missing_ones(tmp_path):
    columns = {**COLUMNS, "value": "v", "fields": {"n": "n", "x": {"column": "x", "type": "float"}, "s": "s"}}
    path = csv(tmp_path, "u,i,t,v,n,x,s\n1,2,3,4.5,6,7.5,a\n1,2,3,,6,,\n")
    table = read(path, columns=columns)
    assert (
        table["value"].to_pylist()[0] == 4.5
        and table["value"].to_pylist()[1] != table["value"].to_pylist()[1]
    )
    assert table["field.n"].to_pylist() == ["6", "6"] and table["field.s"].to_pylist() == ["a", ""]
    assert table["field.x"].to_pylist()[0] == 7.5
    path = csv(tmp_path, "u,i,t,n\n1,2,3,4\n1,2,3,\n")
    fields = {"n": {"column": "n", "type": "integer"}}
    assert message(path, columns={**COLUMNS, "fields": fields}) == (
        f"'{path}', line 3, column 'n': the value is missing; {ASIDE}"
    )


def test_encoding_and_quotes(tmp_path):
    path = csv(tmp_path, 'u;i;t\n"a;b";caf\xe9;1\n')
    table = read(path, csv={"delimiter": ";", "encoding": "latin-1"})
    assert table.to_pydict() == {"user": ["a;b"], "item": ["caf\xe9"], "time": [1]}


def test_globs_folders_order_and_compression(tmp_path):
    (tmp_path / "day=2").mkdir()
    (tmp_path / "_temporary").mkdir()
    csv(tmp_path / "day=2", "u,i,t\n1,3,3\n", "a.csv")
    csv(tmp_path / "_temporary", "broken", "a.csv")
    csv(tmp_path, "u,i,t\n1,2,3\n", "b.csv")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"u,i,t\n1,1,3\n"))
    assert read(tmp_path)["item"].to_pylist() == [1, 2, 3]
    assert read(tmp_path / "*.csv*")["item"].to_pylist() == [1, 2]
    assert read(f"file://{tmp_path}/b.csv")["item"].to_pylist() == [2]


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_compressed_csv(tmp_path, codec):
    ending = {"gzip": "gz", "bz2": "bz2", "zstd": "zst"}[codec]
    path = tmp_path / f"log.csv.{ending}"
    with pa.output_stream(path, codec) as out:
        out.write(b"u,i,t\n1,2,3\n")
    assert read(path)["item"].to_pylist() == [2]
    path.write_bytes(b"u,i,t\n1,2,3\n")
    assert message(path).startswith(f"cannot read '{path}' as CSV (")
    with pa.output_stream(path, codec) as out:
        out.write(b"u,i,t\n" + b"1,2,3\n" * 50_000)
    path.write_bytes(path.read_bytes()[:-20])
    assert "Truncated" in message(path)


def test_a_file_with_brackets_in_its_name_is_no_glob(tmp_path):
    assert read(csv(tmp_path, "u,i,t\n1,2,3\n", "log [2024].csv"))["item"].to_pylist() == [2]


def test_values_of_any_length(tmp_path):
    path = csv(tmp_path, f"u,i,t\n1,{'x' * 200_000},1\n1,2,bad\n")
    assert message(path).startswith(f"'{path}', line 3, column 't': 'bad' is not")


def test_any_fsspec_filesystem(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("/logs/a.csv", "wb") as out:
        out.write(b"u,i,t\n1,2,3\n1,,3\n")
    parquet(tmp_path)
    memory.put(str(parquet(tmp_path, i=[5, 6])), "/tables/log.parquet")
    try:
        assert read("memory://tables/*.parquet")["item"].to_pylist() == [5, 6]
        assert message("memory://logs") == (
            f"'memory:///logs/a.csv', line 3, column 'i': the value is missing; {ASIDE}"
        )
    finally:
        memory.rm("/logs", recursive=True)
        memory.rm("/tables", recursive=True)
