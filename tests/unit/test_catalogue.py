"""The catalogue: read when asked for, counted once for a generation and a split; users found without a scan."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.data import popularity
from gr.data.dataset import SequenceDataset
from gr.data.hashing import hash_ids
from gr.data.popularity import count, training_counts
from gr.data.requests import find_users, recommendation_requests
from gr.data.sequences import Sequences
from gr.data.split import GlobalTime, LeaveOneOut, Records
from gr.data.writing import DatasetWriter
from gr.errors import UserError

ITEMS = 20


def in_hash_order(users):
    users = np.asarray(users)
    return users[np.lexsort((users, hash_ids(users)))] if users.dtype != object else sorted_text(users)


def sorted_text(users):
    hashes = hash_ids(users).tolist()
    return np.array([u for _, u in sorted(zip(hashes, users.tolist()))], object)


def made(path, users, block_rows=8, row_order="hash", seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, len(users))
    actions = int(lengths.sum())
    writer = DatasetWriter(path, "made", block_rows=block_rows, row_order=row_order)
    writer.add(
        Sequences.of(
            users,
            np.concatenate([[0], np.cumsum(lengths)]),
            item=rng.integers(0, ITEMS, actions).astype(np.int32),
            time=1_000_000_000 + np.sort(rng.integers(0, 10**7, actions)),
        )
    )
    return writer.finish(pa.table({"item_id": np.arange(ITEMS), "count": np.zeros(ITEMS, np.int64)}))


@pytest.fixture
def dataset(tmp_path):
    return made(tmp_path / "set", in_hash_order(np.arange(50) * 3))


SPLITS = [
    LeaveOneOut(LeaveOneOut.Config(holdout=1)),
    LeaveOneOut(LeaveOneOut.Config(holdout=2)),
    GlobalTime(GlobalTime.Config(valid_from=1_005_000_000, test_from=1_008_000_000)),
    Records(Records.Config(train=0.5, valid=0.2)),
    Records(Records.Config(train=0.0)),
]


def reads(monkeypatch) -> list:
    """The blocks read from now on."""
    seen, read = [], SequenceDataset._read
    monkeypatch.setattr(
        SequenceDataset, "_read", lambda self, block, infos: seen.append(block) or read(self, block, infos)
    )
    return seen


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: str(split.description))
def test_counts_are_those_of_the_actions_that_train(dataset, split, monkeypatch):
    rows = dataset.read_rows(0, 50)
    items = np.split(rows.items_A, rows.offsets_R1[1:-1])
    stops = split.train_stop(rows)[: split.training_rows(50)]
    trained = [item for row, stop in zip(items, stops) for item in row[:stop]]
    catalogue = dataset.catalogue.under(split)
    assert catalogue.training_counts.tolist() == np.bincount(np.array(trained, int), minlength=ITEMS).tolist()
    assert catalogue.training_counts.dtype == torch.int64
    assert catalogue.counted.users == (stops >= 2).sum()
    assert catalogue.counted.targets == {n: (split.target(rows, n, 50) >= 0).sum() for n in split.names}
    seen = reads(monkeypatch)
    again = SequenceDataset(dataset.path).catalogue.under(split)
    assert again.training_counts.tolist() == catalogue.training_counts.tolist() and not seen, "counted twice"
    assert (again.counted.users, again.counted.targets) == (
        catalogue.counted.users,
        catalogue.counted.targets,
    )
    again.training_counts[0] += 1  # what was read may be written to


def test_each_split_and_generation_has_counts_of_its_own(dataset, tmp_path):
    kept = [training_counts(dataset, split).tolist() for split in SPLITS]
    assert len(list((dataset.path / "counts").iterdir())) == len(SPLITS)
    assert [training_counts(SequenceDataset(dataset.path), split).tolist() for split in SPLITS] == kept
    other = made(tmp_path / "other", in_hash_order(np.arange(50) * 3), seed=1)
    shutil.copytree(dataset.path / "counts", other.path / "counts")
    assert training_counts(other, SPLITS[0]).tolist() == count(other, SPLITS[0]).counts_I.tolist() != kept[0]


def edit(change):
    def damage(file):
        table = pq.read_table(file)
        pq.write_table(change(table), file)

    return damage


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "nonsense": lambda file: file.write_bytes(b"PAR1 nonsense PAR1"),
    "another count": edit(
        lambda t: t.set_column(0, "count", pa.array([9**6, *t["count"].to_pylist()[1:]], pa.int64()))
    ),
    "short": edit(lambda t: t.slice(0, ITEMS - 1)),
    "of another type": edit(lambda t: t.cast(pa.schema([("count", pa.int32())], t.schema.metadata))),
    "no metadata": edit(lambda t: t.replace_schema_metadata({})),
    "metadata of nothing": edit(lambda t: t.replace_schema_metadata({"gr": "3"})),
    "no column": edit(lambda t: t.rename_columns(["counts"])),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_kept_counts_that_do_not_fit_are_counted_again(dataset, how, monkeypatch):
    expected = training_counts(dataset, SPLITS[0]).tolist()
    (file,) = (dataset.path / "counts").iterdir()
    DAMAGE[how](file)
    seen = reads(monkeypatch)
    assert training_counts(dataset, SPLITS[0]).tolist() == expected and seen == list(range(7))
    if how != "a folder":
        seen.clear()
        assert training_counts(dataset, SPLITS[0]).tolist() == expected and not seen, "not kept anew"


def test_a_folder_that_cannot_be_written_to_is_left_as_it_is(dataset, monkeypatch):
    def refuse(*_):
        raise PermissionError("read only")

    monkeypatch.setattr(os, "replace", refuse)
    assert training_counts(dataset, SPLITS[0]).tolist() == count(dataset, SPLITS[0]).counts_I.tolist()
    assert not list((dataset.path / "counts").iterdir()), "the scratch file is gone"


def test_a_dataset_with_what_was_kept_beside_it_can_be_overwritten(dataset):
    for kind in ("tokens", "vectors"):
        dataset.catalogue.keep(kind, {}, pa.table({"x": range(dataset.items)}))
    training_counts(dataset, SPLITS[0])
    DatasetWriter(dataset.path, "again", overwrite=True).abandon()


class Group:
    """Processes that speak through a list, one after the other: the main one first."""

    def __init__(self, rank, box):
        self.is_main, self.box = rank == 0, box

    def together(self, action):
        return action()

    def broadcast(self, value):
        if self.is_main:
            self.box.append(value)
        return self.box[0]


def test_one_process_counts_and_the_others_receive(dataset, monkeypatch):
    counted, box = [], []
    monkeypatch.setattr(popularity, "count", lambda *a: counted.append(1) or count(*a))
    monkeypatch.setattr(dataset.folder, "publish", lambda *a: (_ for _ in ()).throw(OSError("read only")))
    results = []
    for rank in range(3):
        catalogue = dataset.catalogue.under(SPLITS[1])
        results.append(catalogue.count_once(Group(rank, box)))
        assert catalogue.training_counts.tolist() == results[0].counts_I.tolist()
    assert len(counted) == 1


def test_columns_are_read_when_asked_for(dataset, monkeypatch):
    asked, read = [], pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda self, columns: asked.append(columns) or read(self, columns=columns)
    )
    catalogue = SequenceDataset(dataset.path).catalogue
    assert (catalogue.rows, len(catalogue), catalogue.column_names) == (ITEMS, ITEMS, ["item_id", "count"])
    assert not asked
    assert catalogue.under(SPLITS[0]).ids.to_pylist() == catalogue.ids.to_pylist() == list(range(ITEMS))
    assert asked == [["item_id"]]
    with pytest.raises(UserError, match=r"catalogue.parquet' has no column 'titel': known: count, item_id"):
        catalogue["titel"]


# -- users -------------------------------------------------------------------------------------------------------

TEXT = [*(f"user {n}" for n in range(300)), "7", "-3", "ü", "0x1F"]
KINDS = {"integers": np.arange(-150, 150) * 10**15, "text": np.array(TEXT, object)}


@pytest.mark.parametrize("row_order", ["hash", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_user_is_found_where_they_are(tmp_path, kind, row_order):
    users = in_hash_order(KINDS[kind])
    dataset = made(tmp_path / "set", users, row_order=row_order)
    assert (dataset.manifest.blocks[0].first_hash is None) == (row_order == "stream")
    for at in range(0, len(users), 7):
        for written in (users[at], str(users[at])):
            found = find_users(dataset, [written])
            (block, rows), *rest = found.rows.items()
            assert not rest and (block * 8 + rows).tolist() == [at] and not found.unknown
    every = find_users(dataset, users.tolist())
    assert np.concatenate([b * 8 + r for b, r in every.rows.items()]).tolist() == list(range(len(users)))
    assert every.users == len(users) and every.refuse_unknown() is every


def test_known_users_are_served_and_unknown_ones_listed(dataset):
    unknown = ["1", 4, "x", "007", 2**70, "1.0", None, "-0", " 9"]
    found = find_users(dataset, ["9", *unknown, 9, "0", 4, "1"])
    assert found.unknown == unknown and found.users == 2
    served = [
        u for r in recommendation_requests(dataset, max_length=3, users=found) for u in r.users.tolist()
    ]
    assert sorted(served) == [0, 9]
    with pytest.raises(UserError) as error:
        found.refuse_unknown()
    assert str(error.value) == (
        f"9 of 11 users are not in the dataset '{dataset.path}', the first is '1': take them out of the list, or "
        "prepare a dataset that has them"
    )
    nobody = find_users(dataset, [])
    assert (nobody.users, nobody.unknown) == (0, [])


def test_a_user_is_found_by_reading_one_block(tmp_path, monkeypatch):
    dataset = made(tmp_path / "set", in_hash_order(np.arange(2000)))
    seen = reads(monkeypatch)
    most = 0
    for user in range(0, 2000, 97):
        seen.clear()
        list(recommendation_requests(dataset, max_length=3, users=[user], columns=["time"]))
        assert seen[-1] == seen[-2]  # ids, then the rows of the same block
        most = max(most, len(seen))
    assert most <= 3  # whose hash is a block's first one may stand at the end of the block before, too
    seen.clear()
    assert find_users(dataset, [5000, "nobody"]).users == 0 and len(seen) <= 1


def test_users_whose_hashes_collide_over_a_border_are_found(tmp_path, monkeypatch):
    """All of one hash: any block could hold them."""
    from gr.data import blocks as writing, requests as asking

    for module in (writing, asking):
        monkeypatch.setattr(module, "hash_ids", lambda ids: np.asarray(ids, np.uint64) // 100)
    dataset = made(tmp_path / "set", np.arange(50, 250))
    for user in range(50, 250):
        found = find_users(dataset, [user])
        assert {b: r.tolist() for b, r in found.rows.items()} == {(user - 50) // 8: [(user - 50) % 8]}


def test_a_dataset_in_no_order_of_hashes_is_read_through(tmp_path):
    dataset = made(tmp_path / "set", np.arange(40))
    assert {block.first_hash for block in dataset.manifest.blocks} == {None}
    assert find_users(dataset, range(40)).users == 40


# -- time bounds -------------------------------------------------------------------------------------------------

FIRST, LAST = 1_000_000_000, 1_010_000_000


@pytest.mark.parametrize(
    ("valid_from", "test_from", "said"),
    [
        (1_005_000_000_000, 1_006_000_000_000, "milliseconds, give it in seconds (1005000000)"),
        (1_005_000_000_000_000, 1_006_000_000_000_000, "microseconds, give it in seconds (1005000000)"),
        (1_005_000_000, 1_006_000_000_123_456_789, "nanoseconds, give it in seconds (1006000000)"),
        (20010910, 20011001, "the day 2001-09-10, give it in seconds since 1970 (1000080000)"),
        (11_600, 11_650, "days since 1970, give it in seconds (1002240000)"),
        (FIRST, LAST, "give a time between the two, in seconds since 1970"),
        (-5, LAST, "give a time between the two"),
        (1_005_000_000, LAST + 2, "give a time between the two"),
        (LAST + 1, LAST + 1, "give a time between the two"),
        (1_005_000_000, 2**62, f"test_from {2**62} (beyond all dates)"),
    ],
)
def test_time_bounds_outside_of_the_log_are_refused_with_the_likely_unit(valid_from, test_from, said):
    manifest = SimpleNamespace(first_time=FIRST, last_time=LAST)
    data = SimpleNamespace(manifest=manifest, has_timestamps=True, path="data/set")
    with pytest.raises(UserError) as error:
        GlobalTime(GlobalTime.Config(valid_from=valid_from, test_from=test_from)).check_dataset(data)
    text = str(error.value)
    assert said in text and "\n" not in text
    assert "from 1000000000 (2001-09-09 01:46:40) to 1010000000 (2002-01-02 19:33:20)" in text
    assert "data.split.valid_from" in text or "data.split.test_from" in text


@pytest.mark.parametrize("bounds", [(FIRST + 1, FIRST + 1), (LAST, LAST), (FIRST + 1, LAST + 1)])
def test_time_bounds_inside_of_the_log_are_taken(bounds):
    manifest = SimpleNamespace(first_time=FIRST, last_time=LAST)
    split = GlobalTime(GlobalTime.Config(valid_from=bounds[0], test_from=bounds[1]))
    split.check_dataset(SimpleNamespace(manifest=manifest, has_timestamps=True, path="data/set"))


def test_a_split_by_time_needs_times(tmp_path):
    writer = DatasetWriter(tmp_path / "set", "no times")
    writer.add(Sequences.of(np.arange(2), np.array([0, 1, 2]), item=np.zeros(2, np.int32)))
    dataset = writer.finish(pa.table({"item_id": [1], "count": [2]}))
    with pytest.raises(UserError, match=r"needs timestamps, and dataset '.*set' has none: use leave_one_out"):
        SPLITS[2].check_dataset(dataset)


def test_a_column_of_items_as_features_look_it_up(tmp_path):
    columns = {
        "whole": pa.array([3, 1, 4, 1], pa.int32()),
        "holes": pa.array([7, None, 9, None]),
        "flags": [True, False, True, True],
        "lists": [[1, 2], [], None, [5, None, 6]],
        "names": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "texts": [["a"], ["b", "a"], [], None],
        "price": [1.5, 2.0, 0.5, 1.0],
        "large": pa.array([2**64 - 1, 0, 0, 0], pa.uint64()),
    }
    table = pa.table({"item_id": range(4), "count": [1] * 4, **columns})
    writer = DatasetWriter(tmp_path / "other", "tiny")
    writer.add(Sequences.of(np.arange(1), np.array([0, 2]), item=np.array([0, 1], np.int32)))
    items = writer.finish(table).catalogue
    assert items.codes("whole").tolist() == [3, 1, 4, 1] and not items.info("whole").multi
    assert items.codes("flags").tolist() == [1, 0, 1, 1]
    a, b = (hash_ids(np.array([text], object)).view(np.int64)[0] for text in "ab")
    for name, offsets, values in (
        ("holes", [0, 1, 1, 2, 2], [7, 9]),
        ("lists", [0, 2, 2, 2, 4], [1, 2, 5, 6]),
        ("names", [0, 1, 2, 2, 3], [a, b, a]),
        ("texts", [0, 1, 3, 3, 3], [a, b, a]),
    ):
        found = items.codes(name)
        assert items.info(name).multi and found.offsets.tolist() == offsets, name
        assert found.values.tolist() == values and found.values.dtype == torch.int64, name
    assert [items.info(name).type for name in ("price", "texts", "large")] == ["float64", "string", "int64"]
    with pytest.raises(UserError, match=r"column 'large' of .* can't be looked up"):
        items.codes("large")
