"""KuaiRand-Pure as it is published, in little: what becomes of its log, its histories, its users and videos."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from gr import config as configs
from gr.data.dataset import SequenceDataset
from gr.data.making.sources.base import make_source
from gr.data.making.sources.kuairand import LABELS, RANGES, _membership
from gr.data.split import GlobalTime
from gr.errors import UserError
from gr.eval.tables import buckets_tables, results_table
from gr.train.evaluation import Evaluation
from gr.train.parts import open_data
from gr.train.trainer import summary

DAY = 1_650_816_000  # 25 April 2022 in Beijing


def log_table(**changes):
    rows = {
        "user_id": [3, 3, 5, 3],
        "video_id": [10, 11, 10, 12],
        "time_ms": [(DAY + s) * 1000 + 7 for s in (50, 20, 30, 90_000)],
        **{column: [1, 0, 0, 1] for column in LABELS.values()},
        "play_time_ms": [100, 200, 300, 400],
        "duration_ms": [1000, 2000, 1000, 3000],
        "tab": [1, 0, 1, 4],
    }
    return pa.table({**rows, **changes})


def published(folder, log=None):
    folder.mkdir()
    pq.write_table(log_table() if log is None else log, folder / "log_standard_1.parquet")
    users = {"user_id": [3, 5, 9], **{name: ["a", "b", "a"] for name in (*RANGES, "register_days_range")}}
    users |= {f"onehot_feat{n}": pa.array([1, 2, 3], pa.int64()) for n in range(18)}
    users["onehot_feat4"] = pa.array([1.0, None, 3.0])
    pq.write_table(pa.table(users), folder / "user_features.parquet")
    videos = {
        "video_id": [10, 11, 12, 13],
        "author_id": [1, 2, 3, 4],
        "video_type": ["NORMAL"] * 4,
        "upload_type": ["A", "B", "A", "B"],
        "music_type": [9.0, None, 4.0, 9.0],
        "video_duration": [1.0, None, 3.0, 4.0],
        "tag": ["39", "2,7", "unknown", "1"],
    }
    pq.write_table(pa.table(videos), folder / "video_features_basic.parquet")
    history = {
        "user_id": [5, 3],
        "last_time_ms": [(DAY - 9) * 1000, (DAY - 5) * 1000],
        "watch_seq": [[12, 13, 12], [13]],
        "like_seq": [[], [13]],
        "long_watch_seq": [[12], []],
    }
    pq.write_table(pa.table(history), folder / "user_history_before.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kuairand")
    return make_source("kuairand-pure").prepare(published(folder / "raw"), str(folder / "out"))


def of_user(dataset, user):
    rows = dataset.read_block(0)
    row = rows.users_R.tolist().index(user)
    return rows, rows.take(np.array([row]))


def test_histories_come_first_and_what_is_unknown_of_them_is_nan(dataset):
    _, rows = of_user(dataset, 3)
    ids = dataset.catalogue.ids.to_pylist()
    assert [ids[i] for i in rows.items_A] == [13, 11, 10, 12]
    assert (rows.timestamps_A - DAY).tolist() == [-5, 20, 50, 90_000]
    assert rows.columns["like"].tolist() == [1, 0, 1, 1] and rows.columns["long_view"].tolist() == [
        0,
        0,
        1,
        1,
    ]
    np.testing.assert_array_equal(rows.columns["click"], [np.nan, 0, 1, 1])
    assert rows.columns["tab"].tolist() == ["", "0", "1", "4"]
    _, rows = of_user(dataset, 5)  # video 12 twice, viewed long once: nobody knows when
    np.testing.assert_array_equal(rows.columns["long_view"], [np.nan, 0, np.nan, 0])


def test_users_and_videos_bring_their_fields(dataset):
    rows, _ = of_user(dataset, 3)
    assert rows.user_columns["user_active_degree"].tolist() == [{3: "a", 5: "b"}[u] for u in rows.users_R]
    degrees = rows.user_columns["onehot_feat4"]  # of one it is missing
    assert np.diff(degrees.offsets).tolist() == [{3: 1, 5: 0}[u] for u in rows.users_R]
    assert dataset.catalogue["tag"].to_pylist() == [[39], [2, 7], [], [1]] and dataset.items == 4
    assert dataset.users == 2, "who did nothing is no user"
    assert SequenceDataset(dataset.path).manifest.provenance["actions_before"] == 4


def test_without_histories_the_log_is_alone(dataset, tmp_path):
    source = make_source("kuairand-pure", settings=["history=false"])
    made = source.prepare(published(tmp_path / "raw"), str(tmp_path / "out"))
    assert made.manifest.actions == 4 and dataset.manifest.actions == 8


def test_membership_of_users_that_share_items():
    of_lists = np.array([0, 0, 2]), np.array([1, 1, 2])  # [1, 1], [], [2]
    found = _membership(np.array([0, 0, 1, 2, 2]), np.array([1, 2, 1, 2, 2]), *of_lists)
    np.testing.assert_array_equal(found, [1, 0, 0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (log_table(is_click=[0, 1, 2, 0]), r"log_standard_1.parquet', column 'is_click': 2 is no label"),
        (log_table().drop_columns("is_like"), r"log_standard_1.parquet' has no column 'is_like'"),
        (log_table(user_id=[3, 4, 5, 3]), "user 4 of the log is not among the users that are described"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, log, sentence):
    folder = published(tmp_path / "raw", log)
    with pytest.raises(UserError, match=sentence):
        make_source("kuairand-pure").prepare(folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


USERS, VIDEOS, BEFORE = (
    f"{name}.parquet" for name in ("user_features", "video_features_basic", "user_history_before")
)


@pytest.mark.parametrize("file", [USERS, VIDEOS, BEFORE])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_file_that_is_cut_is_said_and_nothing_stays(tmp_path, file, kept):
    folder = published(tmp_path / "raw")
    path = tmp_path / "raw" / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"cannot read '.*{file}' .*fetch it again"):
        make_source("kuairand-pure").prepare(folder, str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("file", [USERS, VIDEOS])
def test_a_file_that_is_not_there_is_said_before_anything_is_read(tmp_path, monkeypatch, file):
    folder = published(tmp_path / "raw")
    (tmp_path / "raw" / file).unlink()
    monkeypatch.setattr("gr.data.making.sources.kuairand.Impressions", None)
    with pytest.raises(UserError, match=rf"has no {file.removesuffix('.parquet')}\*.parquet or .csv"):
        make_source("kuairand-pure").prepare(folder, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "column", "values", "sentence"),
    [
        (USERS, "user_id", [3, 5, 3], "lists user 3 more than once"),
        (USERS, "user_id", [3, None, 5], "row 1, column 'user_id': the value is missing"),
        (USERS, "onehot_feat3", [1.5, 2.0, 3.0], "column 'onehot_feat3': Float value 1.5"),
        (VIDEOS, "video_id", [10, 11, 10, 13], "lists item 10 more than once"),
        (VIDEOS, "music_type", [9.5, None, 4.0, 9.0], "column 'music_type': Float value 9.5"),
        (VIDEOS, "tag", ["39", "2,x", None, "1"], "column 'tag': 'x' of '2,x' is no tag"),
        (BEFORE, "user_id", [5, None], "column 'user_id': a value is missing"),
        (BEFORE, "last_time_ms", [5, None], "column 'last_time_ms': a value is missing"),
        (BEFORE, "watch_seq", [[12, None], [13]], "column 'watch_seq': a value is missing"),
        (BEFORE, "like_seq", [None, [13]], "column 'like_seq': a value is missing"),
        (BEFORE, "long_watch_seq", ["12", ""], "column 'long_watch_seq': string is no list"),
        (BEFORE, "watch_seq", [["a"], ["13"]], "column 'watch_seq': Failed to parse"),
    ],
)
def test_a_bad_value_is_said_with_its_column(tmp_path, file, column, values, sentence):
    folder = published(tmp_path / "raw")
    path = tmp_path / "raw" / file
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), path)
    with pytest.raises(UserError, match=sentence):
        make_source("kuairand-pure").prepare(folder, str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_tags_stand_apart_by_commas_and_perhaps_spaces(tmp_path):
    folder = published(tmp_path / "raw")
    table = pq.read_table(f"{folder}/{VIDEOS}")
    tags = pa.array(["39, 4", None, "unknown", "1"])
    pq.write_table(table.set_column(table.column_names.index("tag"), "tag", tags), f"{folder}/{VIDEOS}")
    made = make_source("kuairand-pure").prepare(folder, str(tmp_path / "out"))
    assert made.catalogue["tag"].to_pylist() == [[39, 4], [], [], [1]]


def test_a_label_that_one_of_several_files_has_not_is_said_with_the_file(tmp_path):
    folder = published(tmp_path / "raw")
    pq.write_table(log_table().drop_columns("is_like"), f"{folder}/log_standard_2.parquet")
    with pytest.raises(UserError, match=r"log_standard_2.parquet' has no column 'is_like'"):
        make_source("kuairand-pure").prepare(folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none_is_said(tmp_path):
    for source in (None, str(tmp_path / "nothing")):
        with pytest.raises(UserError, match=r"get (it|KuaiRand-Pure) from https://kuairand\.com"):
            make_source("kuairand-pure").prepare(source, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"has no log_standard\*.parquet or .csv"):
        make_source("kuairand-pure").prepare(str(tmp_path), str(tmp_path / "out"))


def split(**changes):
    config = {"valid_from": DAY + 40, "test_from": DAY + 60, "train_from": DAY, "held_out": "all", **changes}
    return GlobalTime(GlobalTime.Config(**config))


def test_all_actions_of_a_period_are_held_out_each_with_all_before_it(dataset):
    rows = dataset.read_block(0)
    users = rows.users_R.tolist()
    found = {}
    for name in ("valid", "test"):
        who, index = split(test_from=DAY + 45, valid_from=DAY + 25).targets(rows, name, dataset.users)
        found[name] = sorted((users[w], i) for w, i in zip(who.tolist(), index.tolist()))
    assert found == {"valid": [(5, 3)], "test": [(3, 2), (3, 3)]}
    assert split(held_out="first", test_from=DAY + 45).targets(rows, "test", 2)[1].tolist() == [2]


@pytest.mark.parametrize(("held_out", "judged"), [("all", "4 actions"), ("first", "2 users")])
def test_what_is_judged_is_called_what_it_is(dataset, held_out, judged):
    of_split = {"valid_from": DAY + 10, "test_from": DAY + 15, "train_from": DAY, "held_out": held_out}
    overrides = [f"data.split.{key}={value}" for key, value in of_split.items()]
    config = configs.load("kuairand/din", [f"data.path={dataset.path}", "eval.buckets=true", *overrides])
    data = open_data(config)
    evaluation = Evaluation(data.dataset, data.split, config, data.catalogue, judged_by="pointwise")
    (result,) = evaluation.baselines("test").values()
    console = Console(file=io.StringIO(), width=200)
    for table in (results_table({"prior": result}, "title"), *buckets_tables(result, "prior")):
        console.print(table)
    text = console.file.getvalue()
    assert f"{judged}, " in text
    # no two columns of one name: buckets are of numbers of actions
    assert text.count(" judged ") == (len(result.buckets) if held_out == "all" else 0)
    assert f"({judged})" in summary({**result.row(), "kind": "eval", "epoch": 0}, result.shown, result.judged)


def test_what_comes_before_training_begins_is_an_input_alone(dataset):
    rows = dataset.read_block(0)
    samples = split().examples(rows, False, 10).copied()
    by_user = dict(zip(samples.users_R.tolist(), zip(samples.lengths_R, samples.targets_from_R)))
    assert by_user == {3: (2, 1), 5: (4, 3)}
    early = split(train_from=DAY + 25).examples(rows, False, 10).copied()
    assert dict(zip(early.users_R.tolist(), early.lengths_R)) == {3: 0, 5: 4}
    with pytest.raises(UserError, match=r"train_from is not before data\.split\.valid_from"):
        split(train_from=DAY + 40)
