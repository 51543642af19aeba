"""Odd but plausible columns of logs, and of what describes their items."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.logs_common import ASIDE, COLUMNS, NOW, Made, make, refusal, write


def not_utf8(kind: pa.DataType) -> pa.Array:
    """b"a\\xff" and b"bc" as strings: Parquet's writers don't look, and neither does who reads."""
    width = np.int64 if pa.types.is_large_string(kind) else np.int32
    offsets = pa.py_buffer(np.array([0, 2, 4], width).tobytes())
    return pa.Array.from_buffers(kind, 2, [None, offsets, pa.py_buffer(b"a\xffbc")])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize(
    ("role", "what"),
    [
        ("user", "is not an id in UTF-8"),
        ("action_type", "is not an id in UTF-8"),
        ("value", "is not a number"),
        ("fields", "is not a string"),
    ],
)
def test_text_that_is_no_utf8_is_a_bad_row(tmp_path, kind, role, what):
    file = write(tmp_path, x=not_utf8(kind), u=["a", "b"])
    columns = {**COLUMNS, role: {"x": "x"} if role == "fields" else "x"}
    where = f"'{file}', row group 0, row 0, column 'x'"
    assert refusal(file, tmp_path / "out", columns=columns) == rf"{where}: 'a\\xff' {what}; {ASIDE}"
    if role != "value":  # of which none is left
        made = make(file, tmp_path / "out", columns=columns, on_bad_rows="quarantine")
        assert made.quarantined == {f"x: {what}": 1} and made.dataset.actions == 1


@pytest.mark.parametrize(
    "users",
    [
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array(["a", "b"], pa.large_string()).dictionary_encode(),
        pa.array(["a", "b"], pa.string_view()),
        pa.array([b"a", b"b"], pa.binary_view()),
        pa.array([b"a", b"b"], pa.large_binary()),
    ],
)
def test_text_of_every_type(tmp_path, users):
    assert make(write(tmp_path, u=users), tmp_path / "out").rows == {"a": [(1, NOW)], "b": [(2, NOW + 1)]}


@pytest.mark.parametrize("kind", [pa.decimal32(9, 2), pa.decimal64(18, 2), pa.decimal128(20, 2)])
def test_decimals_of_every_width(tmp_path, kind):
    columns = {**COLUMNS, "value": "v", "fields": {"price": "v", "exact": {"column": "v", "type": "string"}}}
    values = pa.array([Decimal("1.25"), Decimal("2.00")], kind)
    ids = pa.array([Decimal("7.00"), Decimal("8.00")], kind)
    made = make(write(tmp_path, v=values, i=ids), tmp_path / "out", columns=columns)
    assert made.rows == {1: [(7, NOW), (8, NOW + 1)]} and made.column("value") == {1: [1.25, 2.0]}
    assert made.column("exact") == {1: ["1.25", "2"]}


# -- what describes the items ------------------------------------------------------------------------------------------


def catalogue(tmp_path, *files: dict[str, Any]) -> dict[str, Any]:
    for n, columns in enumerate(files):
        write(tmp_path / "items", f"part-{n}.parquet", u=None, i=None, t=None, **columns)
    return {"catalogue": {"path": str(tmp_path / "items"), "item": "id"}}


def described(tmp_path, *files: dict[str, Any]) -> Made:
    return make(write(tmp_path, u=[1, 1, 1]), tmp_path / "out", **catalogue(tmp_path, *files))


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ([5], [5.5], [5.0, 5.5, None]),
        (["a"], pa.array(["b"], pa.large_string()), ["a", "b", None]),
        (["a"], pa.array(["b"]).dictionary_encode(), ["a", "b", None]),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"]).dictionary_encode(), ["a", "b", None]),
        (pa.array(["a"], pa.string_view()), [None], ["a", None, None]),
    ],
)
def test_files_of_a_catalogue_of_several_types(tmp_path, one, other, both):
    made = described(tmp_path, {"id": [1], "x": one}, {"id": [2], "x": other})
    assert made.dataset.catalogue["x"].to_pylist() == both


@pytest.mark.parametrize(
    ("one", "other"),
    [(pa.array([5]), pa.array(["x"])), (pa.array([2**53 + 1]), pa.array([0.5]))],
)
def test_files_of_a_catalogue_that_do_not_go_together_are_named(tmp_path, one, other):
    form = catalogue(tmp_path, {"id": [1], "x": one}, {"id": [2], "x": other})
    first, second = (f"{tmp_path}/items/part-{n}.parquet" for n in range(2))
    assert refusal(write(tmp_path, u=[1]), tmp_path / "out", **form) == (
        f"'{second}', column 'x': type {other.type}, where '{first}' has {one.type}; write all files of the catalogue "
        "with one type"
    )


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"id": [1, 2], "x": not_utf8(pa.string())}, "column 'x': not all of it is UTF-8"),
        ({"id": [True, False]}, "column 'id': type bool can't be ids; write integers or text"),
        ({"id": [[1], [2]]}, "column 'id': type list<element: int64> can't be ids; write integers or text"),
        ({"id": pa.array([1, 2], pa.timestamp("s"))}, "can't be ids; write integers or text"),
    ],
)
def test_columns_of_a_catalogue_that_cannot_be(tmp_path, columns, sentence):
    said = refusal(write(tmp_path, u=[1]), tmp_path / "out", **catalogue(tmp_path, columns))
    assert said.startswith(f"'{tmp_path}/items/part-0.parquet', ") and sentence in said


def test_no_column_of_a_catalogue_may_be_kept(tmp_path):
    form = catalogue(tmp_path, {"id": [1], "x": [5]})
    form["catalogue"]["columns"] = []
    made = make(write(tmp_path, u=[1]), tmp_path / "out", **form)
    assert made.dataset.catalogue.column_names == ["item_id", "count"]


def test_a_catalogue_of_nested_columns_is_kept(tmp_path):
    columns = {
        "tags": [["x"], None],
        "parts": [{"k": 1}, None],
        "sizes": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "price": [Decimal("1.50"), None],
        "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        "nothing": pa.nulls(2),
    }
    made = described(tmp_path, {"id": [1, 2], **columns})
    found = made.dataset.catalogue
    assert found["parts"].to_pylist() == [{"k": 1}, None, None] and found["tags"].to_pylist()[0] == ["x"]
    assert pq.read_table(tmp_path / "out" / "catalogue.parquet")["price"].to_pylist()[0] == Decimal("1.50")
