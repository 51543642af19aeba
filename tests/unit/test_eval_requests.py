"""Requests: the right history, target and exclusions for every split, each user once, in bounded pieces."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr.batch import UNKNOWN
from gr.data.dataset import SequenceDataset
from gr.data.popularity import training_counts
from gr.data.requests import recommendation_requests, requests
from gr.data.sequences import Sequences
from gr.data.split import GlobalTime, LeaveOneOut, Records
from gr.data.writing import DatasetWriter
from gr.errors import UserError

ITEMS = 12


def sequences(lists, users=None, times=None, types=None) -> Sequences:
    def flat(rows, dtype):
        return None if rows is None else np.concatenate([np.asarray(r, dtype) for r in rows])

    lengths = [len(row) for row in lists]
    return Sequences.of(
        np.arange(len(lists)) * 10 if users is None else np.array(users),
        np.concatenate([[0], np.cumsum(lengths)]),
        item=flat(lists, np.int32),
        time=flat(times, np.int64),
        type=flat(types, np.int32),
    )


def dataset(path, rows: Sequences, block_rows=4, items=ITEMS) -> SequenceDataset:
    writer = DatasetWriter(path, "test", block_rows=block_rows)
    writer.add(rows)
    return writer.finish(pa.table({"item_id": np.arange(items), "count": np.zeros(items, np.int64)}))


@pytest.fixture
def lists():
    rng = np.random.default_rng(0)
    return [rng.integers(0, ITEMS, n).tolist() for n in (5, 1, 2, 3, 9, 0, 4, 12, 2, 6, 7)]


@pytest.fixture
def data(tmp_path, lists):
    times = [list(range(100, 100 + 10 * len(row), 10)) for row in lists]
    types = [[n % 3 for n in range(len(row))] for row in lists]
    return dataset(tmp_path / "data", sequences(lists, times=times, types=types))


def unpack(iterable):
    """Raw user -> (inputs, target, excluded, history length), each user once; checks what must agree."""
    answers = {}
    for request in iterable:
        batch = request.batch
        offsets, gone = batch.offsets_B1.tolist(), request.exclude_offsets.tolist()
        assert len(request) == batch.sequences == len(request.users) and offsets[-1] == batch.actions
        for i, user in enumerate(request.users.tolist()):
            items = batch.items_T[offsets[i] : offsets[i + 1]].tolist()
            assert batch.lengths[i] == len(items) and items[-1] == request.targets_B[i]
            assert user not in answers, "a user came twice"
            excluded = sorted(request.exclude_items[gone[i] : gone[i + 1]].tolist())
            answers[user] = (items[:-1], items[-1], excluded, int(request.history_lengths_B[i]))
    return answers


def expected(lists, target_of, max_length, exclude):
    answers = {}
    for n, row in enumerate(lists):
        if (target := target_of(row)) >= 0:
            history = row[:target]
            kept = history[-max_length:]
            out = {"none": [], "kept": kept, "all": history}[exclude]
            answers[n * 10] = (kept, row[target], sorted(i for i in out if i != row[target]), len(history))
    return answers


@pytest.mark.parametrize("exclude", ["none", "kept", "all"])
@pytest.mark.parametrize(("holdout", "name", "back"), [(1, "test", 1), (2, "test", 1), (2, "valid", 2)])
def test_leave_one_out(data, lists, holdout, name, back, exclude):
    split = LeaveOneOut(LeaveOneOut.Config(holdout=holdout))
    want = expected(lists, lambda row: len(row) - back if len(row) > back else -1, 3, exclude)
    for batch in (1, 2, 100):
        asked = requests(data, split, name, max_length=3, exclude=exclude, batch=batch)
        assert unpack(asked) == want
        assert asked.population == len(want)
        assert unpack(asked) == want, "a second pass gives the same"
        assert all(len(r) <= batch for r in asked)


def test_a_split_that_trains_is_refused(data):
    with pytest.raises(UserError, match="'valid' is not held out"):
        requests(data, LeaveOneOut(LeaveOneOut.Config(holdout=1)), "valid", max_length=3)


def test_global_time(data, lists):
    split = GlobalTime(
        GlobalTime.Config(valid_from=120, test_from=140)
    )  # times of actions: they belong to it

    def first_from(start, stop):
        def target(row):
            inside = [n for n in range(len(row)) if start <= 100 + 10 * n < stop]
            return inside[0] if inside and inside[0] >= 1 else -1

        return target

    for name, bounds in (("valid", (120, 140)), ("test", (140, 10**9))):
        want = expected(lists, first_from(*bounds), 2, "all")
        assert len(want) >= 5
        assert unpack(requests(data, split, name, max_length=2, exclude="all", batch=3)) == want


def test_who_did_nothing_while_others_validate_is_not_validated_by_the_test(tmp_path):
    times = [[100, 110, 200], [100, 120, 200]]
    made = dataset(tmp_path / "gap", sequences([[1, 2, 3], [4, 5, 6]], times=times))
    split = GlobalTime(GlobalTime.Config(valid_from=120, test_from=140))
    asked = {name: set(unpack(requests(made, split, name, max_length=5))) for name in split.names}
    assert asked == {"valid": {10}, "test": {0, 10}}


def test_records(data, lists):
    split = Records(Records.Config(train=0.5, valid=0.2))
    whole = {
        user: answer
        for user, answer in expected(lists, lambda row: len(row) - 1, 20, "kept").items()
        if answer[0]
    }
    first, second = split.training_rows(11) * 10, round(0.7 * 11) * 10
    valid = unpack(requests(data, split, "valid", max_length=20, batch=2))
    test = unpack(requests(data, split, "test", max_length=20, batch=2))
    assert valid == {u: a for u, a in whole.items() if first <= u < second} and valid
    assert test == {u: a for u, a in whole.items() if u >= second} and test


def test_blocks_without_targets_are_read_once(data, monkeypatch):
    split = Records(Records.Config(train=0.8))
    asked = requests(data, split, "test", max_length=20)
    reads = []
    read = SequenceDataset.read_block
    monkeypatch.setattr(
        SequenceDataset,
        "read_block",
        lambda self, block, columns: reads.append(block) or read(self, block, columns),
    )
    first, second = unpack(asked), unpack(asked)
    assert first == second and reads == [0, 1, 2, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_each_user_belongs_to_one_rank(data, world):
    split = LeaveOneOut(LeaveOneOut.Config())
    every = unpack(requests(data, split, "test", max_length=4))
    shares = [unpack(requests(data, split, "test", max_length=4, rank=r, world=world)) for r in range(world)]
    assert sum(map(len, shares)) == len(every)
    assert {u: a for share in shares for u, a in share.items()} == every
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_subset_of_users_is_the_same_each_time(data):
    split = LeaveOneOut(LeaveOneOut.Config())
    every = unpack(requests(data, split, "test", max_length=4))
    subset = {}
    for wanted in (1, 4, len(every), 100):
        asked = requests(data, split, "test", max_length=4, max_users=wanted)
        got = unpack(asked)
        assert len(got) == min(wanted, len(every)) and asked.population == len(every)
        assert subset.items() <= got.items(), "a larger subset holds the smaller one"
        assert got.items() <= every.items()
        shares = [
            unpack(requests(data, split, "test", max_length=4, max_users=wanted, rank=r, world=2))
            for r in (0, 1)
        ]
        assert {**shares[0], **shares[1]} == got
        subset = got


def test_a_subset_is_drawn_for_each_dataset_anew(tmp_path):
    """Not the first users in its order, and not the same places in every dataset."""
    places = []
    for items in (7, 8, 9):
        lists = [[items, n % items, 3] for n in range(60)]
        made = dataset(tmp_path / str(items), sequences(lists))
        split = LeaveOneOut(LeaveOneOut.Config())
        asked = requests(made, split, "test", max_length=4, max_users=12)
        places.append(sorted(n for request in asked for n in request.batch.ordinals_B.tolist()))
    assert all(len(drawn) == 12 and max(drawn) > 30 for drawn in places)
    assert places[0] != places[1] != places[2] != places[0]


def test_training_counts_see_training_actions_only(data, lists):
    def counts(rows):
        return np.bincount([i for row in rows for i in row], minlength=ITEMS).tolist()

    one = LeaveOneOut(LeaveOneOut.Config(holdout=1))
    two = LeaveOneOut(LeaveOneOut.Config(holdout=2))
    assert training_counts(data, one).tolist() == counts(row[:-1] for row in lists)
    assert training_counts(data, two).tolist() == counts(row[:-2] for row in lists)
    for share in (0.5, 0.73, 0.0):
        records = Records(Records.Config(train=share))
        assert training_counts(data, records).tolist() == counts(lists[: round(share * 11)])


@pytest.mark.parametrize("exclude", ["none", "kept", "all"])
def test_recommendation_requests(data, lists, exclude):
    got = unpack(recommendation_requests(data, max_length=3, exclude=exclude, batch=4))
    assert sorted(got) == [n * 10 for n in range(len(lists))]
    for user, (inputs, target, excluded, length) in got.items():
        row = lists[user // 10]
        assert inputs == row[-3:] and target == UNKNOWN and length == len(row)
        assert excluded == sorted({"none": [], "kept": row[-3:], "all": row}[exclude])


def test_recommendation_requests_carry_the_time_of_the_request(data, lists):
    for time in (None, 7777):
        for request in recommendation_requests(data, max_length=3, users=["70", 0], time=time):
            batch = request.batch
            ends = batch.offsets_B1[1:] - 1
            last = [100 + 10 * (len(lists[u // 10]) - 1) for u in request.users]
            assert batch.timestamps_T[ends].tolist() == (last if time is None else [7777, 7777])
            assert batch.timestamps_T[ends - 1].tolist() == last
            assert torch.equal(batch.action_types_T[ends], batch.action_types_T[ends - 1])


def test_recommending_for_a_list_of_users(data):
    got = unpack(recommendation_requests(data, max_length=3, users=["70", 0, 70, "20"]))
    assert list(got) == [0, 20, 70], "the dataset's order, each once"
    with pytest.raises(UserError, match=r"2 of 4 users are not in the dataset .* the first is '71'"):
        recommendation_requests(data, max_length=3, users=["70", "71", 0, "x"])


@pytest.mark.parametrize("time", [1_700_000_000_000, -(10**30)])
def test_a_time_of_request_in_other_units_is_refused(data, time):
    with pytest.raises(UserError, match=f"the time of request {time} is not between the years 1740 and 2200"):
        recommendation_requests(data, max_length=3, time=time)


def test_text_ids_and_no_times(tmp_path):
    data = dataset(tmp_path / "text", sequences([[1, 2], [3]], users=np.array(["ann", "7"], object)))
    got = unpack(recommendation_requests(data, max_length=3, users=[7, "ann"]))
    assert got["7"] == ([3], UNKNOWN, [3], 1) and got["ann"] == ([1, 2], UNKNOWN, [1, 2], 2)
    with pytest.raises(UserError, match="has no timestamps"):
        recommendation_requests(data, max_length=3, time=5)
