"""Files that programs write: at a path or a URL, whole or not at all; a real S3 server."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data import outputs
from gr.data.outputs import beside, delivered, output_file, output_files, parquet_rows, remove_output
from gr.errors import UserError

TABLE = pa.table({"user_id": [1, 2, 3]})


@pytest.fixture(params=["path", "url"])
def out(request, tmp_path):
    """Where to write, and what there is then (None: nothing)."""
    if request.param == "path":
        file = tmp_path / "recs.parquet"
        return str(file), lambda: file.read_bytes() if file.exists() else None
    store = request.getfixturevalue("store")
    key = f"data/{request.node.name}/recs.parquet"

    def there():
        return store.get(key) if key.removeprefix("data/") in store.names() else None

    return f"s3://{key}", there


def test_a_file_is_there_whole_or_not_at_all(out):
    where, there = out
    assert output_file(where) == where
    with pytest.raises(ZeroDivisionError), parquet_rows(where) as write:
        write(TABLE)
        raise ZeroDivisionError
    assert there() is None
    with parquet_rows(where) as write:
        write(TABLE)
        assert there() is None
    assert pq.read_table(io.BytesIO(there())).equals(TABLE)
    with delivered(where) as scratch:
        scratch.write_text("other")
    assert there() == b"other"
    remove_output(where)
    remove_output(where)
    assert there() is None
    with pytest.raises(UserError, match="nothing to write"), parquet_rows(where):
        pass
    assert there() is None


def test_row_groups_end_where_their_rows_or_their_bytes_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "ROWS_PER_GROUP", 8)
    monkeypatch.setattr(outputs, "BYTES_PER_GROUP", 800)
    lengths = [100, 1, 1, 100, *[1] * 8, 1]
    with parquet_rows(tmp_path / "out") as write:
        for length in lengths:
            write(pa.table({"list": [list(range(length))]}))
    metadata = pq.ParquetFile(tmp_path / "out").metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [1, 3, 8, 1]
    assert [len(row) for row in pq.read_table(tmp_path / "out")["list"].to_pylist()] == lengths


def test_no_file_overwrites_another(out):
    where, _ = out
    read = {"--users": where + ".csv", "--new-items": None}
    output_files(read, {"--out": where, "--item-vectors": None})
    with pytest.raises(UserError, match="--out and --users are both"):
        output_files({"--users": where}, {"--out": where})
    with pytest.raises(UserError, match="--item-vectors and --new-items are both"):
        output_files({**read, "--new-items": where}, {"--item-vectors": where})
    with pytest.raises(UserError, match="--item-vectors and --out are both"):
        output_files(read, {"--out": where, "--item-vectors": where})


def test_two_who_write_one_file_do_not_meet(tmp_path):
    with delivered(tmp_path / "x") as first:
        first.write_text("first")
        with delivered(tmp_path / "x") as second:
            second.write_text("second")
        assert (tmp_path / "x").read_text() == "second"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["first"]


def test_a_store_that_refuses_is_found_out_before_the_work(store, monkeypatch):
    monkeypatch.setenv("GR_STORE_ATTEMPTS", "2")
    store.fault = lambda asked: "403"
    with pytest.raises(UserError, match=r"cannot write 's3://data/no.parquet' .*: see to your access to it"):
        output_file("s3://data/no.parquet")
    store.fault = lambda asked: "503" if asked.method == "PUT" else None
    with pytest.raises(UserError, match=r"cannot write 's3://data/no.json' .*: see to the store"):
        with delivered("s3://data/no.json") as scratch:
            scratch.write_text("lost")


def test_what_cannot_be_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        output_file(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        output_file(tmp_path / "no" / "file")


def test_a_file_beside_another():
    assert beside("s3://bucket/a.b/recs.parquet", ".users.txt") == "s3://bucket/a.b/recs.users.txt"
    assert beside("recs.parquet", ".txt") == "recs.txt" and beside("/a/recs", ".txt") == "/a/recs.txt"
