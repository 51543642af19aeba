"""What a log's users are described by comes to stand beside their sequences."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.batch import Jagged
from gr.data.making.sources.base import make_source
from gr.data.making.sources.log import ActionLog
from gr.errors import UserError


def described(folder, **columns):
    log = {"u": ["b", "a", "b"], "i": [1, 2, 3], "t": [10, 20, 30]}
    pq.write_table(pa.table(log), folder / "log.parquet")
    pq.write_table(pa.table(columns), folder / "users.parquet")
    schema = {
        "columns": {"user": "u", "item": "i", "time": "t"},
        "users": {"path": str(folder / "users.parquet"), "user": "name"},
    }
    return make_source("log", schema).prepare(str(folder / "log.parquet"), str(folder / "out"))


def test_columns_of_users_of_every_kind(tmp_path):
    dataset = described(
        tmp_path,
        name=["c", "b", "a"],
        age=[1, 2, 3],
        city=["x", None, "z"],
        score=[0.5, 1.5, None],
        level=pa.array([1, None, 3]),
        paid=pa.array([Decimal("1.00"), Decimal("2.25"), None]),
        pair=pa.array([["p", "q"], ["q", "r"], None], pa.list_(pa.string(), 2)),
        likes=[[1], [2, 3], None],
        tags=[["p"], [], ["q", "r"]],
    )
    rows = dataset.read_block(0)
    order = np.argsort(rows.users_R.astype(str))
    found = {name: column for name, column in rows.take(order).user_columns.items() if name != "user_id"}
    assert found["age"].tolist() == [3, 2] and found["city"].tolist() == ["z", ""]
    np.testing.assert_array_equal(found["score"], [np.nan, 1.5])
    np.testing.assert_array_equal(found["paid"], [np.nan, 2.25])
    lists = {name: column for name, column in found.items() if isinstance(column, Jagged)}
    shown = {
        name: [column.values[a:b].tolist() for a, b in zip(column.offsets, column.offsets[1:])]
        for name, column in lists.items()
    }
    assert shown == {
        "level": [[3], []],
        "likes": [[], [2, 3]],
        "tags": [["q", "r"], []],
        "pair": [[], ["q", "r"]],
    }
    with pytest.raises(UserError, match="has the column 'age' of users, which a log doesn't say"):
        ActionLog.append(str(tmp_path / "log.parquet"), str(dataset.path))


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"name": ["a"], "age": [1]}, "user 'b' of the log is not among the users that are described"),
        ({"name": ["a", "b", "a"], "age": [1, 2, 3]}, "lists user 'a' more than once"),
        ({"name": ["a", "b"], "time": [1, 2]}, "the users have a column 'time', as the actions have"),
        (
            {"name": ["a", "b"], "when": pa.array([1, 2], pa.timestamp("ms"))},
            r"'when' of the users holds timestamp\[ms\]",
        ),
        ({"id": ["a", "b"]}, "has no column 'name'"),
        (
            {"name": ["a", "b"], "likes": [[2**53 + 1, None], [1]]},
            "'likes' of the users has lists in which a value is",
        ),
        (
            {"name": ["a", "b"], "tags": [["x"], [None]]},
            "'tags' of the users has lists in which a value is missing",
        ),
    ],
)
def test_what_does_not_fit_is_a_sentence(tmp_path, columns, sentence):
    with pytest.raises(UserError, match=sentence):
        described(tmp_path, **columns)
    assert not (tmp_path / "out").exists()
