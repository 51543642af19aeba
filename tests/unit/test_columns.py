"""Columns are data: whatever is done to sequences is done to every column, read or carried only where asked for."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.batch import UNKNOWN, Jagged
from gr.data.batches import Plan
from gr.data.collate import collate
from gr.data.columns import block_digest
from gr.data.dataset import SequenceDataset
from gr.data.hashing import hash_ids
from gr.data.loader import Direct
from gr.data.order import Order
from gr.data.requests import recommendation_requests, requests
from gr.data.sequences import Sequences, Stretches, join
from gr.data.split import GlobalTime, LeaveOneOut
from gr.data.writing import DatasetWriter
from gr.errors import UserError

LENGTHS = [4, 0, 1, 7, 3]


def jagged(lists, dtype=np.int64) -> Jagged:
    return Jagged(
        np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64),
        np.array([value for one in lists for value in one], dtype),
    )


def made(lengths=LENGTHS) -> Sequences:
    """Every kind of column, each action's values telling which action it is."""
    actions = sum(lengths)
    rows = Sequences.of(
        np.arange(len(lengths)) + 50,
        np.concatenate([[0], np.cumsum(lengths)]),
        item=np.arange(actions, dtype=np.int32),
        time=np.arange(actions) * 10,
        type=(np.arange(actions) % 3).astype(np.int32),
        value=np.arange(actions, dtype=np.float32) / 4,
        device=np.array([f"d{n}" for n in range(actions)], object),
        tags=jagged([range(n, n + n % 4) for n in range(actions)]),
        words=jagged([[f"w{n}"] * (n % 3) for n in range(actions)], object),
    )
    users = {
        "age": np.arange(len(lengths)) + 20,
        "interests": jagged([range(n) for n in range(len(lengths))]),
    }
    return Sequences(rows.offsets_R1, rows.ordinals_R, rows.columns, {**rows.user_columns, **users})


def cells(column) -> list:
    """A column as Python values, whatever its kind."""
    if isinstance(column, Jagged):
        return [column.values[a:b].tolist() for a, b in zip(column.offsets[:-1], column.offsets[1:])]
    return column.tolist()


def plain(rows: Sequences) -> list[dict]:
    """The rows as dictionaries of Python values: what everything below is compared with."""
    columns = {name: cells(column) for name, column in rows.columns.items()}
    users = {name: cells(column) for name, column in rows.user_columns.items()}
    return [
        {
            "ordinal": int(rows.ordinals_R[n]),
            **{name: values[a:b] for name, values in columns.items()},
            **{name: values[n] for name, values in users.items()},
        }
        for n, (a, b) in enumerate(zip(rows.offsets_R1[:-1], rows.offsets_R1[1:]))
    ]


NAMES = {"item", "time", "type", "value", "device", "tags", "words"}


def test_taking_slicing_and_joining_change_every_column():
    rows = made()
    whole = plain(rows)
    assert set(rows.columns) == NAMES and whole[3]["tags"][2] == [7, 8, 9]
    assert plain(rows.take(np.array([3, 0, 3]))) == [whole[3], whole[0], whole[3]]
    cut = plain(rows.take(np.array([3, 1, 4]), np.array([2, 0, 1]), np.array([6, 0, 2])))
    expected = []
    for row, first, stop in ((3, 2, 6), (1, 0, 0), (4, 1, 2)):
        expected.append({k: v[first:stop] if k in NAMES else v for k, v in whole[row].items()})
    assert cut == expected
    for start in range(6):
        for stop in range(start, 6):
            assert plain(rows.slice(start, stop)) == whole[start:stop]
    assert plain(Sequences.concatenate([rows.slice(0, 2), rows.slice(2, 2), rows.slice(2, 5)])) == whole
    assert plain(rows.select({"tags", "age"})) == [
        {k: r[k] for k in ("ordinal", "tags", "age")} for r in whole
    ]
    assert cells(join([rows.columns["tags"], rows.columns["tags"]])) == 2 * cells(rows.columns["tags"])


@pytest.mark.parametrize("time", [None, 777])
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0], [2], []])
def test_an_unknown_action_is_appended_to_every_column(lengths, time):
    rows = made(lengths)
    expected = []
    for row in plain(rows):
        last = {name: row[name][-1:] for name in NAMES}
        empty = {"device": [""], "tags": [[]], "words": [[]]}
        new = {name: last[name] or empty.get(name, [0]) for name in NAMES} | {"item": [UNKNOWN]}
        if time is not None:
            new["time"] = [time]
        expected.append({**row, **{name: row[name] + new[name] for name in NAMES}})
    assert plain(rows.append_unknown(time)) == expected


def test_a_dataset_keeps_every_column(tmp_path):
    rows = made()
    writer = DatasetWriter(tmp_path / "set", "all kinds", block_rows=2)
    writer.add(rows.slice(0, 3))
    writer.add(rows.slice(3, 5))
    dataset = writer.finish(pa.table({"item_id": np.arange(15), "count": np.ones(15, np.int64)}))
    for start, stop in ((0, 5), (0, 4), (2, 4), (3, 5), (1, 2)):  # blocks of 2, cut or whole
        assert plain(dataset.read_rows(start, stop)) == plain(rows)[start:stop]
    kinds = {c.name: (c.of, c.type, c.multi) for c in dataset.manifest.columns}
    assert kinds["tags"] == ("actions", "int64", True) and kinds["words"] == ("actions", "string", True)
    assert kinds["interests"] == ("users", "int64", True) and kinds["user_id"] == ("users", "int64", False)
    assert kinds["value"] == ("actions", "float32", False) and kinds["device"] == ("actions", "string", False)
    assert (dataset.manifest.first_time, dataset.manifest.last_time) == (0, 140)
    for name in (*NAMES, "age", "interests"):  # any change of any column is another dataset
        column = (rows.columns | rows.user_columns)[name]
        values = column.values if isinstance(column, Jagged) else column
        old = values[-1]
        values[-1] = old + ("x" if isinstance(old, str) else 1)
        other = DatasetWriter(tmp_path / f"other {name}", "other", block_rows=2)
        other.add(rows)
        changed = other.finish(pa.table({"item_id": np.arange(16), "count": np.ones(16, np.int64)})).manifest
        values[-1] = old
        assert [a.digest == b.digest for a, b in zip(changed.blocks, dataset.manifest.blocks)] == [
            True,
            True,
            False,
        ]
        differing = {
            n for n, d in changed.blocks[2].columns.items() if d != dataset.manifest.blocks[2].columns[n]
        }
        assert differing == {name}


def test_a_blocks_digest_tells_users_lengths_and_names():
    rows = made()
    columns, users = dict(rows.columns), dict(rows.user_columns)
    offsets = rows.offsets_R1.copy()
    offsets[1] -= 1
    others = [
        replace(rows, offsets_R1=offsets),
        replace(rows, user_columns={**users, "user_id": users["user_id"] + 1}),
        replace(rows, columns={"brand" if n == "device" else n: column for n, column in columns.items()}),
        replace(rows, columns={n: column for n, column in columns.items() if n != "value"}),
    ]
    assert len({block_digest(given) for given in (rows, *others)}) == 5


def test_a_dataset_of_whole_blocks_is_read_to_its_end(tmp_path):
    rows = made([3, 1, 2, 2])
    writer = DatasetWriter(tmp_path / "set", "even", block_rows=2)
    writer.add(rows)
    dataset = writer.finish(pa.table({"item_id": np.arange(8), "count": np.ones(8, np.int64)}))
    assert plain(dataset.read_rows(0, 4)) == plain(rows)


@pytest.fixture
def dataset(tmp_path) -> SequenceDataset:
    writer = DatasetWriter(tmp_path / "set", "all kinds", block_rows=2)
    writer.add(made())
    return writer.finish(pa.table({"item_id": np.arange(15), "count": np.ones(15, np.int64)}))


def test_only_the_columns_asked_for_are_read_and_carried(dataset, monkeypatch):
    asked = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns, **how: (
            asked.append(set(columns)) or read(self, group, columns=columns, **how)
        ),
    )
    order = Order(dataset.manifest.fingerprint, 1, 5, 2, window_blocks=1)
    leave, timed = (
        LeaveOneOut(LeaveOneOut.Config()),
        GlobalTime(GlobalTime.Config(valid_from=60, test_from=100)),
    )
    for split, wanted, columns in (
        (leave, {"items"}, set()),
        (leave, {"items", "timestamps", "field.tags"}, {"tags", "time"}),
        (timed, {"items", "timestamps", "user.age"}, {"age"}),
    ):
        asked.clear()
        plan = Plan(split, order, global_batch=2, max_length=5, columns=frozenset(columns))
        shares = [batch.share for batch in Direct(Direct.Config(), dataset, plan).epoch(0)]
        assert asked == [wanted] * 3
        for share in shares:
            assert set(share.columns) | set(share.user_columns) == {"item", *columns}
        asked.clear()
        name = "test"
        held_out = list(requests(dataset, split, name, max_length=3, columns=columns))
        assert held_out and asked == [wanted | {"user_id"}] * 3
        assert {frozenset(r.batch.columns) for r in held_out} == {frozenset({"item", *columns} - {"age"})}
    asked.clear()
    assert list(recommendation_requests(dataset, max_length=3, columns=["type"], users=[50]))
    assert asked == [{"user_id"}, {"user_id", "items", "action_types"}]


def test_a_missing_column_is_named_before_anything_is_read(dataset):
    with pytest.raises(UserError) as error:
        dataset.require({"item", "type"}, "the model")
        dataset.require({"price"}, "the model")
    assert str(error.value) == (
        f"the model needs the column 'price', and dataset '{dataset.path}' has item, time, type, value, device, tags, "
        "words, user_id, age, interests: prepare it again with that column mapped (columns.fields.price in the schema "
        "of the log)"
    )


def test_batches_carry_numbers_cut_and_moved_alike():
    rows = made()
    batch = collate(rows, ["time", "tags", "value", "age", "interests"])
    assert (batch.columns["value"].dtype, batch.columns["tags"].values.dtype) == (torch.float32, torch.int64)
    assert set(collate(rows).columns) == NAMES - {"device", "words"} and not collate(rows).user_columns
    expected = plain(rows)
    for max_actions in (1, 5, 8, 100):
        parts, at = batch.split(max_actions), 0
        assert sum(p.sequences for p in parts) == 5
        for part in parts:
            moved = part.to("cpu")
            for n, (a, b) in enumerate(zip(moved.offsets_B1[:-1], moved.offsets_B1[1:])):
                row = expected[at + n]
                for name in ("item", "time", "tags", "value"):
                    assert cells(moved.columns[name])[a:b] == row[name]
                assert cells(moved.user_columns["age"])[n] == row["age"]
                assert cells(moved.user_columns["interests"])[n] == row["interests"]
                assert int(moved.ordinals_B[n]) == row["ordinal"]
            at += part.sequences
    hashed = collate(rows, ["device", "words"]).columns
    for name, values in (("device", hashed["device"]), ("words", hashed["words"].values)):
        texts = rows.columns[name] if name == "device" else rows.columns[name].values
        assert values.dtype == torch.int64 and len(set(texts.tolist())) > 1
        assert values.tolist() == hash_ids(texts).view(np.int64).tolist()


@pytest.mark.parametrize("lengths", [LENGTHS, [60, 90, 0, 75]], ids=["short", "long"])
def test_rows_copied_as_batches_hold_them_make_the_same_batch(lengths):
    rows = made(lengths)
    parts = Stretches.concatenate([Stretches.of(rows), Stretches.of(rows)])
    stretches = parts.take(np.array([6, 0, 3, 1, 2]))
    plain_rows, widened = stretches.copied(), stretches.copied(as_batched=True)
    columns = ["time", "tags", "value", "device"]
    expected, batch = collate(plain_rows, columns), collate(widened, columns, lent=False)
    assert torch.equal(batch.offsets_B1, expected.offsets_B1)
    for name, column in expected.columns.items():
        mine, its = batch.columns[name], column
        if isinstance(its, Jagged):
            assert torch.equal(mine.offsets, its.offsets)
            mine, its = mine.values, its.values
        assert mine.dtype == its.dtype and torch.equal(mine, its), name
    one_by_one = lengths is not LENGTHS  # then they are widened on the way
    assert widened.items_A.dtype == (np.int64 if one_by_one else np.int32)


def test_a_multi_valued_column_is_cut_without_asking_the_device():
    """Offsets on a device that can't be read: the host's copy is used."""
    column = collate(made(), ["tags"]).columns["tags"]

    class Unreadable:
        def __init__(self, tensor):
            self.tensor = tensor

        def __getitem__(self, index):
            assert isinstance(index, slice), "this would wait for the device"
            return Unreadable(self.tensor[index])

        def __sub__(self, number):
            return Unreadable(self.tensor - number)

        def __len__(self):
            return len(self.tensor)

    away = Jagged(Unreadable(column.offsets), column.values, column.offsets)
    part, expected = away[3:9], column[3:9]
    assert torch.equal(part.offsets.tensor, expected.offsets) and torch.equal(part.values, expected.values)
    assert torch.equal(part[2:4].values, expected[2:4].values)
    assert column.to("meta").host_offsets is column.offsets


def test_names_that_clash_and_types_that_cannot_be_stored_are_refused(tmp_path):
    rows = made()
    both = Sequences(
        rows.offsets_R1, rows.ordinals_R, rows.columns, {**rows.user_columns, "time": rows.ordinals_R}
    )
    with pytest.raises(UserError, match="'time' is a column of actions and of users"):
        DatasetWriter(tmp_path / "a", "a", block_rows=2).add(both)
    odd = Sequences.of(rows.users_R, rows.offsets_R1, item=rows.items_A, flag=rows.items_A > 3)
    with pytest.raises(UserError, match="column 'flag' is of type bool: give one of int32, int64, float32"):
        DatasetWriter(tmp_path / "b", "b", block_rows=2).add(odd)


def test_without_torchrec_a_keyed_jagged_tensor_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrec.sparse.jagged_tensor", None)
    with pytest.raises(UserError, match=r"needs torchrec, and it cannot be imported .*: make setup-sharded"):
        collate(made()).to_kjt()


def test_to_keyed_jagged_tensor():
    pytest.importorskip("torchrec")
    batch = collate(made(), ["type", "tags", "value"])
    kjt = batch.to_kjt()
    assert kjt.keys() == ["item", "type", "tags"] and kjt.stride() == 5
    expected = plain(made())
    for name in ("item", "type", "tags"):
        flat = [[v for x in row[name] for v in (x if isinstance(x, list) else [x])] for row in expected]
        assert [one.tolist() for one in kjt[name].to_dense()] == flat
    assert batch.to_kjt(["tags"]).keys() == ["tags"]
    with pytest.raises(UserError, match="'value' holds numbers with decimals"):
        batch.to_kjt(["value"])
    with pytest.raises(UserError, match="no column 'tag': did you mean 'tags'"):
        batch.to_kjt(["tag"])
