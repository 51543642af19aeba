"""A damaged dataset is refused in one sentence: when it is opened, or when what is damaged is read."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import SequenceDataset
from gr.data.hashing import hash_ids
from gr.data.manifest import content_digest
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError

USERS, BLOCK = 11, 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    rng = np.random.default_rng(0)
    users = np.arange(USERS) * 3
    users = users[np.argsort(hash_ids(users))]
    lengths = rng.integers(2, 9, USERS)
    actions = int(lengths.sum())
    writer = DatasetWriter(
        tmp_path_factory.mktemp("sound") / "data",
        "sound",
        block_rows=BLOCK,
        action_type_names=["view", "buy"],
    )
    writer.add(
        Sequences.of(
            users,
            np.concatenate([[0], np.cumsum(lengths)]),
            item=rng.integers(0, 6, actions).astype(np.int32),
            time=1_000_000 + np.arange(actions),
            type=(np.arange(actions) % 2).astype(np.int32),
            page=np.array([f"p{n % 5}" for n in range(actions)], object),
        )
    )
    titles = ["a", None, "c", "d", "e", "f"]
    return writer.finish(
        pa.table({"item_id": np.arange(6) + 40, "count": np.full(6, 9), "title": titles})
    ).path


@pytest.fixture
def copy(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "data")
    return tmp_path / "data"


def read_everything(path) -> None:
    dataset = SequenceDataset(path)
    dataset.read_rows(0, dataset.users)
    dataset.catalogue.to_table()


def test_a_sound_dataset_is_not_refused(sound):
    read_everything(sound)
    read_everything(f"file://{sound}")


# -- manifest.json -----------------------------------------------------------------------------------------------


def at(*path, value):
    """An edit: the value at a path of keys and indices."""

    def change(raw):
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value(raw[path[-1]]) if callable(value) else value

    return change


def moved(number, **values):
    return lambda raw: raw["blocks"][number].update(values)


EDITS = {
    # of another type
    "users is text": at("users", value="11"),
    "users is a float": at("users", value=11.0),
    "users is a bool": at("users", value=True),
    "users is null": at("users", value=None),
    "items is a list": at("items", value=[6]),
    "actions is beyond 64 bits": at("actions", value=10**40),
    "name is a number": at("name", value=3),
    "block_rows is text": at("block_rows", value="4"),
    "columns is a table": at("columns", value={}),
    "a column is text": at("columns", 0, value="item"),
    "blocks is a number": at("blocks", value=3),
    "blocks is null": at("blocks", value=None),
    "a block is a list": at("blocks", 1, value=[]),
    "a block's rows are text": at("blocks", 0, "rows", value="4"),
    "a block's rows are null": at("blocks", 0, "rows", value=None),
    "a block's file is a number": at("blocks", 0, "file", value=7),
    "a block's digest is a list": at("blocks", 0, "digest", value=["x"]),
    "a block's checksums are a list": at("blocks", 0, "columns", value=[]),
    "a block's first hash is text": at("blocks", 0, "first_hash", value="12"),
    "catalogue is a list": at("catalogue", value=[]),
    "fingerprint is a number": at("fingerprint", value=3),
    "provenance is a list": at("provenance", value=[1]),
    "action types are a text": at("action_type_names", value="view"),
    "first time is text": at("first_time", value="1970"),
    # counts that don't add up
    "users too small": at("users", value=USERS - 1),
    "users too large": at("users", value=USERS + 1),
    "users negative": at("users", value=-USERS),
    "actions too small": at("actions", value=lambda n: n - 1),
    "items too small": at("items", value=5),
    "items zero": at("items", value=0),
    "block_rows zero": at("block_rows", value=0),
    "block_rows halved": at("block_rows", value=2),
    "a block is longer": moved(0, rows=BLOCK + 1),
    "two blocks exchange rows": lambda raw: (moved(0, rows=3)(raw), moved(2, rows=4)(raw)),
    "two blocks exchange actions": lambda raw: (
        moved(0, actions=raw["blocks"][0]["actions"] + 1)(raw),
        moved(1, actions=raw["blocks"][1]["actions"] - 1)(raw),
    ),
    # blocks
    "blocks reversed": lambda raw: raw["blocks"].reverse(),
    "the first block is missing": lambda raw: raw["blocks"].pop(0),
    "the last block is missing": lambda raw: raw["blocks"].pop(),
    "the last block is missing and not counted": lambda raw: (
        raw.update(users=8, actions=raw["actions"] - raw["blocks"].pop()["actions"]),
    ),
    "no blocks": at("blocks", value=[]),
    "a block twice": lambda raw: raw["blocks"].insert(1, dict(raw["blocks"][0])),
    "another row group": moved(1, row_group=2),
    "a negative row group": moved(1, row_group=-1),
    "another file": moved(1, file="sequences/part-00001.parquet"),
    "a file outside": moved(1, file="../other/sequences/part-00000.parquet"),
    "row groups exchanged": lambda raw: (moved(0, row_group=1)(raw), moved(1, row_group=0)(raw)),
    # digests
    "a block's digest": at("blocks", 1, "digest", value="0" * 32),
    "a block's digest is no digest": at("blocks", 1, "digest", value="nothing"),
    "a column's checksum": at("blocks", 1, "columns", "item", value="0" * 8),
    "a column's checksum is missing": lambda raw: raw["blocks"][1]["columns"].pop("time"),
    "checksum of a column that is not there": lambda raw: raw["blocks"][1]["columns"].update(price="0" * 8),
    "fingerprint": at("fingerprint", value="0" * 32),
    "generation": at("generation", value="0" * 32),
    "the digest of the manifest": at("digest", value="0" * 32),
    "a checksum of the catalogue": at("catalogue", "item_id", value="0" * 8),
    "first hashes out of order": moved(1, first_hash=0),
    "a first hash is missing": moved(1, first_hash=None),
    "a first hash beyond 64 bits": moved(2, first_hash=2**64),
    # what the data is
    "row order unknown": at("row_order", value="random"),
    "row order of a stream": at("row_order", value="stream"),
    "a column of another type": at("columns", 1, "type", value="int32"),
    "a column of no type": at("columns", 1, "type", value="time"),
    "a column of nobody": at("columns", 1, "of", value="items"),
    "a column of users": at("columns", 1, "of", value="users"),
    "a column renamed": at("columns", 1, "name", value="seconds"),
    "a column twice": lambda raw: raw["columns"].append(dict(raw["columns"][1])),
    "no column of items": lambda raw: raw["columns"].pop(0),
    "no columns": at("columns", value=[]),
    "times end before they begin": at("last_time", value=999_999),
    "first time is missing": at("first_time", value=None),
    "first time is later": at("first_time", value=1_000_001),
    "action types renamed": at("action_type_names", value=["buy", "view"]),
    # keys
    "key missing": lambda raw: raw.pop("catalogue"),
    "key of a block missing": lambda raw: raw["blocks"][2].pop("columns"),
    "key unknown": lambda raw: raw.update(colour="red"),
    "schema version as text": at("schema_version", value="2"),
    "schema version null": at("schema_version", value=None),
}
SAID = {
    "users too small": "it says 10 users and its blocks have 11",
    "blocks reversed": "block 0 is said to be row group 2 of 'sequences/part-00000.parquet'",
    "fingerprint": "its fingerprint is not that of its blocks",
    "a block's digest": "its fingerprint is not that of its blocks",
    "generation": "it was changed after preparing",
    "users is text": "'users': input should be a valid integer",
}


UNTOLD = {
    *("two blocks exchange actions", "a column's checksum", "a checksum of the catalogue", "generation"),
    *("the digest of the manifest", "a column of another type", "a column of users", "first time is later"),
    "action types renamed",
}
"""What nothing else in the manifest contradicts."""


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused_when_opened(copy, name):
    """Its digest tells; the others contradict themselves even where that was made anew."""
    file = copy / "manifest.json"
    raw = json.loads(file.read_text())
    EDITS[name](raw)
    for digest in (raw.get("digest"), content_digest(raw)):
        file.write_text(json.dumps({**raw, "digest": digest}))
        if digest == content_digest(raw) and name in UNTOLD:
            SequenceDataset(copy)
            continue
        with pytest.raises(UserError, match=r"manifest\.json.*prepare (the dataset|it) again$") as error:
            SequenceDataset(copy)
        assert "\n" not in str(error.value) and SAID.get(name, "") in str(error.value)


@pytest.mark.parametrize("key", ["name", "provenance"])
def test_what_is_free_for_people_may_be_edited(copy, key):
    file = copy / "manifest.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, key: {"name": "other", "provenance": {"by": "hand"}}[key]}))
    read_everything(copy)


CONTENT = {
    "empty": b"",
    "cut": b'{"name": "so',
    "not text": bytes(range(256)),
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "nested too deep": b"[" * 100_000,
    "keys of nothing": b"{}",
}


@pytest.mark.parametrize("name", CONTENT)
def test_what_is_no_manifest_is_refused(copy, name):
    (copy / "manifest.json").write_bytes(CONTENT[name])
    with pytest.raises(UserError, match=r"prepare (the dataset|it) again$") as error:
        SequenceDataset(copy)
    assert "\n" not in str(error.value)


def test_a_manifest_that_is_a_folder_is_refused(copy):
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read '.*manifest.json'"):
        SequenceDataset(copy)


# -- files -------------------------------------------------------------------------------------------------------

SEQUENCES, CATALOGUE = "sequences/part-00000.parquet", "catalogue.parquet"


def rewritten(file, change):
    """The same row groups (or table) with ``change`` made to one of them."""

    def damage(folder):
        parquet = pq.ParquetFile(folder / file)
        groups = [change(n, parquet.read_row_group(n)) for n in range(parquet.num_row_groups)]
        groups = [group for group in groups if group is not None]
        with pq.ParquetWriter(folder / file, groups[0].schema) as writer:
            for group in groups:
                writer.write_table(group)

    return damage


def with_column(name, values):
    """In block 1, the values of a column changed; lists stay as long as they are."""

    def change(number, table):
        if number != 1:
            return table
        lists = table[name].combine_chunks()
        new = pa.ListArray.from_arrays(
            lists.offsets, pa.array(values(lists.flatten()), lists.type.value_type)
        )
        return table.set_column(table.column_names.index(name), table.field(name), new)

    return change


def dropped_null(values):
    return [None, *values.to_pylist()[1:]]


def other_lengths(number, table):
    lists = table["items"].combine_chunks()
    offsets = lists.offsets.to_pylist()
    offsets[1] -= 1
    return table.set_column(
        table.column_names.index("items"),
        table.field("items"),
        pa.ListArray.from_arrays(offsets, lists.flatten()),
    )


def catalogue(change):
    def damage(folder):
        pq.write_table(change(pq.read_table(folder / CATALOGUE)), folder / CATALOGUE)

    return damage


def reorder(table):
    return table.take([1, 0, *range(2, len(table))])


ON_OPENING = {
    "a file of sequences is missing": lambda folder: (folder / SEQUENCES).unlink(),
    "the folder of sequences is missing": lambda folder: shutil.rmtree(folder / "sequences"),
    "the catalogue is missing": lambda folder: (folder / CATALOGUE).unlink(),
    "the catalogue is cut": lambda folder: (folder / CATALOGUE).write_bytes(b"PAR1 nonsense"),
    "the catalogue is empty": lambda folder: (folder / CATALOGUE).write_bytes(b""),
    "the catalogue is short": catalogue(lambda table: table.slice(0, 5)),
    "the catalogue is long": catalogue(lambda table: pa.concat_tables([table, table.slice(0, 1)])),
    "the catalogue has no ids": catalogue(lambda table: table.drop_columns("item_id")),
}
ON_READING = {
    "sequences are cut": lambda folder: (folder / SEQUENCES).write_bytes(
        (folder / SEQUENCES).read_bytes()[:-40]
    ),
    "sequences are empty": lambda folder: (folder / SEQUENCES).write_bytes(b""),
    "pages are overwritten": lambda folder: (folder / SEQUENCES).write_bytes(
        b"PAR1" + bytes(60) + (folder / SEQUENCES).read_bytes()[64:]
    ),
    "a row group is missing": rewritten(SEQUENCES, lambda n, table: None if n == 2 else table),
    "row groups are exchanged": lambda folder: _exchange(folder),
    "a user is missing": rewritten(SEQUENCES, lambda n, table: table.slice(1) if n == 1 else table),
    "a user is another": rewritten(
        SEQUENCES,
        lambda n, table: (
            table
            if n != 1
            else table.set_column(0, table.field(0), pa.array([1, *table["user_id"].to_pylist()[1:]]))
        ),
    ),
    "users are exchanged": rewritten(SEQUENCES, lambda n, table: reorder(table) if n == 1 else table),
    "items are reversed": rewritten(SEQUENCES, with_column("items", lambda v: v.to_pylist()[::-1])),
    "an item is another": rewritten(SEQUENCES, with_column("items", lambda v: [5, *v.to_pylist()[1:]])),
    "an item is beyond the catalogue": rewritten(
        SEQUENCES, with_column("items", lambda v: [6, *v.to_pylist()[1:]])
    ),
    "an item is null": rewritten(SEQUENCES, with_column("items", dropped_null)),
    "times are shifted": rewritten(
        SEQUENCES, with_column("timestamps", lambda v: [t + 1 for t in v.to_pylist()])
    ),
    "types are exchanged": rewritten(
        SEQUENCES, with_column("action_types", lambda v: [1 - t for t in v.to_pylist()])
    ),
    "a field is another": rewritten(
        SEQUENCES, with_column("field.page", lambda v: ["p9", *v.to_pylist()[1:]])
    ),
    "text is cut elsewhere": rewritten(
        SEQUENCES,
        with_column("field.page", lambda v: [v[0].as_py() + "p", v[1].as_py()[1:], *v.to_pylist()[2:]]),
    ),
    "sequences are cut elsewhere": rewritten(SEQUENCES, other_lengths),
    "a column is missing": rewritten(SEQUENCES, lambda n, table: table.drop_columns("timestamps")),
    "a column is of another type": rewritten(
        SEQUENCES,
        lambda n, table: table.set_column(
            table.column_names.index("timestamps"),
            "timestamps",
            table["timestamps"].cast(pa.list_(pa.int32())),
        ),
    ),
    "a column is no list": rewritten(
        SEQUENCES,
        lambda n, table: table.set_column(table.column_names.index("items"), "items", table["user_id"]),
    ),
    "catalogue: items exchanged": catalogue(reorder),
    "catalogue: an id is another": catalogue(
        lambda table: table.set_column(0, "item_id", pa.array([1, *table["item_id"].to_pylist()[1:]]))
    ),
    "catalogue: ids are text": catalogue(
        lambda table: table.set_column(0, "item_id", table["item_id"].cast(pa.string()))
    ),
    "catalogue: titles moved past a null": catalogue(
        lambda table: table.set_column(2, "title", pa.array([None, "a", "c", "d", "e", "f"]))
    ),
}


def _exchange(folder):
    parquet = pq.ParquetFile(folder / SEQUENCES)
    groups = [parquet.read_row_group(n) for n in (1, 0, 2)]
    with pq.ParquetWriter(folder / SEQUENCES, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)


@pytest.mark.parametrize("name", ON_OPENING)
def test_a_damaged_file_is_noticed_when_opened(copy, name):
    ON_OPENING[name](copy)
    with pytest.raises(UserError, match=r"prepare the dataset again$") as error:
        SequenceDataset(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


@pytest.mark.parametrize("name", ON_READING)
def test_a_damaged_file_is_noticed_when_read(copy, name):
    ON_READING[name](copy)
    with pytest.raises(UserError, match=r"prepare the dataset again$") as error:
        read_everything(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_what_is_not_asked_for_is_not_read(copy):
    """A damaged column is no harm to who doesn't read it, and is found by who does, each time."""
    ON_READING["types are exchanged"](copy)
    dataset = SequenceDataset(copy)
    for _ in range(2):
        dataset.read_block(1, ["item", "time"])
        with pytest.raises(UserError, match=r"column 'type' in row group 1 of .*its checksum differs"):
            dataset.read_block(1)


def test_a_manifest_with_its_digest_made_anew_still_has_to_fit_the_files(copy):
    file = copy / "manifest.json"
    raw = json.loads(file.read_text())
    raw["blocks"][1]["columns"]["item"] = "0" * 8
    raw["digest"] = content_digest(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"column 'item' in row group 1 .*its checksum differs"):
        SequenceDataset(copy).read_block(1)


def test_a_file_that_is_replaced_under_a_reader_is_checked_again(tmp_path):
    for name, items in (("set", [0, 1, 2]), ("other", [0, 2, 1])):
        writer = DatasetWriter(tmp_path / name, "t")
        writer.add(Sequences.of(np.arange(1), np.array([0, 3]), item=np.array(items, np.int32)))
        writer.finish(pa.table({"item_id": [0, 1, 2], "count": [1, 1, 1]}))
    dataset, file = SequenceDataset(tmp_path / "set"), "sequences/part-00000.parquet"
    assert dataset.read_block(0).items_A.tolist() == [0, 1, 2]
    shutil.copy(tmp_path / "set" / file, tmp_path / "same")
    os.replace(tmp_path / "same", tmp_path / "set" / file)
    assert dataset.read_block(0).items_A.tolist() == [0, 1, 2]
    os.replace(tmp_path / "other" / file, tmp_path / "set" / file)
    with pytest.raises(UserError, match="does not hold what was written there"):
        dataset.read_block(0)
