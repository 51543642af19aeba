"""Logs in other forms than a row an action: RecBole's atomic files, a row a user with lists, lines of items."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import SequenceDataset
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import LogSchema
from gr.data.making.sources.base import make_source
from gr.data.making.user_rows import ListReader
from gr.errors import UserError
from tests.unit.logs_common import ASIDE, COLUMNS, NOW, Made, Notes, make, write


def prepared(name, source, out, given=None, *settings):
    notes = Notes()
    made = make_source(name, given or {}, settings).prepare(
        str(source), str(out), overwrite=True, progress=notes
    )
    return Made(made, notes.said)


def refused(name, source, out, given=None, *settings):
    with pytest.raises(UserError) as error:
        prepared(name, source, out, given, *settings)
    assert not out.exists() and "\n" not in str(error.value)
    return str(error.value)


# -- recbole -------------------------------------------------------------------------------------------------------

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\tdevice:token\ttags:token_seq\n"
    "u1\t7\t5\t1700000002.5\tweb\ta b\nu1\t8\t4\t1700000001\tapp\tc\nu2\t7\t\t1700000003\tapp\t\n"
)
ITEM = 'item_id:token\ttitle:token_seq\tyear:float\n7\tThe "First" One\t1999\n9\tNever seen\t\n8\tB\t2001.0\n'


def atomic(folder, inter=INTER, item=ITEM, name="ml"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.inter").write_text(inter)
    if item:
        (folder / f"{name}.item").write_text(item)
    return folder


def test_recbole_files_are_read_by_their_headers(tmp_path):
    source = atomic(tmp_path / "ml")
    (source / "ml.user").write_text("user_id:token\tage:float\nu1\t33\n")
    made = prepared("recbole", source, tmp_path / "out")
    assert made.rows == {"u1": [(8, 1700000001), (7, 1700000002)], "u2": [(7, 1700000003)]}
    assert str(made.column("value")) == "{'u1': [4.0, 5.0], 'u2': [nan]}" or made.column("value")["u1"] == [
        4.0,
        5.0,
    ]
    assert made.column("device") == {"u1": ["app", "web"], "u2": ["app"]}
    assert made.dataset.catalogue.to_pydict() == {
        "item_id": [7, 8],
        "count": [2, 1],
        "title": ['The "First" One', "B"],
        "year": [1999.0, 2001.0],
    }
    assert any("lists: tags;" in said for said in made.said) and any(
        ".user file" in said for said in made.said
    )
    one = prepared(
        "recbole", source / "ml.inter", tmp_path / "one", {}, "fields=[]", "item_ids=string", "items=listed"
    )
    assert "device" not in one.dataset.manifest.columns and one.dataset.catalogue["item_id"].to_pylist() == [
        "7",
        "8",
        "9",
    ]
    assert one.dataset.manifest.digest != made.dataset.manifest.digest


def test_recbole_without_times_or_catalogue(tmp_path):
    source = atomic(tmp_path / "s", "session_id:token\titem_id:token\n1\t5\n1\t4\n", item="")
    made = prepared("recbole", source, tmp_path / "out", {"user": "session_id"})
    assert made.rows == {1: [(5,), (4,)]} and any("no column timestamp" in said for said in made.said)


def test_what_is_wrong_with_recbole_files_is_one_sentence(tmp_path):
    out = tmp_path / "out"
    file = tmp_path / "ml" / "ml.inter"
    for inter, said in (
        (
            "user_id\titem_id\n1\t2\n",
            f"'{file}', line 1: 'user_id' is not a name and a type such as user_id:token",
        ),
        ("user_id:text\titem_id:token\n", f"'{file}', line 1: 'user_id:text' is not a name and a type"),
        ("user_id:token\tuser_id:float\n", f"'{file}', line 1: column 'user_id' is there twice"),
        ("uid:token\titem_id:token\n1\t2\n", f"'{file}' has no column 'user_id'"),
        ("", f"'{file}' is empty"),
        (INTER + "u3\t7\n", f"'{file}', line 5: 'u3\\t7' has 2 columns instead of 6; {ASIDE}"),
        (
            INTER + "u3\t7\tgood\t1700000000\tx\t\n",
            f"'{file}', line 5, column 'rating:float': 'good' is not a",
        ),
        (INTER + "u3\t7\t1\tsoon\tx\t\n", f"'{file}', line 5, column 'timestamp:float': 'soon' is not"),
        (
            INTER + "\t7\t1\t1700000000\tx\t\n",
            f"'{file}', line 5, column 'user_id:token': the value is missing",
        ),
    ):
        assert refused("recbole", atomic(tmp_path / "ml", inter), out).startswith(said)
    source = atomic(tmp_path / "ml", INTER, ITEM.replace("2001.0", "new"))
    assert "ml.item', row 2, column 'year:float': 'new' is not a number" in refused("recbole", source, out)
    assert "type token_seq is a list" in refused("recbole", source, out, {"fields": ["tags"]})
    assert refused("recbole", tmp_path / "none", out).startswith(
        f"no csv file at '{tmp_path / 'none'}/*.inter'"
    )
    assert "has no column 'when'" in refused("recbole", source, out, {"time": "when"})
    assert "'item_id' is both user and item" in refused("recbole", source, out, {"user": "item_id"})
    source = atomic(tmp_path / "ml", INTER.replace("device:token", "type:token"))
    assert refused("recbole", source, out) == (
        f"'{file}', column 'type': a dataset gives a column of its own that name; write another into the header, or "
        "leave it out of fields"
    )
    assert prepared("recbole", source, out, {"fields": []}).dataset.actions == 3


def test_a_list_is_no_item_and_a_column_of_items_keeps_its_name(tmp_path):
    out, source = (
        tmp_path / "out",
        atomic(tmp_path / "ml", INTER.replace("item_id:token", "item_id:token_seq")),
    )
    assert "column 'item_id': type token_seq is a list, and an action has one item" in refused(
        "recbole", source, out
    )
    source = atomic(tmp_path / "ml", INTER, "item_id:token\tcount:float\n7\t3\n")
    assert refused("recbole", source, out) == (
        f"'{source}/ml.item' has a column 'count', a name that gr gives: write another into the header"
    )


def test_parts_of_one_recbole_data_set_are_joined_and_several_are_said(tmp_path):
    inter = "user_id:token\titem_id:token\n1\t5\n"
    for name in ("ml.train", "ml.test"):
        source = atomic(tmp_path / "ml", inter, "", name)
    made = prepared("recbole", source, tmp_path / "out")
    assert made.rows == {1: [(5,), (5,)]} and not any("read as one log" in said for said in made.said)
    atomic(source, inter, "", "other")
    said = prepared("recbole", source, tmp_path / "out").said
    assert (
        f"'{source}/*.inter' is read as one log, of ml, other: name a file if they are several data sets"
        in said
    )


def test_recbole_times_are_floats_in_any_unit(tmp_path):
    inter = "user_id:token\titem_id:token\ttimestamp:float\n1\t5\t1700000000000.0\n1\t6\t1700000001000\n"
    source = atomic(tmp_path / "ml", inter, "")
    made = prepared("recbole", source, tmp_path / "out", {"time_unit": "ms"})
    assert made.rows == {1: [(5, 1_700_000_000), (6, 1_700_000_001)]}
    source = atomic(tmp_path / "ml", inter.replace("0000.0", "0000.5"), "")
    assert "'1700000000000.5' is not a whole number of time_unit 'ms'" in refused(
        "recbole", source, tmp_path / "none", {"time_unit": "ms"}
    )


# -- lists ---------------------------------------------------------------------------------------------------------


def lists(folder, rows, name="part-0.parquet", row_group=None, kind=pa.list_):
    """``rows``: (user, items, times)."""
    folder.mkdir(exist_ok=True)
    users, items, times = zip(*rows)
    table = pa.table(
        {
            "u": pa.array(users, pa.string()),
            "i": pa.array(items, kind(pa.int64())),
            "t": pa.array(times, kind(pa.int64())),
            "extra": pa.array(
                [None if i is None else [f"p{x}" for x in i] for i in items], pa.list_(pa.string())
            ),
            "country": [f"c{u}" for u in users],
        }
    )
    pq.write_table(table, folder / name, row_group_size=row_group)
    return folder


FIELDS = {"columns": {**COLUMNS, "fields": {"page": "extra", "country": "country"}}}
ROWS = [("a", [3, 1, 2], [NOW + 2, NOW, NOW]), ("b", [], []), ("d", [9], [NOW])]
EMPTY = "1 rows have empty lists, no actions: a user with no other row is not in the dataset"


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("row_group", [1, 100])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_a_row_a_user_gives_what_its_actions_give(tmp_path, kind, row_group, chunk):
    source = lists(tmp_path / "log", ROWS, row_group=row_group, kind=kind)
    lists(source, [("a", [4], [NOW + 1])], "part-1.parquet")  # later, as of another day
    made = prepared("lists", source, tmp_path / "out", {**FIELDS, "chunk_rows": chunk})
    assert made.rows == {"a": [(1, NOW), (2, NOW), (4, NOW + 1), (3, NOW + 2)], "d": [(9, NOW)]}
    assert made.column("page") == {"a": ["p1", "p2", "p4", "p3"], "d": ["p9"]}
    assert made.column("country") == {"a": ["ca"] * 4, "d": ["cd"]}
    flat = write(
        tmp_path,
        u=["a", "a", "a", "d", "a"],
        i=[3, 1, 2, 9, 4],
        t=[NOW + 2, NOW, NOW, NOW, NOW + 1],
        extra=["p3", "p1", "p2", "p9", "p4"],
        country=["ca", "ca", "ca", "cd", "ca"],
    )
    assert (
        make(flat, tmp_path / "flat", **FIELDS).dataset.manifest.fingerprint
        == made.dataset.manifest.fingerprint
    )
    assert made.facts["stages"][0] == {"stage": "rows of the log", "actions": 5, "users": None, "items": None}
    assert made.said == made.facts["assumptions"] == [EMPTY]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda inner: pa.list_(inner, 2)])
def test_a_list_that_is_missing_is_a_bad_row(tmp_path, kind):
    rows = [("a", [1, 2], [NOW, NOW]), ("b", None, None), ("c", [5, 6], None)]
    source = lists(tmp_path / "log", rows, kind=kind)
    said = refused("lists", source, tmp_path / "out", FIELDS)
    file = source / "part-0.parquet"
    assert said == f"'{file}', row group 0, row 1, column 'i': the value is missing; {ASIDE}"
    made = prepared("lists", source, tmp_path / "out", FIELDS, "on_bad_rows=quarantine")
    assert list(made.rows) == ["a"] and made.quarantined == {"i: missing": 1, "t: missing": 1}
    assert [b["row"] for b in pq.read_table(tmp_path / "out" / "quarantine").to_pylist()] == [1, 2]


def test_rows_without_actions_are_counted_whoever_reads_them(tmp_path):
    source = lists(tmp_path / "log", ROWS, row_group=1)
    lists(source, [("e", [], [])], "part-1.parquet")
    reader = ListReader(str(source), LogSchema.model_validate({"columns": COLUMNS}))
    for part in list(reader.parts()):
        one = reader.only(part)
        assert one.without_actions == 0 and list(one.tables(2, Quarantine(None))) is not None
        reader.add_seen(json.loads(json.dumps(one.seen())))
    assert reader.without_actions == 2 and reader.facts()["assumptions"] == [EMPTY.replace("1", "2")]


def test_lists_of_unequal_lengths_are_bad_rows(tmp_path):
    rows = [
        ("a", [1, 2], [NOW, NOW + 1]),
        ("b", [1, 2], [NOW]),
        ("c", [5, None], [NOW, NOW]),
        ("d", [1], [-5]),
    ]
    source = lists(tmp_path / "log", rows, row_group=2)
    file = source / "part-0.parquet"
    where = f"'{file}', row group 0, row 1, column 't'"
    assert (
        refused("lists", source, tmp_path / "out", FIELDS) == f"{where}: 1 values, where 'i' has 2; {ASIDE}"
    )
    made = prepared("lists", source, tmp_path / "out", FIELDS, "on_bad_rows=quarantine")
    assert made.rows == {"a": [(1, NOW), (2, NOW + 1)], "c": [(5, NOW)]}
    bad = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert [(b["row_group"], b["row"], b["column"]) for b in bad] == [(0, 1, "t"), (1, 0, "i"), (1, 1, "t")]
    assert json.loads(bad[0]["record"])["i"] == [1, 2]
    assert made.quarantined["t: has not as many values as 'i'"] == 1


def test_what_is_no_log_of_lists_is_refused(tmp_path):
    said = refused("lists", write(tmp_path, "flat/a.parquet", u=[1]), tmp_path / "out", {"columns": COLUMNS})
    assert said.endswith(
        "a.parquet', column 'i': type int64 is no list, where a row is a user's and each list has a value an action; "
        "prepare a log with one row an action as log"
    )
    (tmp_path / "a.csv").write_text("u,i,t\n1,2,3\n")
    assert "lists are read from Parquet" in refused(
        "lists", tmp_path / "a.csv", tmp_path / "out", {"columns": COLUMNS}
    )
    nested = pa.table({"u": [1], "i": [[[1]]], "t": [[1]]})
    pq.write_table(nested, tmp_path / "nested.parquet")
    assert refused("lists", tmp_path / "nested.parquet", tmp_path / "out", {"columns": COLUMNS}).endswith(
        "cannot be used as item; a row has one user, and of all else single values or a list of them: write it so"
    )


# -- sequences -----------------------------------------------------------------------------------------------------


def text(folder, content, name="s.txt"):
    (folder / name).write_text(content)
    return folder / name


@pytest.mark.parametrize("chunk", [1, 1000])
def test_lines_of_integers_or_text(tmp_path, chunk):
    numbers = prepared(
        "sequences", text(tmp_path, "\ufeff2 10 9 10\n\n1 9\n7\n"), tmp_path / "out", {"chunk_rows": chunk}
    )
    assert numbers.rows == {2: [(10,), (9,), (10,)], 1: [(9,)]} and not numbers.dataset.has_timestamps
    mixed = prepared("sequences", text(tmp_path, "al 007 9\nbo 9\n"), tmp_path / "out", {"chunk_rows": chunk})
    assert mixed.rows == {"al": [("007",), ("9",)], "bo": [("9",)]}
    tabs = text(tmp_path, "al,red shoe, hat\nbo,hat\n")
    assert prepared("sequences", tabs, tmp_path / "out", {}, "delimiter=','").rows == {
        "al": [("red shoe",), ("hat",)],
        "bo": [("hat",)],
    }
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"1 2\n"))
    text(tmp_path, "2 3\n")
    both = prepared("sequences", tmp_path / "*.txt*", tmp_path / "out")
    assert both.rows == {1: [(2,)], 2: [(3,)]}
    items = text(tmp_path, "id,title\n3,C\n2,B\n", "items.csv")
    given = {"catalogue": {"path": str(items), "item": "id"}}
    described = prepared("sequences", tmp_path / "*.txt*", tmp_path / "out", given)
    assert described.dataset.catalogue["title"].to_pylist() == ["B", "C"]


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf_8"])
def test_a_mark_before_the_text_is_no_part_of_a_user(tmp_path, encoding):
    file = text(tmp_path, "\ufeff2 10\n")
    assert prepared("sequences", file, tmp_path / "out", {"encoding": encoding}).rows == {2: [(10,)]}


def test_lines_without_items_are_counted_and_said(tmp_path):
    file = text(tmp_path, "1 2\n3\n4\n")
    made = prepared("sequences", file, tmp_path / "out")
    said = f"2 lines have a user and no item, the first is '{file}', line 2: '3': these users are not in the dataset"
    assert made.rows == {1: [(2,)]} and said in made.said and made.facts["assumptions"] == [said]
    file = text(tmp_path, "1,2\n3,4\n")
    assert refused("sequences", file, tmp_path / "none") == (
        f"2 lines have a user and no item, the first is '{file}', line 1: '1,2': these users are not in the dataset; "
        "set delimiter to what stands between ids"
    )
    assert "no line has an item behind its user by delimiter ';'" in refused(
        "sequences", file, tmp_path / "none", {"delimiter": ";"}
    )
    assert prepared("sequences", file, tmp_path / "out", {}, "delimiter=,").rows == {1: [(2,)], 3: [(4,)]}


def test_lines_that_are_wrong_are_named_or_put_aside(tmp_path):
    out = tmp_path / "out"
    file = tmp_path / "s.txt"
    integers = "set item_ids: string if ids are text, "
    for content, given, said in (
        ("1 2\n1 3\n", {}, f"'{file}', line 2: '1 3': user 1 has a line above; {ASIDE}"),
        (
            "1 2\n2 x\n",
            {"item_ids": "integer"},
            f"'{file}', line 2: '2 x': item 'x' is not a plain integer of 64 bits; {integers}{ASIDE}",
        ),
        ("1,2,,3\n", {"delimiter": ","}, f"'{file}', line 1: '1,2,,3': an id of an item is empty; {ASIDE}"),
        (
            "1 9223372036854775808\n",
            {"item_ids": "integer"},
            f"'{file}', line 1: '1 9223372036854775808': item '",
        ),
        ("1 2\n", {"delimiter": ""}, "delimiter is empty: give the text between two ids"),
        ("", {}, f"the log for '{out}' has no valid action (it is empty)"),
    ):
        assert refused("sequences", text(tmp_path, content), out, given).startswith(said)
    file.write_bytes(b"1 caf\xe9\n")
    assert refused("sequences", file, out).startswith(f"'{file}' is not utf-8 (")
    assert prepared("sequences", file, out, {"encoding": "latin-1"}).rows == {1: [("café",)]}
    made = prepared("sequences", text(tmp_path, "1 2\n1 3\n4 5\n"), out, {"on_bad_rows": "quarantine"})
    assert made.rows == {1: [(2,)], 4: [(5,)]} and made.quarantined == {"the user has a line above": 1}
    assert pq.read_table(out / "quarantine").to_pylist()[0]["record"] == "1 3"
    assert SequenceDataset(out).users == 2
